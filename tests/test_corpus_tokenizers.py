"""Hostile tokenizers, templates, sizes and regular expressions: each refused in one sentence, in seconds and within memory."""

from __future__ import annotations

import shutil
import time

import pytest

from corpus.cases import held, sampled
from corpus.tokenizers import CASES, run


@pytest.mark.parametrize("case", sampled(CASES, 9))
def test_a_hostile_folder_is_refused_in_one_sentence(case, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    began = time.monotonic()
    outcome = run(case, folder)
    held(case, outcome)
    assert time.monotonic() - began < 30
    assert len(outcome.text) < 1500


def test_there_are_enough_cases():
    assert len(CASES) >= 150
