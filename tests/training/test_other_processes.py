"""A run that is resumed on another number of processes: the same steps, differently split, and the same numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from nybble.errors import NybbleError, RecipeError, RunError
from nybble.plan.schedule import split_among
from nybble.recipe import TrainOptions, dump_recipe, load_recipe
from nybble.run.folder import Run, open_run
from nybble.run.log import read_metrics
from nybble.run.split import on_processes, record_split
from nybble.run.start import halved_from, start_record, write_start
from nybble.training.checkpoints import processes_of
from tests.corpus.kills import CHECKPOINT, Moment
from tests.forked import Forks

COMMON = [
    "model.device=cpu", "model.dtype=float32", "data.max_length=256", "data.validation=8", "train.max_steps=8",
    "train.evaluate_every=2", "train.learning_rate=5e-3", "train.samples=0", "lora.r=4",
]  # fmt: skip
SIX = {
    1: ["train.micro_batch=6", "train.accumulation=1"],
    2: ["train.processes=2", "train.micro_batch=3", "train.accumulation=1"],
}
MARKED = dataclasses.asdict(Moment("os.rename", rf"{CHECKPOINT}/COMPLETE$", 2, later=1))
"""Killed after its second checkpoint, which a run has at its fourth step; or, resumed from there, at its eighth."""


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(forks, tiny_llama, rows, cache, tmp_path_factory):
    """One process, never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    words = ["--cache", cache, "train", tiny_llama, rows, f"out={root / 'run'}", *COMMON, *SIX[1]]
    assert forks.run(root, words)["status"] == 0, (root / "said.txt").read_text()
    return root / "run"


def held_against(whole, run, *, besides: str = "seconds") -> None:
    """Losses and evaluations within 1e-5."""
    lines, others = ([line.as_json() for line in read_metrics(open_run(folder))] for folder in (run, whole))
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, other in zip(lines, others, strict=True):
        for name in line.keys() - {"seconds", "scores", besides}:
            assert line[name] == pytest.approx(other[name], abs=1e-5), (line["step"], name)
    assert any("eval_loss" in line for line in lines)
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def continued(forks, root, cache, processes, moment=None):
    """Resume on so many processes; what was said."""
    (root / "said.txt").unlink()
    words = ["--cache", cache, "train", "--resume", root / "run", "--processes", processes]
    ended = forks.run(root, words, moment, processes)
    print(said := (root / "said.txt").read_text())
    assert (ended["status"] < 0) == (moment is not None)
    return said


def interrupted(forks, root, cache, model, rows, processes, *words) -> None:
    begin = ["--cache", cache, "train", model, rows, f"out={root / 'run'}", *COMMON, *SIX[processes], *words]
    assert forks.run(root, begin, MARKED, processes)["status"] < 0
    print((root / "said.txt").read_text())
    assert processes_of(open_run(root / "run").latest_checkpoint()) == processes


def test_two_processes_then_one(forks, whole, tiny_llama, rows, cache, tmp_path):
    interrupted(forks, tmp_path, cache, tiny_llama, rows, 2)
    said = continued(forks, tmp_path, cache, 1)
    assert "processes 2 -> 1: micro batch 3, accumulation 1 -> 2 (the same step)\n" in said
    assert "random numbers" not in said, "nothing is random here"
    assert "of 6 rows (micro batch 3, accumulation 2)" in said
    held_against(whole, tmp_path / "run")
    recorded = open_run(tmp_path / "run").recipe.train
    assert (recorded.processes, recorded.micro_batch, recorded.accumulation) == (1, 3, 2)
    start = open_run(tmp_path / "run").start()
    assert start.recipe.train["processes"] == 2, "start.json keeps the first split"
    assert halved_from(start, open_run(tmp_path / "run").recipe) is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["processes"], summary["micro_batch"], summary["halved_from"]) == (1, 3, None)


def test_one_process_then_two(forks, whole, tiny_llama, rows, cache, tmp_path):
    interrupted(forks, tmp_path, cache, tiny_llama, rows, 1)
    said = continued(forks, tmp_path, cache, 2)
    assert said.count("processes 1 -> 2: micro batch 6 -> 3, accumulation 1 (the same step)\n") == 1
    held_against(whole, tmp_path / "run")
    assert halved_from(open_run(tmp_path / "run").start(), open_run(tmp_path / "run").recipe) is None


@pytest.mark.slow
def test_two_processes_then_three_then_one(forks, whole, tiny_llama, rows, cache, tmp_path):
    interrupted(forks, tmp_path, cache, tiny_llama, rows, 2)
    again = {**MARKED, "count": 1}
    assert "processes 2 -> 3: micro batch 3 -> 2, accumulation 1 (the same step)\n" in continued(
        forks, tmp_path, cache, 3, again
    )
    assert processes_of(open_run(tmp_path / "run").latest_checkpoint()) == 3
    assert "processes 3 -> 1: micro batch 2, accumulation 1 -> 3 (the same step)\n" in continued(
        forks, tmp_path, cache, 1
    )
    held_against(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_changes_within_its_second_epoch(forks, tiny_llama, rows, cache, tmp_path):
    """Two epochs of 12 steps, killed after the checkpoint of step 14."""
    words = ["train.max_steps=null", "train.epochs=2", "train.evaluate_every=7"]
    (tmp_path / "whole").mkdir()
    out = tmp_path / "whole" / "run"
    begin = ["--cache", cache, "train", tiny_llama, rows, f"out={out}", *COMMON, *SIX[1], *words]
    assert forks.run(tmp_path / "whole", begin)["status"] == 0
    interrupted(forks, tmp_path, cache, tiny_llama, rows, 2, *words)
    assert open_run(tmp_path / "run").latest_checkpoint().name == "checkpoint-14"
    continued(forks, tmp_path, cache, 1)
    held_against(out, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["data.packing=true", "data.max_length=128"], ["engine.fused=false"]], ids=str)
