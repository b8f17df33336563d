"""Damaged caches mend themselves: the same numbers as before, one line that says so, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from datasets.arrow_writer import ArrowWriter

from nybble.data.sets.prepare import prepare
from nybble.errors import StorageError
from nybble.evaluate.scores import Scored, Store
from nybble.files import cache as kept
from nybble.files.atomic import UNFINISHED
from nybble.model.base.checkpoint import find_checkpoint, fingerprint
from nybble.model.base.load import load_base
from nybble.recipe import DataOptions, ModelOptions
from tests.conftest import WORDS, small_tokenizer, tuned, write_llama
from tests.corpus.caches import CASES, MENDED, cut, entry, flipped, zeroed
from tests.corpus.cases import Case, nybble, sampled
from tests.files.disks import read_only

SCORED = Scored("t", "acc", True, "1", 0, 2, "Hub", [1.0, float("nan")], ["t", "t"], ["x", "y"])


class Filled:
    """A cache with an entry in each of its folders, and what its users return."""

    def __init__(self, model: pathlib.Path, rows: pathlib.Path, cache: pathlib.Path) -> None:
        self.model, self.rows, self.cache = model, rows, cache

    def use(self, room: str) -> object:
        """What the user of a cache folder returns."""
        checkpoint = find_checkpoint(str(self.model))
        if room == "digests":
            return fingerprint(checkpoint, self.cache)
        if room == "evaluations":
            return Store(self.cache / room).scored({"model": str(self.model)}, lambda: SCORED)[0].texts
        if room == "tokens":
            options = DataOptions(path=str(self.rows), validation=0, max_length=128)
            data = prepare(options, small_tokenizer(), 0, self.cache)
            return data.fingerprint, data.counts, list(data.train)
        options = ModelOptions(path=str(self.model), quantization="nf4")
        base = load_base(checkpoint, options, torch.float32, torch.device("cpu"), self.cache)
        for notice in base.notices:
            logging.getLogger("base").warning(notice)
        ids = torch.arange(3, 67).reshape(2, 32)
        return base.bits, base.model(input_ids=ids).logits.tolist()


@pytest.fixture(scope="module")
def filled(tiny_llama, rows, tmp_path_factory) -> pathlib.Path:
    """Two caches, the second of another model and other rows."""
    folder = tmp_path_factory.mktemp("caches")
    shutil.copytree(tiny_llama, folder / "model")
    shutil.copy(rows, folder / "rows.jsonl")
    write_llama(folder / "other-model", initializer_range=0.1)
    row = {"instruction": "say", "output": WORDS[0]}
    (folder / "other.jsonl").write_text(json.dumps(row) + "\n")
    for room in MENDED:
        Filled(folder / "model", folder / "rows.jsonl", folder / "cache").use(room)
        Filled(folder / "other-model", folder / "other.jsonl", folder / "other").use(room)
    return folder


@pytest.fixture(scope="module")
def wanted(filled) -> dict[str, object]:
    whole = Filled(filled / "model", filled / "rows.jsonl", filled / "cache")
    return {room: whole.use(room) for room in MENDED}


def test_there_are_many() -> None:
    assert len(CASES) >= 120


@pytest.mark.parametrize("case", sampled(CASES, 8))
def test_a_damaged_cache_repairs_itself(case: Case, filled, wanted, tmp_path, caplog) -> None:
    for name in ("cache", "other"):
        shutil.copytree(filled / name, tmp_path / name)
    case.make(tmp_path)
    room = case.name.partition(":")[0]
    damaged = Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache")
    assert damaged.use(room) == wanted[room]
    told = [record.getMessage() for record in caplog.records]
    print(*told, sep="\n")
    assert len(told) == 1, told
    assert "\n" not in told[0]
    assert all(name in told[0] for name in case.names)
    caplog.clear()
    assert damaged.use(room) == wanted[room]
    assert not caplog.records, "it was not mended"
    assert not [file for file in tmp_path.rglob(".*") if "writing" in file.name or "damaged" in file.name]


@pytest.mark.parametrize("room", ["base", "tokens"])
def test_what_is_not_damage_is_not_reported(room, filled, wanted, tmp_path, caplog) -> None:
    shutil.copytree(filled / "cache", tmp_path / "cache")  # other inodes and times
    (entry(tmp_path, room) / ".DS_Store").write_text("x")
    for file in entry(tmp_path, room).iterdir():
        os.utime(file, (0, 0))
    before = sorted((file.name, file.stat().st_ino) for file in entry(tmp_path, room).iterdir())
    assert Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache").use(room) == wanted[room]
    assert not caplog.records
    assert before == sorted((file.name, file.stat().st_ino) for file in entry(tmp_path, room).iterdir())


@pytest.mark.parametrize("room", ["base", "tokens"])
def test_entries_that_cannot_be_removed_are_skipped(room, filled, wanted, tmp_path, caplog) -> None:
    shutil.copytree(filled / "cache", tmp_path / "cache")
    place = entry(tmp_path, room)
    (place / "manifest.json").unlink()
    damaged = Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache")
    with read_only(place):
        for said in (
            "there is no manifest.json, which versions before 0.7 did not write) and ",
            f"cannot be removed: {place}.2 is used instead",
        ):
            assert damaged.use(room) == wanted[room]
            (told,) = caplog.messages
            assert MENDED[room] in told
            assert said in told
            caplog.clear()


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["folder", "manifest", "file"])
def test_an_entry_that_this_user_may_not_read_is_replaced(tmp_path, closed) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.owner() == "root" and parent != pathlib.Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    with another_user():
        place = tmp_path / "room" / "entry"
        for word in ("first", "second"):
            found = kept.find(place)
            assert found.facts is None
            with kept.new_entry(found.path) as temporary:
                (temporary / "file").write_text(word)
                kept.seal(temporary, found.path, {"word": word})
            assert kept.find(place).facts == {"word": word}
            {"folder": place, "manifest": place / "manifest.json", "file": place / "file"}[closed].chmod(0)
        found = kept.find(place)
        print(found.fault)
        assert "cannot be read" in found.fault
        assert found.path == place
        assert not place.exists()


ROUNDS, PROCESSES = 4, 4


def hammer(damaged: Filled, room: str, wanted: object, start, done) -> None:
    for number in range(ROUNDS):
        cache = damaged.cache / str(number)
        start.wait(60)
        done.put(Filled(damaged.model, damaged.rows, cache).use(room) == wanted)


@pytest.mark.parametrize("room", ["tokens", "digests"])
def test_processes_that_find_the_same_damage_do_not_disturb_each_other(room, filled, wanted, tmp_path) -> None:
    for number in range(ROUNDS):
        shutil.copytree(filled / "cache", tmp_path / str(number))
        found = entry(tmp_path, room, str(number))
        flipped(0.4)(found if found.is_file() else found / "tokens.arrow")
    processes = multiprocessing.get_context("fork")
    start, done = processes.Barrier(PROCESSES), processes.Queue()
    words = (Filled(filled / "model", filled / "rows.jsonl", tmp_path), room, wanted[room], start, done)
    crowd = [processes.Process(target=hammer, args=words, daemon=True) for _ in range(PROCESSES)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(100)
    assert [process.exitcode for process in crowd] == [0] * PROCESSES
    assert all(done.get() for _ in range(ROUNDS * PROCESSES))
    assert not [file for file in tmp_path.rglob(".*") if "writing" in file.name or "damaged" in file.name]


def test_rows_that_a_disk_does_not_keep_are_an_error(filled, tmp_path, monkeypatch) -> None:
    class Lossy(ArrowWriter):
        def finalize(self, *words, **options):
            done = super().finalize(*words, **options)
            flipped(0.5)(pathlib.Path(self._path))
            return done

    whole = Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("nybble.data.sets.cached_rows.ArrowWriter", Lossy)
        with pytest.raises(StorageError, match="tokenised rows are read back differently") as caught:
            whole.use("tokens")
    print(caught.value)
    assert not list((tmp_path / "cache" / "tokens").iterdir())
    monkeypatch.setattr("nybble.data.sets.cached_rows.TRIES", 1)
    with pytest.raises(StorageError, match="tokenised rows do not stay as they are written"):
        whole.use("tokens")  # made, and not found again


def test_a_note_that_a_disk_does_not_keep_is_an_error(tmp_path, monkeypatch) -> None:
    write = pathlib.Path.write_text
    monkeypatch.setattr(pathlib.Path, "write_text", lambda self, text, **words: write(self, text[:-1], **words))
    with pytest.raises(StorageError, match=r"data written to the cache reads back differently \(note is garbled\)"):
        kept.write_note(tmp_path / "note", {"n": 1})
    assert not list(tmp_path.iterdir())


def test_a_cache_in_which_nothing_can_be_used_is_an_error(filled, tmp_path, monkeypatch) -> None:
    shutil.copytree(filled / "cache", tmp_path / "cache")
    place = entry(tmp_path, "tokens")
    (place / "manifest.json").unlink()
    monkeypatch.setattr(kept, "NAMES", 1)
    with read_only(place), pytest.raises(StorageError, match="can be neither used nor removed: there is no") as caught:
        Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache").use("tokens")
    assert caught.value.where == str(place)


def test_a_cache_folder_that_is_a_dangling_link_is_named(filled, tmp_path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tokens").symlink_to("/not/mounted")
    with pytest.raises(StorageError, match=r"tokens is a link to /not/mounted, which does not exist"):
        Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache").use("tokens")


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path) -> None:
    """Those of this version, which were removing an entry, and those of versions before 0.7."""
    for name, age in ((".writing-a", 90_000), (f"{UNFINISHED}b", 90_000), (".writing-c", 3600), ("d", 90_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        for file in (tmp_path / name / "file", tmp_path / name):
            os.utime(file, (time.time() - age, time.time() - age))
    (tmp_path / ".writing-c" / "file").touch()
    with kept.new_entry(tmp_path / "entry") as folder:
        kept.seal(folder, tmp_path / "entry", {})
    assert sorted(os.listdir(tmp_path)) == [".writing-c", "d", "entry"]


def test_a_note_whose_path_cannot_be_written_is_skipped(filled, wanted, tmp_path) -> None:
    shutil.copytree(filled / "cache", tmp_path / "cache")
    place = entry(tmp_path, "digests")
    place.unlink()
    place.mkdir()
    with read_only(place):
        assert Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache").use("digests") == wanted["digests"]


# By the command line.


@pytest.fixture(scope="module")
def trained(peaky_llama, rows, tmp_path_factory) -> pathlib.Path:
    """A folder with a run and the cache that it filled."""
    folder = tmp_path_factory.mktemp("trained")
    tuned(peaky_llama, rows, folder / "run", 8, folder / "cache")
    return folder


def results(trained: pathlib.Path, folder: pathlib.Path, kind: str, model: pathlib.Path, rows: pathlib.Path) -> object:
    """What a command gives that uses a cache, and what it says."""
    run, cache = folder / "run", folder / "cache"
    if kind == "chat":
        said = nybble("chat", run, "--prompt", "say red", "--max-new-tokens", 8, cache=cache)
        answer = said.text.splitlines()[-1]
        return said, answer
    if kind == "eval":
        said = nybble("eval", run, "--tasks", "none", "--answers", 2, cache=cache)
        found = json.loads((run / "evaluation.json").read_text())
        return said, [found["held_out"], found["samples"]]
    if kind == "export":
        said = nybble("export", run, "--to", "merged", "--merge-base", "dequantised", cache=cache)
        return said, (run / "export" / "merged" / "model.safetensors").read_bytes()
    if kind == "check":
        said = nybble("data", "check", rows, model, "data.max_length=128", "data.validation=12", cache=cache)
        return said, [line for line in said.text.splitlines() if "took" not in line and "cached" not in line]
    words = ["data.max_length=128", "data.validation=12", "train.samples=0", "train.max_steps=2", "train.micro_batch=8"]
    words += ["train.accumulation=1", "model.device=cpu", "model.dtype=float32", f"out={folder}/new"]
    said = nybble("train", model, rows, *words, cache=cache)
    lines = [json.loads(line) for line in (folder / "new" / "metrics.jsonl").read_text().splitlines()]
    return said, [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.mark.parametrize(
    ("kind", "room", "name", "edit"),
    [
        ("chat", "base", "model.safetensors", zeroed("down_proj.weight")),
        *(
            pytest.param(*words, marks=pytest.mark.slow)
            for words in (
                ("check", "tokens", "tokens.arrow", cut(0)),
                ("eval", "base", "model.safetensors", zeroed("down_proj.weight")),
                ("eval", "tokens", "tokens.arrow", flipped(0.3)),
                ("export", "base", "model.safetensors", zeroed("down_proj.weight")),
                ("export", "tokens", "found.json", cut(0.5)),
                ("train", "base", "model.safetensors", flipped(0.8)),
                ("train", "tokens", "tokens.arrow", flipped(0.3)),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_command_gives_what_it_gave_before(
    kind, room, name, edit, trained, peaky_llama, rows, tmp_path, caplog
) -> None:
    told = []
    for place in ("whole", "damaged"):
        shutil.copytree(trained, tmp_path / place)
        if place == "damaged":
            (found,) = (folder for folder in (tmp_path / place / "cache" / room).iterdir() if (folder / name).exists())
            edit(found / name)
        said, result = results(trained, tmp_path / place, kind, peaky_llama, rows)
        assert said.status == 0, said.text
        told.append((f"{' '.join(said.text.split())} {caplog.text}", result))  # without pytest the log goes to stderr
    print(told[1][0])
    assert MENDED[room] not in told[0][0]
    assert MENDED[room] in told[1][0]
    if kind != "check":
        assert told[1][1] == told[0][1]


@pytest.mark.slow
def test_the_notice_is_seen_by_a_user(trained, tmp_path) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    (found,) = (tmp_path / "copy" / "cache" / "base").iterdir()
    flipped(0.9)(found / "model.safetensors")
    words = ["--cache", tmp_path / "copy" / "cache", "chat", tmp_path / "copy" / "run", "--prompt", "say red"]
    done = subprocess.run([sys.executable, "-m", "nybble", *words], capture_output=True, text=True, check=True)
    print(done.stderr)
    assert done.stderr.count(MENDED["base"]) == 1
    assert MENDED["base"] not in done.stdout
