"""A plain prompt is the same token ids from the server, the run's tokenizer and every artefact."""

from __future__ import annotations

import shutil

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from nybble.export.export import ExportRequest, export
from nybble.export.gguf.vocabulary import read_vocabulary
from nybble.serve.loading import load_pipeline
from tests.conftest import tuned, write_llama
from tests.local_server import serving

TEXTS = ("Once upon a time", " two  spaces\n\tand a tab", "1234567 Wörter \U0001f642")


@pytest.fixture(scope="module")
def smollm2_like(smollm2, tmp_path_factory):
    """SmolLM2's own tokenizer, which puts no BOS before a text although it names one; random weights, two layers."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "smollm2-like", vocab_size=49152)
    for file in smollm2.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(smollm2 / "chat_template.jinja", folder)
    return folder


def check(folder, rows, cache, out, monkeypatch, *, begins):
    """Train, export and serve on a base whose tokenizer begins a text with BOS, or does not."""
    run = tuned(folder, rows, out / "run", 3, cache)
    merged = AutoTokenizer.from_pretrained(export(run, ExportRequest("merged"), Console(quiet=True), cache))
    own = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    assert merged.bos_token_id is not None
    assert read_vocabulary(own, len(own)).add_bos == begins, "what a GGUF file says of it"
    with serving(lambda metrics: load_pipeline([run], metrics, device="cpu", queue=8, cache=cache)) as server:
        seen = []
        submit = server.engine.worker.submit
        monkeypatch.setattr(
            server.engine.worker, "submit", lambda asked, sinks: seen.extend(asked) or submit(asked, sinks)
        )
        answer = server.post("/v1/completions", model="run", prompt=list(TEXTS), max_tokens=1)
        assert answer.status_code == 200, answer.text
    for text, served in zip(TEXTS, seen, strict=True):
        assert served.prompt == merged(text)["input_ids"] == own(text)["input_ids"]
        assert (served.prompt[0] == own.bos_token_id) == begins


@pytest.mark.parametrize(
    "llama2_like", ["fast-safetensors", pytest.param("llama-bin", marks=pytest.mark.slow)], indirect=True
)
def test_a_base_whose_tokenizer_puts_bos_keeps_it(llama2_like, rows, cache, tmp_path, monkeypatch):
    check(llama2_like, rows, cache, tmp_path, monkeypatch, begins=True)


def test_a_base_whose_tokenizer_puts_none_gets_none(smollm2_like, rows, cache, tmp_path, monkeypatch):
    check(smollm2_like, rows, cache, tmp_path, monkeypatch, begins=False)