def test_two_epochs_whose_last_steps_are_not_full(more, forks, tiny_llama, rows, cache, tmp_path):
    """71 rows in steps of 12: the last has eleven, and two of three processes get a micro batch of one row, or of none."""
    words = ["train.max_steps=null", "train.epochs=2", "train.evaluate_every=4", "data.validation=9", *more]
    splits = {1: (4, 3), 2: (3, 2), 3: (2, 2), 6: (2, 1)}
    for processes, (micro_batch, accumulation) in splits.items():
        split = [
            f"train.processes={processes}",
            f"train.micro_batch={micro_batch}",
            f"train.accumulation={accumulation}",
        ]
        root = tmp_path / str(processes)
        root.mkdir()
        begin = ["--cache", cache, "train", tiny_llama, rows, f"out={root / 'run'}", *COMMON, *words, *split]
        assert forks.run(root, begin, None, processes)["status"] == 0, (root / "said.txt").read_text()
        held_against(
            tmp_path / "1" / "run", root / "run", besides="tokens"
        )  # repeated rows are computed, if for nothing


def test_dropout_continues_with_other_numbers_which_is_said(forks, tiny_llama, rows, cache, tmp_path):
    interrupted(forks, tmp_path, cache, tiny_llama, rows, 2, "lora.dropout=0.1")
    shutil.copytree(tmp_path / "run", tmp_path / "again" / "run")
    (tmp_path / "again" / "said.txt").touch()
    what = "dropout and noise continue with other random numbers, since each process has its own: losses will differ a little"
    assert what in continued(forks, tmp_path, cache, 1)
    assert what not in continued(forks, tmp_path / "again", cache, 2)


def run_of(folder, *words: str) -> Run:
    recipe = load_recipe(None, ["model.path=a", "data.path=b", *words])
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return Run(folder, recipe)


@pytest.mark.parametrize(
    ("split", "processes", "expected"),
    [
        ((2, 1, 2), 1, (2, 2)),
        ((2, 2, 1), 2, (2, 1)),
        ((4, 1, 1), 2, (2, 1)),
        ((3, 1, 2), 3, (2, 1)),
        ((2, 1, 3), 1, (2, 3)),
        ((4, 5, 1), 4, (1, 5)),  # five rows for each
        ((4, 4, 1), 16, (1, 1)),
        ((4, 4, 1), 32, None),
        ((3, 1, 2), 4, None),
    ],
)
def test_the_micro_batch_is_never_raised_and_the_step_stays(split, processes, expected):
    micro_batch, accumulation, before = split
    train = TrainOptions(micro_batch=micro_batch, accumulation=accumulation, processes=before)
    assert split_among(train, processes) == expected
    if expected is not None:
        assert expected[0] * expected[1] * processes == micro_batch * accumulation * before
        assert expected[0] <= micro_batch


def test_what_cannot_be_divided_is_refused_with_what_can(tmp_path):
    run = run_of(tmp_path / "run", "train.micro_batch=3", "train.accumulation=1", "train.processes=2")
    with pytest.raises(RunError) as caught:
        on_processes(run, 4)
    print(caught.value)
    assert caught.value.what == "a step of this run has 6 rows, which cannot be divided among 4 processes"
    assert caught.value.where == f"{run.folder}/recipe.yaml (micro_batch 3 x accumulation 1 x processes 2)"
    assert caught.value.fix == f"nybble train --resume {run.folder} --processes N, where N is one of 1, 2, 3, 6"
    assert on_processes(run, None) is run
    assert on_processes(run, 2) is run
    assert open_run(run.folder).recipe.train.processes == 2, "nothing was written"


def test_back_on_the_first_number_of_processes_the_first_split_is_there_again(tmp_path):
    run = run_of(tmp_path / "run", "train.micro_batch=6", "train.accumulation=1")
    write_start(run.folder / "start.json", start_record(run.recipe, "data", "base", None), {})
    splits = []
    for processes in (2, 1):
        run = on_processes(run, processes)
        record_split(run)
        run = open_run(run.folder)
        splits.append((run.recipe.train.micro_batch, run.recipe.train.accumulation))
    assert splits == [(3, 1), (6, 1)]
    assert halved_from(run.start(), run.recipe) is None


def test_an_option_for_several_processes_is_refused_for_one(tmp_path):
    run = run_of(tmp_path / "run", "train.processes=2", "engine.weights=sharded")
    with pytest.raises(RecipeError) as caught:
        on_processes(run, 1)
    print(caught.value)
    assert "engine.weights: sharded spreads weights over several processes" in str(caught.value)
    assert caught.value.where == "--processes 1"
    assert caught.value.fix == f"nybble train --resume {run.folder}"


def test_the_command_line_takes_no_other_option_with_resume(here, tmp_path):
    run = run_of(tmp_path / "run", "train.micro_batch=3", "train.accumulation=1")
    refused = here("train", "--resume", run.folder, "--processes", 2)
    assert refused.returncode == 1
    assert "a step of this run has 3 rows, which cannot be divided among 2 processes" in refused.stderr
    refused = here("train", "--resume", run.folder, "--processes", 3, "--vram", "8GB")
    assert refused.returncode == NybbleError.exit_code + 1
    assert "takes no other option than --processes" in refused.stderr
