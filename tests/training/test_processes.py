"""Samples and benchmarks of a run of several processes: each takes a share, and what is written is what one process writes."""

from __future__ import annotations

import json

import pytest

from nybble.run.folder import open_run
from nybble.run.log import read_metrics
from tests.evaluate.test_evaluate import ARC, write_rows
from tests.forked import Forks

COMMON = [
    "model.device=cpu", "model.dtype=float32", "data.max_length=256", "data.validation=8", "train.max_steps=4",
    "train.evaluate_every=2", "train.learning_rate=5e-3", "train.samples=2",
]  # fmt: skip
SPLIT = {
    1: ["train.micro_batch=6", "train.accumulation=1"],
    2: ["train.processes=2", "train.micro_batch=3", "train.accumulation=1"],
    3: ["train.processes=3", "train.micro_batch=2", "train.accumulation=1"],  # one of them has no prompt to answer
}


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


def trained(forks, root, processes, *words):
    """What a run says of itself: samples, evaluations, losses."""
    root.mkdir()
    out = root / "run"
    ended = forks.run(root, [*words, f"out={out}", *COMMON, *SPLIT[processes]], None, processes)
    print((root / "said.txt").read_text())
    assert ended["status"] == 0
    run = open_run(out)
    lines = read_metrics(run)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return (
        samples,
        [line.model_dump() for line in lines if line.eval_loss is not None],
        [line.loss for line in lines if line.loss is not None],
    )


def held_against(one, several) -> None:
    assert all(one), "samples, evaluations and losses, none of them empty"
    assert several[0] == one[0], "the same answers, in the same order"
    assert [sample["step"] for sample in one[0]] == [2, 2, 4, 4]
    assert len({sample["prompt"] for sample in one[0]}) == 2
    assert [line.keys() for line in several[1]] == [line.keys() for line in one[1]]
    for line, other in zip(several[1], one[1], strict=True):
        for key, value in line.items():
            assert value is None or value == pytest.approx(other[key], abs=1e-5)
    assert several[2] == pytest.approx(one[2], abs=1e-5)


def test_sample_prompts_are_spread_over_processes(forks, tiny_llama, rows, cache, tmp_path):
    words = ["--cache", cache, "train", tiny_llama, rows]
    one, three = (trained(forks, tmp_path / str(count), count, *words) for count in (1, 3))
    held_against(one, three)


def test_a_base_that_is_spread_over_processes_is_trained_and_evaluated_as_one(forks, tiny_llama, rows, cache, tmp_path):
    """Of three processes one has no prompt to answer, and the others' answers differ in length."""
    words = ["--cache", cache, "train", tiny_llama, rows]
    one = trained(forks, tmp_path / "one", 1, *words)
    three = trained(forks, tmp_path / "three", 3, *words, "engine.weights=sharded", "engine.embedding=host")
    held_against(one, three)
    assert "are spread over 3 ranks" in (tmp_path / "three" / "said.txt").read_text()


@pytest.mark.slow
def test_benchmarks_are_spread_over_processes(forks, tiny_llama, rows, cache, tmp_path):
    benches = tmp_path / "benches"
    benches.mkdir()
    write_rows(benches / "arc_easy.validation.jsonl", ARC)
    words = ["--cache", cache, "train", tiny_llama, rows, "train.eval_tasks=[arc_easy]", f"train.eval_data={benches}"]
    one, two = (trained(forks, tmp_path / str(count), count, *words) for count in (1, 2))
    held_against(one, two)
    scores = [line["task/arc_easy"] for line in one[1]]
    assert len(scores) == 3
    assert any(0 < score < 1 for score in scores), "a score that a wrong order could not give"
