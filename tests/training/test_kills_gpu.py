"""Processes of a run over NCCL, one per GPU, one of which is killed or stops: the others end soon, and the run resumes."""

from __future__ import annotations

import re
import time

import psutil
import pytest
import torch

from nybble.run.folder import open_run
from nybble.run.log import read_metrics
from tests.training.test_kills import ERRORS, launched, wait_for_lines

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several GPUs")]

PROCESSES = torch.cuda.device_count()
STEPS, LEFT = 300, 100  # with rank 64 the optimiser's state is paged, as it is in real runs
OPTIONS = ["model.dtype=float32", "data.max_length=256", "data.validation=8", "train.micro_batch=2", "train.accumulation=2",
           "train.samples=0", "lora.r=64", f"train.max_steps={STEPS}", "train.evaluate_every=50"]  # fmt: skip
SOON = {"kill": 60, "suspend": 120}
"""Seconds within which the others end; one that hangs is waited for ten times as long as the longest pause so far."""


@pytest.fixture(scope="module", params=["device", "sharded"])
def whole(request, tiny_llama, rows, cache, tmp_path_factory):
    """A run that was left alone, and the words that begin another like it."""
    folder = tmp_path_factory.mktemp("whole")
    words = ["--cache", cache, "train", tiny_llama, rows, *OPTIONS, f"engine.weights={request.param}"]
    words += ["--processes", PROCESSES]
    with launched(*words, f"out={folder / 'run'}", errors=folder / "errors.txt") as launcher:
        assert launcher.wait(200) == 0, (folder / "errors.txt").read_text()
    return folder / "run", words


@pytest.mark.parametrize("ended", ERRORS)
def test_the_others_end_and_the_run_resumes(ended, whole, cache, tmp_path):
    alone, words = whole
    run, errors = tmp_path / "run", tmp_path / "errors.txt"
    with launched(*words, f"out={run}", errors=errors) as launcher:
        wait_for_lines(launcher, run / "metrics.jsonl", LEFT)
        workers = psutil.Process(launcher.pid).children(recursive=True)
        ranks = {
            int(worker.environ().get("RANK", "-1")): worker for worker in reversed(workers)
        }  # helpers of a rank come later
        began = time.perf_counter()
        how = "suspend" if ended.endswith("stops") else "kill"
        getattr(ranks["second" in ended], how)()
        assert launcher.wait(150) == 1
        psutil.wait_procs(workers, timeout=60)
        took = time.perf_counter() - began
    print(took, told := errors.read_text())
    assert took < SOON[how]
    assert re.match(ERRORS[ended], told)
    assert told.count("error") == 1, "nothing else is said"
    with launched("--cache", cache, "train", "--resume", run, errors=errors) as launcher:
        assert launcher.wait(200) == 0, errors.read_text()
    lines, wanted = (read_metrics(open_run(folder)) for folder in (run, alone))
    assert [line.step for line in lines] == [line.step for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        assert line.loss == pytest.approx(other.loss, rel=1e-3)
