"""The other engines: nybble's decoder, Transformers' continuous batching on a merged run, and the command that starts vLLM."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import stat
import subprocess
import sys
import threading

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nybble.data.rows.formats import Message
from nybble.data.text.tokens import encode_prompt
from nybble.errors import RunError, ServeError
from nybble.run.folder import open_run
from nybble.serve.app import Limits
from nybble.serve.loading import load_auto, load_continuous, load_decoder, load_named, load_pipeline
from nybble.serve.metrics import Metrics
from nybble.serve.server import Address
from nybble.serve.vllm import command, environment, serve_with_vllm
from nybble.weights.watched import Ineligible
from tests.local_server import another_run, serving


@pytest.fixture(scope="module")
def merged(tuned_run, tiny_llama):
    """A run with its adapter merged into 16-bit weights, as nybble export leaves it."""
    run = another_run(tuned_run, "merged-run", 2.0)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), run.adapter).merge_and_unload()
    model.save_pretrained(run.folder / "export" / "merged")
    for file in (run.folder / "tokenizer").iterdir():
        shutil.copy(file, run.folder / "export" / "merged")
    return run


def test_health_tells_when_the_manager_has_ended(merged, cache):
    with serving(lambda metrics: load_continuous([merged], metrics, device="cpu", queue=8, cache=cache)) as server:
        assert server.http.get(f"{server.url}/health").status_code == 200
        server.engine.worker.generator.manager.stop(block=True)
        assert server.http.get(f"{server.url}/health").status_code == 503


def user(text):
    return [{"role": "user", "content": text}]


def test_the_decoder_answers_as_the_pipeline_does(tuned_run, tmp_path, cache):
    runs = [tuned_run, another_run(tuned_run, "second", 3.0)]
    said = {}
    for load in (load_pipeline, load_decoder):
        with serving(lambda metrics, load=load: load(runs, metrics, device="cpu", queue=64, cache=cache)) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            models = [model.id for model in client.models.list()]
            with concurrent.futures.ThreadPoolExecutor(6) as threads:
                answers = [
                    threads.submit(
                        client.chat.completions.create, model=model, messages=user(text), max_tokens=8, seed=3,
                        temperature=temperature, logprobs=True,
                    )
                    for model in models for text in ("say one two", "go on") for temperature in (0, 0.9)
                ]  # fmt: skip
                said[load] = [answer.result().choices[0].message.content for answer in answers]
            assert server.http.get(f"{server.url}/health").status_code == 200
            client.close()
    assert said[load_decoder] == said[load_pipeline]
    assert len(set(said[load_decoder])) > 3


def test_what_the_decoder_cannot_serve_says_why(tuned_run, cache, monkeypatch, capsys):
    def refuse(*args, **options):
        raise Ineligible("q_proj has the LoRA variant Dora")

    monkeypatch.setattr("nybble.serve.loading.make_decoder", refuse)
    with pytest.raises(ServeError) as refused:
        load_decoder([tuned_run], Metrics(), device="cpu", queue=16, cache=cache)
    print(refused.value, refused.value.fix)
    shown = capsys.readouterr().out
    assert "the decoder cannot compute this model: q_proj has the LoRA variant Dora" in shown
    assert "--engine pipeline" in shown


def test_by_default_the_decoder_serves_what_it_can_and_the_pipeline_the_rest_and_says_why(
    tuned_run, cache, monkeypatch
):
    engine = load_auto([tuned_run], Metrics(), device="cpu", queue=16, cache=cache)
    assert (engine.name, engine.about.split(";")[0]) == ("decoder", "nybble's own loop in plain torch")

    def refuse(*args, **options):
        raise Ineligible("q_proj has the LoRA variant Dora")

    monkeypatch.setattr("nybble.serve.loading.make_decoder", refuse)
    engine = load_auto([tuned_run], Metrics(), device="cpu", queue=16, cache=cache)
    assert engine.name == "pipeline"
    assert engine.about.endswith("(the faster decoder cannot compute this model: q_proj has the LoRA variant Dora)")


@pytest.mark.parametrize(
    "engine, why, fix",
    [("decoder", "keys and values in fp8 need a GPU", "--kv-cache bf16"), ("auto", "need a GPU", "--kv-cache bf16"),
     ("pipeline", "the engine pipeline has no cache in fp8", "--engine decoder, or --kv-cache bf16")],
)  # fmt: skip
def test_a_cache_in_fp8_is_refused_where_there_is_none(tuned_run, cache, engine, why, fix, capsys):
    with pytest.raises(ServeError) as refused:
        load_named(Metrics(), engine=engine, runs=[tuned_run], device="cpu", queue=16, cache=cache, fp8_cache=True)
    print(refused.value, refused.value.fix)
    shown = capsys.readouterr().out
    assert why in shown
    assert fix in shown


def test_continuous_batching_answers_each_as_generate_does(merged, cache):
    with serving(lambda metrics: load_continuous([merged], metrics, device="cpu", queue=64, cache=cache)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["merged-run"]
        model = AutoModelForCausalLM.from_pretrained(merged.folder / "export" / "merged")
        served = server.engine.models["merged-run"]
        expected, got = {}, {}
        for text in ("say one two", "say red 3", "go on"):
            prompt = torch.tensor([encode_prompt(served.template, (Message("user", text),))])
            settings = {"do_sample": False, "eos_token_id": sorted(served.stop_ids), "pad_token_id": 0}
            ids = model.generate(prompt, max_new_tokens=10, **settings)[0, prompt.shape[1] :]
            expected[text] = served.template.tokenizer.decode(ids, skip_special_tokens=True).strip()

        def work(text):
            stream = client.chat.completions.create(
                model="merged-run", messages=user(text), max_tokens=10, temperature=0, stream=True
            )
            got[text] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        threads = [threading.Thread(target=work, args=(text,)) for text in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == expected
        warm = client.chat.completions.create(
            model="merged-run",
            messages=user("go on"),
            max_tokens=12,
            temperature=1.2,
            top_p=0.9,
            n=2,
            extra_body={"top_k": 40},
        )
        assert server.chat("merged-run", "go on", max_tokens=4, temperature=2, top_k=10**30)["choices"]
        assert warm.usage.completion_tokens > 2
        greedy = server.chat("merged-run", "go on", max_tokens=4, temperature=0)["choices"]
        assert server.chat("merged-run", "go on", max_tokens=4, temperature=2, top_p=0)["choices"] == greedy
        assert client.responses.create(
            model="merged-run", input="go on", temperature=0, max_output_tokens=4
        ).output_text
        asked = {"model": "merged-run", "input": "x", "include": ["message.output_text.logprobs"]}
        assert server.post("/v1/responses", **asked).json()["error"]["param"] == "include"
        for refused, field in (
            ({"seed": 1}, "seed"), ({"logprobs": True}, "logprobs"), ({"min_p": 0.1}, "min_p"),
            ({"presence_penalty": 1}, "presence_penalty"), ({"logit_bias": {"5": 1}}, "logit_bias"),
        ):  # fmt: skip
            answer = server.post(model="merged-run", messages=user("x"), **refused)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
            assert "--engine auto" in answer.json()["error"]["message"]
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(
                model="merged-run", messages=user("go on"), max_tokens=400, temperature=2, n=16
            )
        server.wait_for("nybble_running", 0, 10)


def test_a_run_that_was_not_merged_says_how(tuned_run, cache):
    with pytest.raises(ServeError, match=r"needs a merged model[\s\S]*nybble export .*run --to merged"):
        load_continuous([tuned_run], Metrics(), device="cpu", queue=1, cache=cache)
    with pytest.raises(ServeError, match="serves one merged run"):
        load_continuous([tuned_run, tuned_run], Metrics(), device="cpu", queue=1, cache=cache)


def test_vllm_is_started_on_the_base_with_an_adapter_a_run(tuned_run, tiny_llama):
    runs = [tuned_run, another_run(tuned_run, "second", 2.0)]
    assert command(runs, "127.0.0.1", 8000) == [
        "vllm", "serve", str(tiny_llama), "--tokenizer", str(runs[0].folder / "tokenizer"), "--quantization", "bitsandbytes",
        "--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"run={runs[0].adapter}", f"second={runs[1].adapter}",
        "--host", "127.0.0.1", "--port", "8000",
    ]  # fmt: skip
    with pytest.raises(RunError, match="the name second"):
        command([runs[1], open_run(another_run(tuned_run, "more/second", 1.0).folder)], "127.0.0.1", 8000)


def test_vllm_is_started_on_a_merged_model_where_there_is_one(merged):
    assert command([merged], "::1", 9000) == [
        "vllm", "serve", str(merged.folder / "export" / "merged"), "--served-model-name", "merged-run",
        "--host", "::1", "--port", "9000",
    ]  # fmt: skip


def test_the_key_goes_to_vllm_where_no_other_user_sees_it(tuned_run):
    assert environment("s3cret")["VLLM_API_KEY"] == "s3cret"
    assert "VLLM_API_KEY" not in environment(None)
    assert not any("s3cret" in word for word in command([tuned_run], "0.0.0.0", 8000))


def start(run, *, limits=Limits(), device="auto", **place):  # noqa: B008
    serve_with_vllm([run], Address(**place), device=device, limits=limits)


def test_where_vllm_is_missing_it_says_how_to_install_it(tuned_run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ServeError, match=r"vLLM is not installed; the command would be: vllm serve [\s\S]*pip install vllm"
    ):
        start(tuned_run)
    with pytest.raises(ServeError, match="there is no API key"):
        start(tuned_run, host="0.0.0.0")
    for odd in ({"limits": Limits(timeout=5)}, {"limits": Limits(queue=20)}, {"device": "cpu"}):
        with pytest.raises(ServeError, match="are for nybble's own server"):
            start(tuned_run, **odd)


@pytest.mark.slow
def test_vllm_takes_the_place_of_this_process(merged, tmp_path):
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho "$VLLM_API_KEY: $*"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    script = (
        "import sys; from nybble.run.folder import open_run; from nybble.serve.vllm import become_vllm;"
        "become_vllm([open_run(sys.argv[1])], '127.0.0.1', 8000, 'k3y')"
    )
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(
        [sys.executable, "-c", script, str(merged.folder)], env=environ, capture_output=True, text=True
    )
    expected = f"k3y: serve {merged.folder}/export/merged --served-model-name merged-run --host 127.0.0.1 --port 8000\n"
    assert said.stdout == expected, said.stderr
