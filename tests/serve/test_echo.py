"""What a client learns of its prompt: `echo` with log probabilities, and the tokens that were cached."""

from __future__ import annotations

import json
import subprocess
import sys

import openai
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from nybble.chat.loading import load_answerers
from nybble.evaluate.harness import Harness
from nybble.serve.loading import load_decoder, load_pipeline
from tests.evaluate.test_evaluate import ARC, write_rows
from tests.local_server import events, serving

PLAIN = "/v1/completions"
CLOSE = 1e-4  # nats; float32 in batches of several sizes
PROMPT = "say one two \u00e9\u4e2d 3"
# lm-eval repeats requests that fail by this package, which is none of nybble's; here they shall fail.
NO_RETRIES = """
class RetryError(Exception): pass
def retry(**options): return lambda work: work
def stop_after_attempt(count): pass
def wait_exponential(**options): pass
"""


@pytest.fixture(scope="module", params=[load_pipeline, load_decoder])
def server(request, tuned_run, cache):
    with serving(lambda metrics: request.param([tuned_run], metrics, device="cpu", queue=64, cache=cache)) as server:
        yield server


@pytest.fixture(scope="module")
def tuned(tuned_run, cache):
    (answerer,) = load_answerers([tuned_run], cache, "cpu", dequantise=True)
    return answerer.model


