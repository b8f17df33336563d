"""examples/preference.py on the embedded model: what is preferred is learnt, and the skill stays."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LINE = re.compile(
    r"(sft|dpo)  prefers the shorter of two right answers in (\d+)% of 100 pairs .*?"
    r"(\d+) of 100 answers exactly right, (\d+) of them compact",
    re.DOTALL,
)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_dpo_teaches_what_is_preferred_and_keeps_the_skill(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "preference.py"), "--folder", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    print(ended.stdout, ended.stderr[-2000:])
    assert ended.returncode == 0
    found = {name: tuple(map(int, numbers)) for name, *numbers in LINE.findall(ended.stdout)}
    (before, right_before, compact_before), (after, right_after, compact_after) = found["sft"], found["dpo"]
    assert before <= 80
    assert after >= 90
    assert right_after >= right_before - 10
    assert compact_after >= 90 > compact_before
