"""nybble export on a tiny run: three artefacts that answer like it, the gate that stops those that do not, every bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nybble.chat.answerer import Answerer, Sampling
from nybble.chat.loading import load_answerer
from nybble.data.text.template import choose_template
from nybble.engine.loss import last_hidden
from nybble.errors import ExportError, HubError, ModelError, RunError, StorageError
from nybble.export import export as module
from nybble.export import targets
from nybble.export.artefacts import generation_settings
from nybble.export.card import STORED, Subject, data_licences, write_card
from nybble.export.export import ExportRequest, export
from nybble.export.gguf.writer import Converter
from nybble.export.licence import find_licence
from nybble.export.parity import loaders, plain, reference
from nybble.export.parity.compare import Comparison, Divergence
from nybble.export.precheck import Preflight
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_config
from nybble.model.tokenizer.load import load_tokenizer
from nybble.plan.free_memory import Memory
from nybble.recipe import load_recipe
from nybble.run.folder import Run, open_run
from nybble.training.train import resume, train
from tests.cli.test_cli import nybble

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def run(peaky_run, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(peaky_run.folder, folder)
    return open_run(folder)


@pytest.fixture
def told():
    return Console(record=True, width=120)


@pytest.fixture(scope="module")
def measured(run, cache):
    """What the run answers, once for all tests that spoil an artefact."""
    source = module.open_finished_run(run, "auto", cache)
    return module._measure(source, ExportRequest("merged"), Console(quiet=True), cache, None)


@pytest.fixture(scope="module")
def merged(run, cache):
    console = Console(record=True, width=120)
    return export(run, ExportRequest("merged"), console, cache), console.export_text()


def test_a_merged_folder_answers_in_plain_transformers_as_the_run_does(run, merged, cache):
    folder, text = merged
    assert folder == run.folder / "export" / "merged"
    assert "dequantised" in text
    assert "taken" in text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    answerer = load_answerer(run, cache)
    from nybble.data.rows.formats import Message

    for words in ("say one two 3", "say cat dog 7", "say red blue green 11"):
        (expected,) = answerer.answer([(Message("user", words),)], Sampling(max_new_tokens=24))
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], add_generation_prompt=True, return_tensors="pt"
        )
        output = model.generate(**prompt, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
        assert output[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(output, skip_special_tokens=True).strip() == expected != ""


def test_what_lies_beside_the_weights(merged, run):
    folder, _ = merged
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "chat_template.jinja", "README.md", "Modelfile", "parity.json"}  # fmt: skip
    report = json.loads((folder / "parity.json").read_text())
    (check,) = report["checks"]
    assert report["merge_base"] == "dequantised"
    assert check["passed"]
    assert check["kind"] == "bfloat16"
    assert check["numbers"]["kl"] < 0.005
    assert check["numbers"]["run_ended"] == check["numbers"]["artefact_ended"] == check["numbers"]["questions"] == 10
    bases = report["comparison"]["bases"]
    assert bases["original"]["kl"] > 100 * bases["dequantised"]["kl"] > 0
    card = (folder / "README.md").read_text()
    kept = json.loads((run.folder / "summary.json").read_text())
    for part in ("library_name: transformers", "## Use", "dequantised (taken)", kept["data"]["fingerprint"], "max_steps: 60",
                 kept["base"]["fingerprint"], f"{kept['peak_memory_gb']:.2f} GB", f"{bases['original']['kl']:.6f}",
                 f"{bases['original']['perplexity']:.4f}", "the prompts' token ids are equal"):  # fmt: skip
        assert part in card, part
    assert "base_model" not in card.split("---")[1], "a folder is no name that the Hub takes"
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (config["rope_parameters"]["rope_theta"], None)
    assert config["tie_word_embeddings"] is False


def test_the_lines_of_each_card_run(run, merged, cache, tmp_path, quiet, monkeypatch):
    folder = export(run, ExportRequest("adapter", tmp_path / "adapter"), quiet, cache)
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "parity.json",
    } <= {file.name for file in folder.iterdir()}
    for place, name in ((folder, "adapter"), (merged[0], "merged")):
        code = (place / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert len(code.strip().splitlines()) == 4
        monkeypatch.chdir(place)
        scope: dict[str, object] = {}
        exec(code, scope)
        assert scope["tokenizer"].chat_template, name
        assert scope["model"] is not None


def test_gguf_files_are_read_back_by_transformers(run, cache, tmp_path, told, monkeypatch):
    monkeypatch.setattr(targets, "has_llama_cpp", lambda: False)
    wanted = ExportRequest("gguf", tmp_path / "gguf", quants=("F16", "Q8_0", "Q4_0"), merge_base="original")
    folder = export(run, wanted, told, cache, Converter())
    assert "not checked: llama-cpp-python is not installed (make llama-cpp" in told.export_text()
    assert "FROM ./run-F16.gguf" in (folder / "Modelfile").read_text()
    merged = export(
        run, ExportRequest("merged", tmp_path / "merged", merge_base="original", dtype="float16"), told, cache
    )
    expected = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float16"
    ids = torch.tensor([[1, 50, 60, 70, 80, 90]])
    for quant, close in (("F16", 1e-3), ("Q8_0", 0.05), ("Q4_0", 0.5)):
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"run-{quant}.gguf", dtype=torch.float32)
        difference = (model(ids).logits - expected(ids).logits).std() / expected(ids).logits.std()
        print(quant, difference.item())
        assert difference < close
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="run-F16.gguf")
    assert (
        tokenizer("say one two 3 café")["input_ids"]
        == AutoTokenizer.from_pretrained(merged)("say one two 3 café")["input_ids"]
    )


def eos_that_does_not_end(folder):
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = [0]
    settings.save_pretrained(folder)


def template_lost(folder):
    (folder / "chat_template.jinja").unlink()


def other_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("### Response:", "### Answer:"))


def tensor_damaged(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tokenizer_changed(folder):
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["merges"].pop(3)
    file.write_text(json.dumps(described))


def bos_before_a_text(folder):
    """As some programs write a tokenizer: chat prompts stay, plain ones begin otherwise."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    described["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    file.write_text(json.dumps(described))


