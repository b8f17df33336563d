"""Runs and new folders are locked while they are written, by real processes; what killed ones left half-made is removed."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from nybble.errors import ExportError, RunError
from nybble.files.atomic import (
    ABANDONED_AFTER,
    LOCK,
    UNFINISHED,
    new_folder,
    refuse_busy,
    remove_unfinished_folders,
    replacing,
    run_lock,
)
from nybble.files.locks import PATIENCE, Holder, hold, holder, kernel
from nybble.files.outputs import check_export
from nybble.files.writing import write_text
from nybble.run.folder import open_run
from tests.files.disks import as_somebody_without_a_home, read_only

LOCKED = """
import pathlib, sys
from nybble.files.atomic import new_folder, run_lock
what, place = sys.argv[1], pathlib.Path(sys.argv[2])
with run_lock(place, "trained") if what == "run" else new_folder(place) as folder:
    if folder:
        (folder / "half").write_bytes(bytes(1000))
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(what: str, place: pathlib.Path):
    """A process that writes a run, or makes a new folder, until its input ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKED, what, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()  # waits, and closes the pipes


def age(*places: pathlib.Path) -> None:
    """As if nothing had changed for longer than anything is waited for."""
    for place in places:
        for path in (place, *place.rglob("*")):
            os.utime(path, (1e9, time.time() - ABANDONED_AFTER - 60))


def test_a_run_that_is_being_written_is_refused_with_the_writer_and_one_whose_writer_died_is_accepted(tmp_path, here):
    (tmp_path / "recipe.yaml").write_text("model:\n  path: m\ndata:\n  path: d\n")
    with another_process("run", tmp_path) as process:
        for words in (["train", "--resume", tmp_path], ["eval", tmp_path]):
            done = here(*words)
            print(done.stderr)
            assert done.returncode == 1
            assert done.stderr.startswith(f"error: {tmp_path} is being trained by process {process.pid} on ")
            assert f"kill -INT {process.pid}" in done.stderr.split("fix:")[1]
        with pytest.raises(RunError, match=f"is being trained by process {process.pid} on .*, since 2"):  # noqa: SIM117
            with run_lock(tmp_path, "evaluated"):
                pass
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
        process.kill()
        process.wait()
    assert (tmp_path / LOCK).exists(), "what a killed process leaves"
    refuse_busy(tmp_path)
    with run_lock(tmp_path, "evaluated"):
        assert holder(tmp_path / LOCK).pid == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_run_that_is_being_trained_says_so_when_its_adapter_is_needed(tuned_run, tmp_path, here, quiet, cache):
    """The reader says that it is trained, not that it should be resumed; afterwards that."""
    for name in ("recipe.yaml", "start.json", "template.json"):
        (tmp_path / name).write_bytes((tuned_run.folder / name).read_bytes())
    commands = (["chat", tmp_path, "--prompt", "x"], ["export", tmp_path, "--to", "adapter"], ["serve", tmp_path])
    commands += (["eval", tmp_path, "--tasks", "none"],)
    with another_process("run", tmp_path) as process:
        for words in commands:
            done = here(*words)
            print(done.stderr)
            assert done.returncode == 1
            assert f"is being trained by process {process.pid}" in done.stderr
    for words in commands:
        done = here(*words)
        assert done.returncode == 1
        assert "its training has not ended" in done.stderr
        assert f"nybble train --resume {tmp_path}" in done.stderr
    assert not (tmp_path / "export").exists()


def test_reading_a_finished_run_needs_no_lock_and_no_writable_folder(tuned_run, here):
    """Two chats beside an evaluation of the same run; then from a file system that is read-only."""
    chat = ["chat", tuned_run.folder, "--prompt", "say one", "--max-new-tokens", "3"]
    with another_process("run", tuned_run.folder):
        assert here(*chat).returncode == 0
    with read_only(tuned_run.folder):
        done = here(*chat)
        assert done.returncode == 0, done.stderr


def test_a_path_to_which_another_process_exports_is_refused_before_any_work(tuned_run, tmp_path, here):
    target = tmp_path / "out"
    with another_process("folder", target) as process:
        done = here("export", tuned_run.folder, "--to", "merged", "--out", target)
        print(done.stderr)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {target} is being written by process {process.pid} on ")
        check_export(tmp_path / "another")
        process.communicate("")
    assert (target / "half").exists()
    with pytest.raises(ExportError, match="out exists already"):
        check_export(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_when_two_processes_make_the_same_folder_the_second_leaves_nothing(tmp_path):
    def overtaken() -> None:
        with new_folder(tmp_path / "out") as first:
            (first / "a").touch()
            with new_folder(tmp_path / "out") as second:
                (second / "b").touch()

    with pytest.raises(FileExistsError):
        overtaken()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/b"]


def test_folders_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path):
    with another_process("folder", tmp_path / "dead") as dead:
        dead.kill()
        dead.wait()
        left = sorted(path.name for path in tmp_path.iterdir())
        assert len(left) == 2
        with another_process("folder", tmp_path / "living"):
            kept = {path.name for path in tmp_path.iterdir()}
            assert len(kept) == 2
            assert not kept & set(left), "the next that makes a folder there removes what is dead"
            age(tmp_path)
            with new_folder(tmp_path / "mine"):
                pass
            assert {path.name for path in tmp_path.iterdir()} == kept | {"mine"}, "however old: its process lives"


def foreign(folder: pathlib.Path, **changes: object) -> None:
    """What another process of another kind has there."""
    (folder / f"{UNFINISHED}x").mkdir(parents=True)
    (folder / f"{UNFINISHED}x" / "half").touch()
    held = Holder(1, "node7", "another-kernel", "written", str(folder / "x"), "2026-01-01 00:00:00")
    (folder / f"{UNFINISHED}x{LOCK}").write_text(json.dumps({**held.__dict__, **changes}))


@pytest.mark.parametrize("damage", ["another machine's", "not a holder", "empty", "no lock at all"])
def test_a_folder_of_an_unknown_writer_is_removed_only_after_a_day_without_changes(damage, tmp_path):
    foreign(tmp_path)
    lock = tmp_path / f"{UNFINISHED}x{LOCK}"
    if damage == "not a holder":
        lock.write_text('{"pid": 1}')
    elif damage == "empty":
        lock.write_text("")
    elif damage == "no lock at all":
        lock.unlink()
    remove_unfinished_folders(tmp_path)
    assert (tmp_path / f"{UNFINISHED}x").exists()
    age(tmp_path)
    (tmp_path / f"{UNFINISHED}x" / "half").touch()  # somebody goes on writing into it
    remove_unfinished_folders(tmp_path)
    assert (tmp_path / f"{UNFINISHED}x").exists()
    age(tmp_path)
    remove_unfinished_folders(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_writer_killed_before_it_wrote_its_name_is_removed_after_a_moment(tmp_path):
    lock = tmp_path / f"{UNFINISHED}x{LOCK}"
    lock.touch()
    remove_unfinished_folders(tmp_path)
    assert lock.exists(), "its writer may be about to write"
    with FileLock(lock, fallback_to_soft=False):
        a_second_old(lock)
        remove_unfinished_folders(tmp_path)
        assert lock.exists(), "it is held"
    lock.touch()  # a release may remove it
    a_second_old(lock)
    remove_unfinished_folders(tmp_path)
    assert list(tmp_path.iterdir()) == []


def a_second_old(file):
    before = time.time() - PATIENCE
    os.utime(file, (before, before))


def test_files_that_are_not_nybbles_are_kept_whatever_their_age(tmp_path):
    for name in (".writing-abcdefgh", ".cache", "nybble-writing-x"):
        (tmp_path / name).mkdir()
    for name in (".a.writing", ".a.12345678.writing~", "a.12345678.writing.json", ".x.lock"):
        (tmp_path / name).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (tmp_path / f"{UNFINISHED}link").symlink_to(outside)
    before = sorted(path.name for path in tmp_path.iterdir())
    age(tmp_path)
    with new_folder(tmp_path / "new"), replacing(tmp_path / "file") as file:
        file.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "new", "file"])
    assert (outside / "kept").exists()


def test_files_that_a_killed_process_left_unfinished_are_removed_by_the_next(tmp_path):
    for folder in (tmp_path, tmp_path / "checkpoints" / "checkpoint-2"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".state.0123abcd.writing.json").write_text("{")
    write_text(tmp_path / "state.json", "{}")
    assert (tmp_path / ".state.0123abcd.writing.json").exists(), "somebody may be writing it"
    with run_lock(tmp_path, "resumed"):  # nobody may
        assert not list(tmp_path.rglob(".state.*"))
    (tmp_path / ".state.0123abcd.writing.json").write_text("{")
    age(tmp_path)
    write_text(tmp_path / "other.json", "{}")
    assert not list(tmp_path.rglob(".state.*"))


def test_a_file_system_without_locks_is_written_to_without_them(tmp_path, monkeypatch):
    """As NFS without its lock daemon answers; there is none to be mounted here."""

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with run_lock(tmp_path, "trained"), run_lock(tmp_path, "evaluated"):
        refuse_busy(tmp_path)
    with new_folder(tmp_path / "new") as folder:
        (folder / "a").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    foreign(tmp_path, kernel=kernel())
    remove_unfinished_folders(tmp_path)
    assert (tmp_path / f"{UNFINISHED}x").exists(), "that its maker is dead cannot be known"


def test_a_lock_of_another_user_is_seen_though_its_file_cannot_be_written(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model:\n  path: m\ndata:\n  path: d\n")
    for folder in (run, tmp_path):
        folder.chmod(0o777)
    for parent in tmp_path.parents:  # pytest's own are closed to others
        parent.chmod(parent.stat().st_mode | 0o011)
    words = ("--cache", "/tmp/nybble-cache-of-somebody", "eval", run)
    with another_process("run", run) as process:
        done = as_somebody_without_a_home(*words)
        print(done.stderr)
        assert f"is being trained by process {process.pid}" in done.stderr


def test_the_lock_ends_with_an_error_and_with_a_signal(tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path / LOCK, "trained", tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with another_process("run", tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        process.wait()
    with hold(tmp_path / LOCK, "trained", tmp_path):
        pass


def test_a_pipe_at_a_locks_path_names_no_holder(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with hold(tmp_path / LOCK, "trained", tmp_path):
        assert holder(tmp_path / LOCK).pid == 0


FORKED = """
import os, pathlib, sys, time
from nybble.files.atomic import run_lock
with run_lock(pathlib.Path(sys.argv[1]), "trained"):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(100)
"""


def test_a_child_that_a_writer_forked_does_not_keep_its_lock(tmp_path):
    """As workers of multiprocessing, which may live on when their parent is killed."""
    process = subprocess.Popen([sys.executable, "-c", FORKED, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        process.stdout.close()
        os.kill(child, 0)
        assert holder(tmp_path / LOCK) is None
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_run_can_be_exported_to_two_paths_at_once(tuned_run, tmp_path):
    """Different targets do not hinder each other."""
    with another_process("folder", tmp_path / "merged"):
        check_export(tmp_path / "gguf")
        assert open_run(tuned_run.folder).adapter.exists()


def test_a_folder_that_is_finished_while_its_age_is_read_disturbs_nobody(tmp_path, monkeypatch):
    unfinished = tmp_path / ".nybble-writing-1"
    (unfinished / "inner").mkdir(parents=True)
    (unfinished / "inner" / "file").touch()
    scan = os.scandir

    def finished_before(path="."):
        if pathlib.Path(path) == unfinished and unfinished.exists():
            unfinished.rename(tmp_path / "entry")
        return scan(path)

    monkeypatch.setattr(os, "scandir", finished_before)
    remove_unfinished_folders(tmp_path)
    assert (tmp_path / "entry" / "inner" / "file").exists()
