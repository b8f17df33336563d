"""The launcher of several processes, real ones: whatever ends one of them, there is one error, and nothing else is printed."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import nybble.distributed.spawn as spawn
from nybble.cli.defects import report
from nybble.distributed.failures import blamed, error_of, how_to_continue, stuck_error
from nybble.distributed.heartbeat import RECORD, TRAINING, Progress, read_progress
from nybble.distributed.reports import VARIABLE, LeftError, ProcessError, leave_error, read_report
from nybble.distributed.watch import Watch, find_stuck
from nybble.errors import NybbleError, RecipeError, TrainingError

WORKER = """
import os, signal, sys, time
from nybble import cli
from nybble.distributed.heartbeat import announce_wait, beat, rest
from nybble.errors import LostProcessError, RecipeError

rank = int(os.environ["RANK"])
begun = os.environ["NYBBLE_LAUNCHER"].partition(":")[2] + "/begun"
def fail_after_the_other():
    if rank:
        open(begun, "w").close()
    while not os.path.exists(begun):
        time.sleep(0.01)
    time.sleep(0.0 if rank else 0.01)
def work():
    {work}
cli.app = work
cli.main()
"""
ENDS = {
    "a fixable error in all": "raise RecipeError('no good', where='here', fix='nybble help')",
    "a fixable error in one, and its loss in the other": """
    fail_after_the_other()
    if rank: raise RecipeError('no good', where='here', fix='nybble help')
    raise RuntimeError('Connection reset by peer')""",
    "killed": "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)",
    "killed, and its loss in the other": """
    fail_after_the_other()
    if rank: os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError('Connection reset by peer')""",
    "killed, and its loss in the other explained": """
    fail_after_the_other()
    if rank: os.kill(os.getpid(), signal.SIGKILL)
    raise LostProcessError('another process has ended', fix='look there')""",
    "a defect, and its loss in the other explained": """
    fail_after_the_other()
    if rank: 1 / 0
    raise LostProcessError('another process has ended', fix='look there')""",
    "a crash": "os.kill(os.getpid(), signal.SIGSEGV) if not rank else time.sleep(60)",
    "an exit": "os._exit(3) if rank else time.sleep(60)",
    "a defect": "1 / 0 if rank else time.sleep(60)",
    "stopped": """
    for _ in range(20):
        beat(micro_batch=True); announce_wait(); time.sleep(0.05)
    if rank: os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)""",
    "asleep": """
    for _ in range(20):
        beat(micro_batch=True); announce_wait(); time.sleep(0.05)
    if not rank: announce_wait()
    time.sleep(60)""",
}
PID = rf"pid \d+ on {platform.node()}"
SAID = {
    "a fixable error in all": r"(in process 1: )?no good\n  where: here\n  fix:   nybble help",
    "a fixable error in one, and its loss in the other": r"in process 1: no good\n  where: here\n  fix:   nybble help",
    "killed": rf"process 1 was killed \(SIGKILL\)\n  where: {PID}\n  fix:   nybble train --resume \S+/run; "
    r"if nobody killed it, the machine ran out of memory \(dmesg tells\)",
    "an exit": rf"process 1 ended with exit status 3\n  where: {PID}\n  fix:   nybble train --resume \S+/run",
    "a crash": rf"process 0 was ended by signal SIGSEGV\n  where: {PID}\n  fix:   nybble train --resume \S+/run",
    "a defect": r"in process 1: ZeroDivisionError: division by zero",
    "stopped": r"process 1 made no progress for \d+ seconds, while the others waited for it: it is stopped \(SIGSTOP\)\n"
    rf"  where: {platform.node()}; all processes were ended\n  fix:   nybble train --resume \S+/run",
    "asleep": r"process 1 made no progress for \d+ seconds, while the others waited for it\n"
    rf"  where: {platform.node()}; all processes were ended\n  fix:   nybble train --resume \S+/run",
}
SAID["killed, and its loss in the other"] = SAID["killed, and its loss in the other explained"] = SAID["killed"]
SAID["a defect, and its loss in the other explained"] = SAID["a defect"]


@pytest.fixture(autouse=True)
def _own_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").touch()
    return folder


def launch(monkeypatch, work: str, run, patience: float = 60.0) -> int:
    script = WORKER.format(work=work.strip())
    monkeypatch.setattr(spawn, "module_command", lambda *words: [sys.executable, "-c", script])
    return spawn.run_processes(2, ["train"], run, patience)


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_process_there_is_one_error(end, monkeypatch, run, capfd):
    began, others = time.time(), psutil.Process().children()  # what other tests have left
    with pytest.raises((NybbleError, ProcessError)) as caught:
        launch(monkeypatch, ENDS[end], run, 2.0 if end in ("stopped", "asleep") else 60.0)
    print(caught.value)
    assert time.time() - began < 55, "the others end within a minute"
    assert re.fullmatch(SAID[end], str(caught.value))
    assert getattr(caught.value, "exit_code", 1) == (2 if "fixable" in end else 1)
    assert capfd.readouterr().err == "", "the processes leave it to the launcher"
    assert psutil.Process().children() == others, "all have ended"


def test_a_stop_that_the_processes_have_announced_is_no_error(monkeypatch, run, capfd):
    assert launch(monkeypatch, "sys.exit(130)", run) == 130
    assert launch(monkeypatch, "sys.exit(0)", run) == 0
    assert capfd.readouterr().err == ""


def test_the_traceback_of_another_process_is_in_the_file_of_its_defect(monkeypatch, run, tmp_path):
    with pytest.raises(ProcessError) as caught:
        launch(monkeypatch, ENDS["a defect"], run)
    told = report(caught.value, [str(run)])
    print(told)
    assert "unexpected error (ProcessError: in process 1: ZeroDivisionError: division by zero)" in told
    (file,) = run.glob("traceback-*.txt")
    assert re.search(r"in work\n+ZeroDivisionError: division by zero", file.read_text())


def failure(code: int, moment: int) -> ProcessFailure:
    found = ProcessFailure(0, 1, code, "")
    found.timestamp = moment
    return found


def test_the_first_failure_is_blamed_and_not_what_follows_from_it():
    fixable, lost = (
        LeftError("a", None, None, 1, "", False, 100.5),
        LeftError("b", None, None, 1, "Traceback", False, 100.2),
    )
    known = LeftError("c", None, None, 1, "", True, 100.1)
    assert blamed({0: failure(1, 100), 1: failure(-9, 100)}, {0: known, 1: None}) == 1
    assert blamed({0: failure(1, 100), 1: failure(1, 100)}, {0: known, 1: fixable}) == 1
    assert blamed({0: failure(1, 100), 1: failure(70, 100)}, {0: known, 1: lost}) == 1
    assert blamed({0: failure(1, 100), 1: failure(3, 101)}, {0: known, 1: None}) == 1
    assert blamed({0: failure(1, 100), 1: failure(-15, 100)}, {0: known, 1: None}) == 1
    assert blamed({0: failure(70, 100), 1: failure(-9, 100)}, {0: lost, 1: None}) == 1
    assert blamed({0: failure(70, 100), 1: failure(1, 100)}, {0: lost, 1: fixable}) == 1
    assert blamed({0: failure(-15, 100), 1: failure(70, 100)}, {0: None, 1: lost}) == 1
    assert blamed({0: failure(-9, 130), 1: failure(70, 100)}, {0: None, 1: lost}) == 1, "killed by the launcher"
    assert blamed({0: failure(-6, 101), 1: failure(1, 101)}, {0: None, 1: fixable}) == 1


def test_an_error_is_left_only_for_the_launcher_that_started_the_process(tmp_path, monkeypatch):
    error = RecipeError("bad", fix="good")
    assert not leave_error(error)
    monkeypatch.setenv(VARIABLE, f"1:{tmp_path}")  # its launcher was killed
    assert not leave_error(error)
    monkeypatch.setenv(VARIABLE, f"{os.getppid()}:{tmp_path / 'gone'}")
    assert not leave_error(error)
    monkeypatch.setenv(VARIABLE, f"{os.getppid()}:{tmp_path}")
    assert leave_error(error)
    found = read_report(tmp_path, 0).error(0)
    assert (str(found), found.exit_code) == (str(error), 2)
    (tmp_path / "0.error").write_text('{"what": "cut')
    assert read_report(tmp_path, 0) is None
    assert str(error_of({0: failure(1, 1)}, tmp_path, tmp_path, ["train"])).startswith(
        "process 0 ended with exit status 1\n"
    )


def test_how_a_run_is_continued_depends_on_what_is_left(tmp_path):
    run = tmp_path / "run"
    assert how_to_continue(run, ["train", "a b"]) == "nothing of the run was kept; start it again: nybble train 'a b'"
    run.mkdir()
    (run / "recipe.yaml").touch()
    assert how_to_continue(run, ["train"]) == f"nybble train --resume {run}"
    (run / "adapter").mkdir()
    assert how_to_continue(run, ["train"]) == f"training had ended, and its adapter is complete: nybble chat {run}"


def test_processes_that_nothing_tells_apart_are_all_named(tmp_path):
    alike = {rank: Progress(os.getpid(), TRAINING, 9 + rank, 5) for rank in range(2)}
    stuck = find_stuck(alike)
    assert stuck == {0: "", 1: ""}
    told = str(stuck_error(stuck, 600, 2, tmp_path, ["train"]))
    print(told)
    assert told.startswith("processes 0, 1 made no progress for 10 minutes\n")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    alike[1] = Progress(int(gone.stdout), TRAINING, 3, 4)
    assert find_stuck(alike) == {1: ""}


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


@pytest.mark.parametrize(("stage", "ended"), [(2, True), (1, False), (0, False)])
def test_the_watch_is_patient_before_the_first_micro_batch_and_blind_outside_training(stage, ended, tmp_path):
    worker = sleeper()
    try:
        (tmp_path / "0.progress").write_bytes(RECORD.pack(worker.pid, stage, 1, 1))
        watch = Watch(tmp_path, 1, 10.0)
        assert any(watch.look(1.0) for _ in range(20)) is ended
        assert bool(watch.stuck) is ended
        assert not ended or worker.wait(10) == -signal.SIGKILL
        assert ended or worker.poll() is None
    finally:
        worker.kill()
        worker.wait()


def test_the_watch_allows_ten_times_the_longest_pause_so_far(tmp_path):
    """A pause of 8 seconds, then one of 80 with a patience of 10; the next second is too many."""
    worker, file = sleeper(), tmp_path / "0.progress"
    try:
        watch = Watch(tmp_path, 1, 10.0)
        for beats, pause in ((1, 8), (2, 80)):
            file.write_bytes(RECORD.pack(worker.pid, 2, beats, 1))
            assert not watch.look(1.0)
            assert not any(watch.look(1.0) for _ in range(pause))
        assert worker.poll() is None
        assert read_progress(tmp_path) == {0: Progress(worker.pid, 2, 2, 1)}
        assert watch.look(1.0)
        assert worker.wait(10) == -signal.SIGKILL
    finally:
        worker.kill()
        worker.wait()


def test_a_file_that_is_not_yet_written_counts_as_none(tmp_path):
    (tmp_path / "1.progress").touch()
    assert read_progress(tmp_path) == {}
    watch = Watch(tmp_path, 1, 1.0)
    assert not any(watch.look(1.0) for _ in range(20))
    assert watch.stuck == {}
    assert isinstance(stuck_error({0: ""}, 5, 2, tmp_path, []), TrainingError)