SPOILT = [
    (eos_that_does_not_end, "an answer ends with '</s>', and the artefact stops at ['<unk>'] only"),
    (template_lost, "the chat template is lost"),
    (other_template, "has other tokens from position"),
    (tensor_damaged, "differ from the run's by"),
    (tokenizer_changed, "has other tokens from position"),
    (bos_before_a_text, "has other tokens from position 0 on"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_a_damaged_artefact_is_not_kept(run, measured, cache, tmp_path, told, monkeypatch, spoil, said):
    write = targets.write_merged
    monkeypatch.setattr(module, "_measure", lambda *_: measured)
    monkeypatch.setattr(targets, "write_merged", lambda folder, *rest: (write(folder, *rest), spoil(folder)))
    with pytest.raises(ExportError) as caught:
        export(run, ExportRequest("merged", tmp_path / "out"), told, cache)
    print(caught.value)
    assert said in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["out.failed.json"]
    (check,) = json.loads((tmp_path / "out.failed.json").read_text())["checks"]
    assert not check["passed"]
    monkeypatch.setattr(targets, "write_merged", write)
    export(run, ExportRequest("merged", tmp_path / "out"), told, cache)
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "a report of a failure does not outlive it"


def test_a_model_is_loaded_where_it_fits(monkeypatch):
    """A merged 7B, 13.5 GB, on cards of 24, 12 and 4 GB, with 16 GB of memory and with 2."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)

    def placed(size, device, card, memory):
        monkeypatch.setattr(loaders, "device_memory", lambda device: Memory(int(card * 1e9), int(card * 1e9)))
        monkeypatch.setattr(loaders, "host_memory", lambda: Memory(int(memory * 1e9), int(memory * 1e9)))
        return loaders.placement_for(int(size * 1e9), device)

    assert placed(13.5, gpu, 24, 16) == {"device_map": {"": gpu}}
    assert placed(13.5, gpu, 12, 16) == {"device_map": "auto", "max_memory": {0: 9_000_000_000, "cpu": 16_000_000_000}}
    assert placed(13.5, gpu, 2, 16)["max_memory"][0] == 0
    assert placed(13.5, gpu, 12, 2) is None
    assert placed(13.5, cpu, 24, 16) == {"device_map": {"": cpu}}
    assert placed(13.5, cpu, 24, 2) is None


def test_a_spread_model_answers_the_same_and_one_that_fits_nowhere_is_kept_unchecked(
    run, measured, merged, cache, tmp_path, told, monkeypatch
):
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    spread = {part: "disk" if part == "model.layers.1" else "cpu" for part in parts}
    whole, in_parts = (
        loaders.through_transformers(merged[0], measured[0].reference, {"device_map": place})
        for place in ({"": "cpu"}, spread)
    )
    assert whole.answers == in_parts.answers
    assert all(torch.equal(one, other) for one, other in zip(whole.logits, in_parts.logits, strict=True))
    monkeypatch.setattr(module, "_measure", lambda *_: measured)
    monkeypatch.setattr(targets, "placement_for", lambda size, device: None)
    folder = export(run, ExportRequest("merged", tmp_path / "out"), told, cache)
    said = "bfloat16 not checked: its 0.0 GB do not fit into free memory"
    assert said in told.export_text()
    assert said in (folder / "README.md").read_text()


def test_long_prompts_are_answered_in_small_batches_with_the_same_result(run, measured, merged, monkeypatch):
    whole = loaders.through_transformers(merged[0], measured[0].reference, {"device_map": {"": "cpu"}})
    seen = []
    monkeypatch.setattr(plain, "BATCH_TOKENS", 250)
    monkeypatch.setattr(plain, "last_hidden", lambda *words: seen.append(words[2]) or last_hidden(*words))
    parts = loaders.through_transformers(merged[0], measured[0].reference, {"device_map": {"": "cpu"}})
    assert len(seen) > 1
    assert all(batch["input_ids"].numel() <= 250 or len(batch["input_ids"]) == 1 for batch in seen)
    assert [answer.ids for answer in parts.answers] == [answer.ids for answer in whole.answers]
    for one, other in zip(whole.logits, parts.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.3)  # bfloat16


def test_the_run_answers_long_prompts_in_small_batches_with_the_same_result(run, cache, monkeypatch):
    answerer, complete, batches = load_answerer(run, cache), Answerer.complete, []
    monkeypatch.setattr(
        Answerer, "complete", lambda self, prompts, *more: batches.append(prompts) or complete(self, prompts, *more)
    )
    whole = reference.ask_run(answerer, None, {})
    assert len(batches) == 1
    monkeypatch.setattr(reference, "BATCH_TOKENS", 250)
    parts = reference.ask_run(answerer, None, {})
    assert len(batches) > 2
    for prompts in batches[1:]:
        assert len(prompts) == 1 or len(prompts) * (max(map(len, prompts)) + plain.NEW_TOKENS) <= 250
    assert parts.answers == whole.answers


def test_nothing_of_an_export_that_is_stopped_stays(run, measured, cache, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(module, "_measure", lambda *_: measured)

    def full(*_):
        raise OSError(28, "No space left on device")

    for error in (full, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)):
        monkeypatch.setattr(targets, "write_merged", error)
        with pytest.raises((StorageError, KeyboardInterrupt)):
            export(run, ExportRequest("merged", tmp_path / "out"), quiet, cache)
        assert list(tmp_path.iterdir()) == []


def copied(run, tmp_path, **files):
    """A copy of the run, some of its files changed by a function of their bytes, or removed by None."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("export", "checkpoints"))
    if files:
        (folder / "adapter" / "COMPLETE").unlink()  # it would name the damage first
    for name, change in files.items():
        file = folder / name.replace("__", "/").replace("_json", ".json").replace("_safetensors", ".safetensors")
        if change is None:
            file.unlink()
        else:
            file.write_bytes(change(file.read_bytes()))
    return folder


def test_every_bad_input_is_a_clear_error_and_leaves_what_was_there(
    run, merged, peaky_llama, cache, tmp_path, quiet, monkeypatch
):
    before = {file.name: file.read_bytes() for file in merged[0].iterdir()}
    other = tmp_path / "other-base"
    shutil.copytree(peaky_llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    cut = tmp_path / "cut-base"
    shutil.copytree(peaky_llama, cut)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    half = lambda data: data[: len(data) // 2]  # noqa: E731
    began = lambda name: lambda data: json.dumps(json.loads(data) | {"init_lora_weights": name}).encode()  # noqa: E731
    cases = [
        (run.folder, None, ExportError, "exists already", "--out ANOTHER"),
        (copied(run, tmp_path / "a", adapter__adapter_config_json=None), None, RunError, "has no adapter", "--resume"),
        (copied(run, tmp_path / "b", adapter__adapter_model_safetensors=half), None, ModelError, "is cut off", "copy it"),
        (copied(run, tmp_path / "c"), str(cut), ModelError, "the file is cut off", "copy it again"),
        (copied(run, tmp_path / "d"), str(other), ModelError, "this is not the base", "--base PATH"),
        (copied(run, tmp_path / "e"), str(tmp_path / "gone"), ModelError, "there is no folder", "--base FOLDER"),
        (copied(run, tmp_path / "g", adapter__adapter_config_json=began("pissa")), None, ModelError, "by PiSSA", "convert"),
        (copied(run, tmp_path / "h", adapter__adapter_config_json=began("olora")), None, ModelError, "by OLoRA", "convert"),
    ]  # fmt: skip
    for folder, base, kind, said, fix in cases:
        for to in ("merged", "adapter"):
            if folder == run.folder and to == "adapter":
                continue
            with pytest.raises(kind, match=said) as caught:
                export(open_run(folder, base), ExportRequest(to), quiet, cache)
            print(caught.value)
            assert fix in caught.value.fix
            if folder != run.folder:
                assert not (folder / "export").exists()
    with pytest.raises(
        StorageError, match=r"the export cannot be written: .*model.safetensors is a file, not a folder"
    ) as caught:
        export(run, ExportRequest("merged", file / "out"), quiet, cache)
    assert "--out" in caught.value.fix
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(100, 100, 1000))
    with pytest.raises(RunError, match=r"needs about 0.00 GB, but only 0.00 GB are free") as caught:
        export(open_run(copied(run, tmp_path / "f")), ExportRequest("merged"), quiet, cache)
    assert "--out FOLDER" in caught.value.fix
    assert {file.name: file.read_bytes() for file in merged[0].iterdir()} == before


@pytest.mark.slow
def test_a_run_with_one_base_says_so(peaky_llama, rows, cache, tmp_path, told):
    """A base that came quantised, and one that was never."""
    from nybble.model.base.load import load_base
    from nybble.recipe import ModelOptions
    from tests.conftest import small_tokenizer

    folder = tmp_path / "quantised"
    load_base(find_checkpoint(str(peaky_llama)), ModelOptions(), torch.bfloat16, torch.device("cpu"), tmp_path / "own")
    shutil.copytree(next((tmp_path / "own" / "base").iterdir()), folder)
    small_tokenizer().save_pretrained(folder)
    for base, words, only, other in (
        (folder, [], "dequantised", "original"),
        (peaky_llama, ["model.quantization=none"], "original", "dequantised"),
    ):
        out = tmp_path / only
        words = [
            f"model.path={base}",
            f"data.path={rows}",
            f"out={out}",
            "model.device=cpu",
            "model.dtype=float32",
            *words,
        ]
        words += ["data.max_length=128", "data.validation=0", "train.samples=0", "train.max_steps=3"]
        run = train(load_recipe(None, words), console=Console(quiet=True), cache=cache)
        with pytest.raises(ExportError, match=f"only the {only} base is possible") as caught:
            export(run, ExportRequest("merged", merge_base=other), told, cache)
        print(caught.value)
        artefact = export(run, ExportRequest("merged"), told, cache)
        report = json.loads((artefact / "parity.json").read_text())
        assert list(report["comparison"]["bases"]) == [only]
        assert "of its own answers" in report["comparison"]["what"]
        assert "quantization_config" not in json.loads((artefact / "config.json").read_text())
    text = told.export_text()
    assert "the run started from a checkpoint already stored as nf4" in " ".join(text.split())
    assert "the run trained on weights that were not quantised" in " ".join(text.split())


@pytest.mark.slow
def test_rope_scaling_survives(peaky_llama, rows, cache, tmp_path, quiet):
    words = [
        f"model.path={peaky_llama}",
        f"data.path={rows}",
        f"out={tmp_path / 'run'}",
        "model.device=cpu",
        "train.max_steps=3",
    ]
    words += ["model.dtype=float32", "data.max_length=128", "data.validation=4", "train.samples=0"]
    words += ["model.rope_scaling={rope_type: linear, factor: 4.0}"]
    run = train(load_recipe(None, words), console=quiet, cache=cache)
    for to in ("merged", "adapter"):
        folder = export(run, ExportRequest(to), quiet, cache)
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_parameters"]["factor"] == config["rope_scaling"]["factor"] == 4.0
        assert config["rope_scaling"]["rope_type"] == "linear"
    assert 'config=AutoConfig.from_pretrained(".")' in (folder / "README.md").read_text()


def test_an_adapter_folder_without_a_run_is_exported_with_assumptions(run, peaky_llama, cache, tmp_path, told):
    bare = tmp_path / "bare"
    shutil.copytree(run.adapter, bare)
    folder = export(open_run(bare, str(peaky_llama)), ExportRequest("merged", tmp_path / "out"), told, cache)
    text = " ".join(told.export_text().split())
    assert "no record of the base that the adapter was trained on: assuming this one" in text
    assert "assuming nf4, as in QLoRA; if it was trained on 16-bit weights, use --merge-base original" in text
    card = (folder / "README.md").read_text()
    assert "from a LoRA adapter for" in card
    assert "The adapter is assumed to be trained on 4-bit weights." in card


def test_a_bad_name_to_push_to_stops_an_export_before_it_begins(run, cache, tmp_path, quiet):
    with pytest.raises(HubError, match="is not a valid Hub name"):
        export(run, ExportRequest("merged", tmp_path / "out", repo="a b c"), quiet, cache)
    assert list(tmp_path.iterdir()) == []


def test_preflight_says_before_training_what_would_fail_after_it(peaky_llama, rows, quiet, tmp_path, monkeypatch):
    checkpoint = find_checkpoint(str(peaky_llama))
    config, tokenizer = load_config(checkpoint, None), load_tokenizer(peaky_llama)
    Preflight(("merged", "gguf"), ("Q8_0",), Converter())(config, tokenizer, tmp_path / "run")

    def refused(kind, said, config=config, tokenizer=tokenizer, quants=("Q8_0",)):
        with pytest.raises(kind, match=said) as caught:
            Preflight(("gguf",), quants, Converter())(config, tokenizer, tmp_path / "run")
        print(caught.value)
        assert caught.value.fix

    scaled = load_config(checkpoint, {"rope_type": "dynamic", "factor": 2.0})
    refused(ExportError, "does not support RoPE scaling of type dynamic", config=scaled)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    Preflight(("gguf",), ("Q8_0",), Converter())(load_config(checkpoint, yarn), tokenizer, tmp_path / "run")
    refused(ExportError, "not with beta_fast=16", config=load_config(checkpoint, {**yarn, "beta_fast": 16}))
    small = load_config(checkpoint, None)
    small.vocab_size = 100
    refused(ModelError, "but the model has embeddings for ids 0 to 99", config=small)
    odd = load_tokenizer(peaky_llama)
    from tokenizers import pre_tokenizers

    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    refused(ModelError, "rules \\(Whitespace\\) that cannot be written as GGUF", tokenizer=odd)
    monkeypatch.setenv("PATH", "")
    refused(ExportError, "llama-quantize, which is not on the PATH", quants=("Q4_K_M",))
    refused(ExportError, "no such type", quants=("Q9_9",))
    refused(ExportError, "--quant names no type", quants=())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(100, 100, 1000))
    refused(RunError, "GB are free")
    words = [f"model.path={peaky_llama}", f"data.path={rows}", f"out={tmp_path / 'run'}", "data.max_length=128"]
    with pytest.raises(RunError, match=r"export\.to=.* GB are free"):
        train(load_recipe(None, words), console=quiet, preflight=Preflight(("merged",), (), None))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_odd_name_of_a_run_breaks_no_line_of_its_modelfile(run, cache, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(targets, "has_llama_cpp", lambda: False)
    odd = tmp_path / "a\nSYSTEM b"
    shutil.copytree(run.folder, odd)
    wanted = ExportRequest("gguf", tmp_path / "gguf", quants=("Q8_0",), merge_base="original")
    folder = export(open_run(odd), wanted, quiet, cache, Converter())
    first, second, *_ = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert first == "FROM ./a_SYSTEM b-Q8_0.gguf"
    assert second.startswith("TEMPLATE")
    assert (folder / first.removeprefix("FROM ")).is_file()


def test_batches_of_a_resumed_run_are_prefetched_too(run, cache, quiet, tmp_path):
    begun = copied(run, tmp_path)
    shutil.rmtree(begun / "adapter")
    with pytest.raises(ExportError, match="no such type"):
        resume(begun, console=quiet, cache=cache, preflight=Preflight(("gguf",), ("Q9_9",), Converter()))


@pytest.mark.slow
def test_train_checks_the_export_first_and_exports_at_the_end(peaky_llama, rows, tmp_path):
    words = [
        peaky_llama,
        rows,
        f"out={tmp_path / 'run'}",
        "model.device=cpu",
        "model.dtype=float32",
        "data.max_length=128",
    ]
    words += ["data.validation=4", "train.samples=0", "train.max_steps=2", "export.to=[merged, gguf]"]
    done = nybble("train", *words, "model.rope_scaling={rope_type: dynamic, factor: 2.0}", home=tmp_path)
    print(done.stderr)
    assert done.returncode == 1
    assert "does not support RoPE scaling of type dynamic" in done.stderr
    assert not (tmp_path / "run").exists()
    done = nybble("train", *words, home=tmp_path)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert (tmp_path / "run" / "export" / "merged" / "model.safetensors").exists()
    assert (tmp_path / "run" / "export" / "gguf" / "run-Q8_0.gguf").exists()
    assert done.stderr == "", "libraries talk"
    again = nybble("export", tmp_path / "run", "--to", "merged", home=tmp_path)
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_a_derivative_of_llama_2_has_its_licence_and_corrected_settings(run, peaky_llama, cache, tmp_path, told):
    base = tmp_path / "Llama-2-7b-hf"
    shutil.copytree(peaky_llama, base)
    (base / "LICENSE.txt").write_text("LLAMA 2 COMMUNITY LICENSE AGREEMENT\n")
    (base / "USE_POLICY.md").write_text("# Llama 2 Acceptable Use Policy\n")
    settings = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_length": 4096,
    }
    (base / "generation_config.json").write_text(json.dumps({**settings, "do_sample": False}))
    folder = export(open_run(run.folder, str(base)), ExportRequest("merged", tmp_path / "out"), told, cache)
    text = " ".join(told.export_text().split())
    assert "temperature, top_p left out, which Transformers refuses to save without do_sample" in text
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2]
    assert saved["max_length"] == 4096
    assert not {"temperature", "top_p"} & saved.keys()
    assert (folder / "LICENSE.txt").read_text() == (base / "LICENSE.txt").read_text()
    assert (folder / "USE_POLICY.md").exists()
    assert (
        (folder / "Notice").read_text().startswith("Llama 2 is licensed under the LLAMA 2 Community License, Copyright")
    )
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["base_model"]) == ("llama2", "meta-llama/Llama-2-7b-hf")
    assert "https://ai.meta.com/llama/use-policy/" in card
    assert "Data it was trained on: licence unknown" in card


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"do_sample": True, "temperature": 0.6, "pad_token_id": -1}, None),
        ({"temperature": 0.6}, "temperature left out"),
        ({"temperature": 0.6, "num_beams": 1, "length_penalty": 0.8}, "left out, which Transformers refuses to save"),
        ({"max_new_tokens": -1}, "Transformers cannot read it (`max_new_tokens` must be greater than 0"),
    ],
    ids=["good", "greedy", "beams", "unreadable"],
)
def test_settings_that_transformers_refuses_are_corrected(peaky_llama, tmp_path, own, said):
    (tmp_path / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": [7]}))
    tokenizer = load_tokenizer(peaky_llama)
    settings, notice = generation_settings(tmp_path, tokenizer, choose_template(tokenizer, "auto", "alpaca"))
    settings.save_pretrained(tmp_path)
    assert said in notice if said else notice is None
    assert 2 in GenerationConfig.from_pretrained(tmp_path).eos_token_id


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("Llama-2-7b-chat-hf", {}, "llama2"),
        ("mine", {"LICENSE": "LLAMA 2 COMMUNITY LICENSE AGREEMENT"}, "llama2"),
        ("mine", {"LICENSE": "   Apache License\n Version 2.0"}, "apache-2.0"),
        ("Llama-2-7b-x", {"README.md": "---\nlicense: mit\n---\n"}, "mit"),
        ("mine", {"README.md": "---\n: [\n---\n", "LICENSE": "MIT License"}, "mit"),
        ("mine", {"README.md": "# no front matter"}, None),
        ("mine", {"README.md": "---\ndate: 2024-13-45\n---\n", "LICENSE": "MIT License"}, "mit"),
        ("mine", {"README.md": f"---\nlicense: mit\nx: {'9' * 5000}\n---\n"}, None),
        ("mine", {"README.md": "---\nx: !!timestamp y\n---\n"}, None),
        ("mine", {"README.md": f"---\nx: {'[' * 5000}\n---\n"}, None),
        ("mine", {"README.md": None, "LICENSE": "MIT License"}, "mit"),
    ],
)
def test_the_bases_licence_is_found(tmp_path, peaky_llama, name, files, found):
    folder = tmp_path / name
    shutil.copytree(peaky_llama, folder)
    for file, text in files.items():
        os.mkfifo(folder / file) if text is None else (folder / file).write_text(text)
    licence = find_licence(find_checkpoint(str(folder)))
    assert licence.name == found
    assert (licence.notice is None) == (found != "llama2")


