"""Hostile tokenizers, templates, sizes and regular expressions: each refused in one sentence, in seconds and within memory."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.corpus.cases import held, nybble, sampled
from tests.corpus.tokenizers import CASES, run


@pytest.mark.parametrize("case", sampled(CASES, 8))
def test_a_hostile_folder_is_refused_in_one_sentence(case, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    began = time.monotonic()
    outcome = run(case, folder)
    held(case, outcome)
    assert time.monotonic() - began < 30
    assert len(outcome.text) < 1500


@pytest.mark.parametrize(
    "name",
    ["tokenizer-cut-tokenizer.json", "tokenizer-pipe-tokenizer_config.json", "tokenizer-id-4e9", "template-times",
     "template-syntax", "config-layers", "config-kernel"],
)  # fmt: skip
def test_the_command_line_reports_it_too(name, tiny_llama, rows, cache, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    case = next(case for case in CASES if case.name == name)
    case.make(folder)
    held(case, nybble("data", "check", rows, folder, cache=cache))


def test_there_are_enough_cases():
    assert len(CASES) >= 150