def logprobs_of(model, ids):
    """The log probability of each token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()


def test_a_prompt_comes_back_with_its_log_probabilities(server, tuned):
    tokenizer = server.engine.models["run"].template.tokenizer
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    ask = {"model": "run", "prompt": PROMPT, "temperature": 0, "max_tokens": 3, "logprobs": 2}
    ask["logit_bias"] = {str(end): -100 for end in server.engine.models["run"].stop_ids}
    (bare,) = server.post(PLAIN, **ask).json()["choices"]
    (choice,) = server.post(PLAIN, **ask, echo=True).json()["choices"]
    assert choice["text"] == PROMPT + bare["text"]
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert told["token_logprobs"][1 : len(ids)] == pytest.approx(logprobs_of(tuned, ids), abs=CLOSE)
    assert told["token_logprobs"][len(ids) :] == pytest.approx(bare["logprobs"]["token_logprobs"], abs=CLOSE)
    assert all(
        max(top.values()) >= value - CLOSE
        for top, value in zip(told["top_logprobs"][1:], told["token_logprobs"][1:], strict=True)
    )
    assert len({len(values) for values in told.values()}) == 1
    assert told["text_offset"][0] == 0
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert "\ufffd" in token or choice["text"][offset:].startswith(token), (token, offset)


def test_the_end_of_an_answer_is_among_the_tokens_where_the_prompt_is(server):
    """lm-eval leaves out the last token, whatever it is."""
    end = min(server.engine.models["run"].stop_ids)
    ask = {"model": "run", "prompt": [[5, 6, 7]], "temperature": 0, "max_tokens": 5, "logprobs": 1}
    ask |= {"logit_bias": {str(end): 100}}
    (choice,) = server.post(PLAIN, **ask, echo=True).json()["choices"]
    assert (len(choice["logprobs"]["tokens"]), choice["finish_reason"]) == (4, "stop")
    (choice,) = server.post(PLAIN, **ask).json()["choices"]
    assert choice["logprobs"]["tokens"] == []


def test_a_prompt_may_be_all_that_is_wanted(server, tuned):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    prompts = [[5, 6, 7, 8], [9] * 40, [1]]
    ask = {"model": "run", "prompt": prompts, "max_tokens": 0, "echo": True}
    answer = client.completions.create(**ask, logprobs=1, n=2)
    assert answer.usage.completion_tokens == 0
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    for choice, ids in zip(answer.choices, [ids for ids in prompts for _ in range(2)], strict=True):
        assert choice.finish_reason == "length"
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(logprobs_of(tuned, ids), abs=CLOSE)
    plain = client.completions.create(**ask)
    assert [choice.text for choice in plain.choices] == [choice.text for choice in answer.choices[::2]]
    assert all(choice.logprobs is None for choice in plain.choices)
    full = client.completions.create(**ask | {"prompt": [[7] * server.engine.models["run"].positions]})
    assert full.choices[0].finish_reason == "length"
    client.close()


def test_a_stream_begins_with_the_prompt(server):
    ask = {"model": "run", "prompt": PROMPT, "temperature": 0, "max_tokens": 4, "logprobs": 1, "echo": True}
    (whole,) = server.post(PLAIN, **ask).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events(server.post(PLAIN, **ask, stream=True).text.splitlines())]
    assert chunks[0]["text"] == PROMPT
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for field in ("tokens", "text_offset"):
        parts = [part for chunk in chunks if chunk["logprobs"] for part in chunk["logprobs"][field]]
        assert parts == whole["logprobs"][field]
    bare = {**ask, "logprobs": None, "stream": True, "max_tokens": 0}
    chunks = [chunk["choices"][0] for chunk in events(server.post(PLAIN, **bare).text.splitlines())]
    assert ("".join(chunk["text"] for chunk in chunks), chunks[-1]["finish_reason"]) == (PROMPT, "length")


def test_usage_tells_what_was_cached(tuned_run, cache):
    with serving(lambda metrics: load_decoder([tuned_run], metrics, device="cpu", queue=64, cache=cache)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        text = "one two three red cat " * 8
        asked = [{"role": "user", "content": text}]
        ask = {"model": "run", "messages": asked, "max_tokens": 4, "temperature": 0}
        first, second = (client.chat.completions.create(**ask, n=2).usage for _ in range(2))
        assert first.prompt_tokens_details.cached_tokens == 0
        assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1, "all but the last"
        stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        assert list(stream)[-1].usage.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1
        response = client.responses.create(model="run", input=text, max_output_tokens=4, temperature=0)
        assert response.usage.input_tokens_details.cached_tokens == second.prompt_tokens - 1
        plain = {"model": "run", "prompt": [[5, 6, 7, 8], [9, 10, 11]], "max_tokens": 2}
        usages = [client.completions.create(**plain).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
        assert usages == [0, 3 + 2]
        client.close()


@pytest.mark.slow
def test_lm_evals_client_of_this_server_scores_as_nybble_eval_does(server, tuned_run, tuned, tiny_tokenizer, tmp_path):
    write_rows(tmp_path / "arc_easy.validation.jsonl", ARC)
    harness = Harness(tmp_path, 10)
    with harness.benchmark("arc_easy") as benchmark:
        ours = harness.score(benchmark, tuned, tiny_tokenizer)
        own = tmp_path / "arc_easy.yaml"
        own.write_text(
            f"include: {harness.manager.task_index['arc_easy'].yaml_path}\ntask: arc_easy\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {{data_files: {{validation: {tmp_path / 'arc_easy.validation.jsonl'}}}}}\n"
            "training_split: null\ntest_split: null\n"
        )
    (tmp_path / "tenacity.py").write_text(NO_RETRIES)
    run = "import sys; sys.path.append(sys.argv.pop(1)); from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    for options in ("num_concurrent=1", "num_concurrent=4"):
        out = tmp_path / options
        told = f"model=run,base_url={server.url}/v1/completions,tokenizer={tuned_run.folder / 'tokenizer'},{options}"
        command = [sys.executable, "-c", run, tmp_path, "run", "--model", "local-completions", "--model_args", told]
        command += ["--tasks", own, "--limit", "10", "--batch_size", "4", "--output_path", out, "--log_samples"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = out.rglob("samples_*.jsonl")
        theirs = sorted(map(json.loads, file.read_text().splitlines()), key=lambda entry: entry["doc_id"])
        assert ours.values == [entry["acc_norm"] for entry in theirs]
        model = HFLM(pretrained=tuned, tokenizer=tiny_tokenizer, batch_size=4)
        for entry in theirs:
            pairs = [(pair["arg_0"], pair["arg_1"]) for pair in entry["arguments"].values()]
            encoded = [(pair, *model._encode_pair(*pair)) for pair in pairs]
            expected = model._loglikelihood_tokens(encoded, disable_tqdm=True)
            for (said, greedy), (value, is_greedy) in zip([pair[0] for pair in entry["resps"]], expected, strict=True):
                assert float(said) == pytest.approx(float(value), abs=1e-3)
                assert str(greedy) == str(is_greedy)
