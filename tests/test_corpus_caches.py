"""Damaged caches mend themselves: the same numbers as before, one line that says so, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from conftest import WORDS, small_tokenizer, write_llama
from corpus.caches import CASES, MENDED, a_file, entry, flipped, zeroed
from corpus.cases import Case, nybble, sampled
from nybble import kept
from nybble.data.prepare import prepare
from nybble.evaluate.scores import Scored, Store
from nybble.export.export import Wanted, export
from nybble.model.base import load_base
from nybble.model.checkpoint import find_checkpoint, fingerprint
from nybble.recipe import DataOptions, ModelOptions
from nybble.run import open_run
from test_places import read_only

SCORED = Scored("t", "acc", True, "1", 0, 2, "Hub", [1.0, float("nan")], ["t", "t"], ["x", "y"])


class Filled:
    """A cache with an entry in each room, and what its users give."""

    def __init__(self, model: pathlib.Path, rows: pathlib.Path, cache: pathlib.Path) -> None:
        self.model, self.rows, self.cache = model, rows, cache

    def use(self, room: str) -> object:
        """What comes out of a room's entry."""
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


@pytest.mark.parametrize("case", sampled(CASES, 5))
def test_a_damaged_cache_mends_itself(case: Case, filled, wanted, tmp_path, caplog) -> None:
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
def test_what_is_no_damage_is_taken_for_none(room, filled, wanted, tmp_path, caplog) -> None:
    shutil.copytree(filled / "cache", tmp_path / "cache")  # other inodes and times
    (entry(tmp_path, room) / ".DS_Store").write_text("x")
    for file in entry(tmp_path, room).iterdir():
        os.utime(file, (0, 0))
    before = sorted((file.name, file.stat().st_ino) for file in entry(tmp_path, room).iterdir())
    assert Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache").use(room) == wanted[room]
    assert not caplog.records
    assert before == sorted((file.name, file.stat().st_ino) for file in entry(tmp_path, room).iterdir())


@pytest.mark.parametrize("room", ["base", "tokens"])
def test_what_cannot_be_removed_is_passed_over(room, filled, wanted, tmp_path, caplog) -> None:
    shutil.copytree(filled / "cache", tmp_path / "cache")
    place = entry(tmp_path, room)
    (place / "manifest.json").unlink()
    damaged = Filled(filled / "model", filled / "rows.jsonl", tmp_path / "cache")
    with read_only(place):
        for said in ("there is no manifest.json) and ", f"cannot be removed: {place}.2 is used instead"):
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
def test_an_entry_that_this_user_may_not_read_makes_way(tmp_path, closed) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.owner() == "root" and parent != pathlib.Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    with another_user():
        place = tmp_path / "room" / "entry"
        for word in ("first", "second"):
            found = kept.find(place)
            assert found.facts is None
            with kept.making(found.place) as temporary:
                (temporary / "file").write_text(word)
                kept.seal(temporary, found.place, {"word": word})
            assert kept.find(place).facts == {"word": word}
            {"folder": place, "manifest": place / "manifest.json", "file": place / "file"}[closed].chmod(0)
        found = kept.find(place)
        print(found.fault)
        assert "cannot be read" in found.fault
        assert found.place == place
        assert not place.exists()
