"""Runs that are killed again and again end as one that was left alone: adapter, metrics, summary, and nothing beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nybble.files.atomic import LOCK, UNFINISHED, run_lock
from nybble.files.locks import PATIENCE
from nybble.run.folder import open_run
from nybble.run.log import read_metrics
from tests.corpus.kills import COMMON, CONFIGURATIONS, NAMED, Elapsed, Kill, Moment, Sequence, sequences
from tests.forked import Forks

ALL = sequences()


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed."""

    folder: pathlib.Path
    changes: int


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def wholes(forks, tiny_llama, rows, cache, tmp_path_factory):
    """The runs that were left alone, by configuration, each made when it is first wanted."""
    made: dict[str, Whole] = {}

    def whole(configuration: str) -> Whole:
        if configuration not in made:
            root = tmp_path_factory.mktemp("whole")
            ended = forks.run(root, begun(root, configuration, tiny_llama, rows, cache), None, count(configuration))
            assert ended["status"] == 0, (root / "said.txt").read_text()
            made[configuration] = Whole(root / "run", ended["changes"])
        return made[configuration]

    return whole


def count(configuration: str) -> int:
    return 2 if configuration == "two processes" else 1


def begun(root, configuration, model, data, cache) -> list[object]:
    return ["--cache", cache, "train", model, data, f"out={root / 'run'}", *COMMON, *CONFIGURATIONS[configuration]]


def moment(kill: Kill, whole: Whole) -> dict[str, Any]:
    """A kill of a sequence as the process that forks takes it."""
    if isinstance(kill, str):
        return dataclasses.asdict(NAMED[kill])
    share, seconds = kill
    return dataclasses.asdict(Elapsed(max(1, round(share * whole.changes)), seconds))


def sampled() -> list[Any]:
    """The fast suite takes one, of two kills."""
    quick = [sequence for sequence in ALL if sequence.configuration == "packed"][3:4]
    return [pytest.param(one, id=one.name, marks=() if one in quick else pytest.mark.slow) for one in ALL]


@pytest.mark.parametrize("sequence", sampled())
def test_a_run_that_is_killed_and_resumed_ends_like_an_uninterrupted_one(
    sequence: Sequence, forks, wholes, tiny_llama, rows, cache, tmp_path
):
    whole, processes, run = wholes(sequence.configuration), count(sequence.configuration), tmp_path / "run"
    begin = begun(tmp_path, sequence.configuration, tiny_llama, rows, cache)
    said, kills = tmp_path / "said.txt", 0
    for kill in [*sequence.kills, None]:
        words = ["--cache", cache, "train", "--resume", run] if (run / "recipe.yaml").exists() else begin
        if (run / "adapter").exists():
            break
        ended = forks.run(tmp_path, words, moment(kill, whole) if kill is not None else None, processes)
        kills += ended["status"] < 0
        assert ended["status"] <= 0, said.read_text()
    print(said.read_text())
    assert kills, "nothing was killed"
    assert (run / "adapter").exists()
    held_against(whole.folder, run, exact=processes == 1)
    if any(run.glob(f"{UNFINISHED}*{LOCK}")):
        time.sleep(PATIENCE)  # a lock without a name may be of a writer that is about to write it
    with run_lock(run, "evaluated"):  # the next that writes removes what the last kill left
        pass
    assert names(run) == names(whole.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "said.txt"]


def test_a_run_that_is_killed_while_it_tries_a_save_leaves_nothing_of_it(
    forks, wholes, tiny_llama, rows, cache, tmp_path
):
    whole, run = wholes("packed"), tmp_path / "run"
    killed = dataclasses.asdict(Moment("shutil.rmtree", r"/\.unfinished-trial$"))
    words = begun(tmp_path, "packed", tiny_llama, rows, cache)
    assert forks.run(tmp_path, words, killed)["status"] < 0
    assert (run / "checkpoints" / ".unfinished-trial" / "optimizer.pt").exists()
    ended = forks.run(tmp_path, ["--cache", cache, "train", "--resume", run])
    print((tmp_path / "said.txt").read_text())
    assert ended["status"] == 0
    held_against(whole.folder, run, exact=True)
    assert names(run) == names(whole.folder)