@pytest.mark.parametrize(
    ("held", "said"), [("none", "a LoRA run on"), ("int8", "a QLoRA run on"), ("nf4", "a QLoRA run on")]
)
def test_a_card_says_how_the_base_was_stored(run, held, said):
    model = run.recipe.model.model_copy(update={"quantization": held})
    own = Run(run.folder, run.recipe.model_copy(update={"model": model}))
    comparison = Comparison(1, 2, "validation rows", 3.0, {"original": Divergence(0.1, 0.01, 3.1, 0.9)})
    licence = find_licence(find_checkpoint(model.path))
    card = write_card(Subject(own, "merged", "A model", "x", [], "original", None, licence, comparison, []))
    assert said in card
    assert f"was trained on {STORED[held]} weights" in card
    assert ("qlora" in yaml.safe_load(card.split("---")[1])["tags"]) == (held != "none")


def test_the_card_has_the_licence_of_the_data(run, tmp_path):
    (tmp_path / "alpaca_data.json").write_text("[]")
    data = run.recipe.data.model_copy(update={"path": str(tmp_path / "alpaca_data.json")})
    (line,) = data_licences(Run(run.folder, run.recipe.model_copy(update={"data": data})))
    assert "not for commercial use" in line


def test_a_card_shows_the_results_with_their_intervals(run, tmp_path):
    folder = copied(run, tmp_path)
    entry = {"mean": 0.4, "interval": [0.3, 0.5]}
    task = {"name": "arc_easy", "metric": "acc_norm", "rows": 50, "base": entry, "tuned": {**entry, "mean": 0.5},
            "difference": {"mean": 0.1, "interval": [0.02, 0.18]}, "verdict": "better", "p": 0.01}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps({"date": "2026-11-25", "tasks": [task]}))
    opened = open_run(folder)
    licence = find_licence(find_checkpoint(opened.recipe.model.path))
    card = write_card(Subject(opened, "adapter", "An adapter", "x", [], None, None, licence, None, []))
    assert "| arc_easy | 40.0% | 50.0% | +10.0 [+2.0, +18.0] | better |" in card