def held_against(whole: pathlib.Path, run: pathlib.Path, *, exact: bool) -> None:
    """Equal to the last bit; of two processes to the last digit, for gradients are added in either order."""
    lines = [[without_time(line.as_json()) for line in read_metrics(open_run(folder))] for folder in (run, whole)]
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, whole)]
    assert adapters[0].keys() == adapters[1].keys()
    if exact:
        assert lines[0] == lines[1]
        assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())
    else:
        assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
        for line, other in zip(*lines, strict=True):
            assert line == pytest.approx(other, rel=1e-6)
        assert all(torch.allclose(adapters[0][name], tensor, rtol=1e-6) for name, tensor in adapters[1].items())
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    for name in ("steps", "tokens", "kept_step", "data", "base", "adapter"):
        assert summaries[0][name] == summaries[1][name], name
    assert summaries[0]["seconds_in_steps"] > 0


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "seconds"}


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_there_are_sixty_over_eight_configurations():
    assert len(ALL) == 60
    assert {sequence.configuration for sequence in ALL} == set(CONFIGURATIONS)
    met = {kill for sequence in ALL for kill in sequence.kills if isinstance(kill, str)}
    assert met == set(NAMED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "killed",
    [
        Moment("open", r"^run/export/\.nybble-writing-\w+\.lock$"),
        Moment("os.mkdir", r"^run/export/\.nybble-writing-\w+$"),
        Moment("open", r"^run/export/\.nybble-writing-\w+/"),
        Moment("open", r"^run/export/\.nybble-writing-\w+/", 3),
        Moment("os.mkdir", r"^run/export/\.nybble-writing-\w+$", bytes=20_000),
        Moment("os.rename", r"^run/export/adapter$"),
        Moment("os.rename", r"^run/export/adapter$", later=1),
    ],
    ids=lambda moment: f"{moment.event} {moment.count} {moment.later} {moment.bytes}",
)
def test_what_a_killed_export_left_is_removed_by_the_next(killed, forks, wholes, cache, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(wholes("steps").folder, run)
    words = ["--cache", cache, "export", run, "--to", "adapter"]
    assert forks.run(tmp_path, words, dataclasses.asdict(killed))["status"] < 0
    if killed.later:
        words = [*words, "--out", run / "export" / "another"]
    ended = forks.run(tmp_path, words)
    said = (tmp_path / "said.txt").read_text()
    print(said)
    assert ended["status"] == 0
    assert sorted(path.name for path in (run / "export").iterdir()) == ["adapter", *["another"] * bool(killed.later)]
    assert names(run / "export" / "adapter") == names(run / "export" / "another") if killed.later else True
    assert "exists already" not in said


@pytest.mark.slow
def test_both_of_two_processes_skip_a_damaged_checkpoint(forks, wholes, tiny_llama, rows, cache, tmp_path):
    """Each looks for itself where the run goes on, and the first sets aside what both have passed over."""
    whole, run = wholes("two processes"), tmp_path / "run"
    killed = dataclasses.asdict(NAMED["before the adapter is there"])
    words = begun(tmp_path, "two processes", tiny_llama, rows, cache)
    assert forks.run(tmp_path, words, killed, 2)["status"] < 0
    newest = open_run(run).latest_checkpoint()
    for file in newest.glob("rng_state_1.pth"):
        file.write_bytes(bytes(file.stat().st_size))
    ended = forks.run(tmp_path, ["--cache", cache, "train", "--resume", run], None, 2)
    print((tmp_path / "said.txt").read_text())
    assert ended["status"] == 0
    held_against(whole.folder, run, exact=False)
    aside = f"set-aside-{newest.name}"
    assert names(run / "checkpoints" / aside) == names(run / "checkpoints" / newest.name)
    beside = [name for name in names(run) if aside not in name]
    assert beside == names(whole.folder)


LONG = [*COMMON, *CONFIGURATIONS["two processes"], "train.max_steps=60", "train.evaluate_every=20"]


PATIENCE_HERE = 6
WAITED = r"made no progress for \d+ seconds, while the others waited for it: it is stopped \(SIGSTOP\)"
ERRORS = {
    "the first process": r"error: process 0 was killed \(SIGKILL\)\n",
    "the second process": r"error: process 1 was killed \(SIGKILL\)\n",
    "the first process stops": rf"error: process 0 {WAITED}\n",
    "the second process stops": rf"error: process 1 {WAITED}\n",
}
"""What the launcher says."""


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["all of them", "the launcher", *ERRORS])
def test_a_run_under_a_launcher_is_killed_and_resumes(killed, forks, tiny_llama, rows, cache, tmp_path):
    """By real interpreters. Processes whose launcher is killed live on: nobody else may write their run meanwhile."""
    words = ["--cache", cache, "train", tiny_llama, rows, *LONG]
    whole = tmp_path / "whole"
    assert forks.run(tmp_path, [*words, f"out={whole}"], None, 2)["status"] == 0
    run, errors = tmp_path / "run", tmp_path / "errors.txt"
    with launched(*words, f"out={run}", "--processes", 2, errors=errors) as launcher:
        wait_for_lines(launcher, run / "metrics.jsonl", 25)
        workers = psutil.Process(launcher.pid).children(recursive=True)
        ranks = {int(worker.environ().get("RANK", "-1")): worker for worker in workers}
        if killed == "the launcher":
            ranks[0].suspend()  # a run of so few steps is over before another interpreter has begun
            launcher.kill()
            refused = forks.run(tmp_path, ["--cache", cache, "train", "--resume", run])
            assert refused["status"] == 1
            assert f"{run} is being trained by process {ranks[0].pid} on " in (tmp_path / "said.txt").read_text()
        ended = ranks["second" in killed]
        if killed.endswith("stops"):
            ended.suspend()
        for worker in {"all of them": [launcher, *workers], "the launcher": workers}.get(killed, [ended]):
            if not killed.endswith("stops"):
                worker.kill()
        status = launcher.wait(120)
        psutil.wait_procs(workers, timeout=60)
    print(told := errors.read_text())
    if killed in ERRORS:
        assert status == 1
        assert re.match(ERRORS[killed], told)
        assert f"  fix:   nybble train --resume {run}" in told
    assert told.count("error") == (killed in ERRORS), "nothing else is said"
    assert "Traceback" not in told
    assert not (run / "adapter").exists()
    with launched("--cache", cache, "train", "--resume", run, errors=errors) as launcher:
        assert launcher.wait(300) == 0
    assert errors.read_text() == ""
    held_against(whole, run, exact=False)
    assert names(run) == names(whole)


LAUNCHER = f"""
import nybble.cli, nybble.distributed.spawn as spawn
run_processes = spawn.run_processes
spawn.run_processes = lambda count, arguments, run: run_processes(count, arguments, run, {PATIENCE_HERE})
nybble.cli.main()
"""


@contextlib.contextmanager
def launched(*words: object, errors: pathlib.Path):
    """The command line, less patient than usual, in a session of its own; whatever is left of it is killed."""
    command = [sys.executable, "-c", LAUNCHER, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    with errors.open("w") as stream:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=stream
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_lines(process: subprocess.Popen[bytes], file: pathlib.Path, count: int) -> None:
    began = time.time()
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.time() - began < 200
        time.sleep(0.005)
