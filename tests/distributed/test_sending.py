"""Files that go through the store in parts: three processes as threads, of which one sees the folder."""

from __future__ import annotations

import concurrent.futures
import datetime

import pytest
from torch.distributed import TCPStore

from nybble.distributed import sending
from nybble.distributed.launcher import ProcessPlace
from nybble.distributed.sending import folder_at_hand
from nybble.errors import LostProcessError, ModelError

CONTENT = {"recipe.yaml": b"a: 1\n", "checkpoints/checkpoint-2/optimizer.pt": bytes(range(256)) * 4, "empty": b""}


@pytest.fixture
def three(monkeypatch, tmp_path):
    """Runs a function in three threads, each with its own connection to a store."""
    limit = datetime.timedelta(seconds=20)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    monkeypatch.setattr(sending, "PART", 100)
    monkeypatch.setattr(sending, "meet", lambda place, purpose: TCPStore("127.0.0.1", store.port, timeout=limit))

    def run(function):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return list(pool.map(function, [ProcessPlace(rank, 0, 3, "torchrun") for rank in range(3)]))

    return run


def test_a_process_that_does_not_see_the_folder_gets_a_copy_of_the_chosen_files(three, tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for name, content in CONTENT.items():
        file = folders[0] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (folders[0] / "not sent").touch()

    def found(place):
        with folder_at_hand(folders[place.rank], lambda: [folders[0] / name for name in CONTENT], place) as folder:
            files = [file for file in folder.rglob("*") if file.is_file()] if place.rank == 2 else []
            return folder, {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}

    results = three(found)
    assert [folder for folder, _ in results[:2]] == folders[:2], "these see it"
    assert results[2][0] != folders[2]
    assert results[2][0].name == "run"
    assert results[2][1] == CONTENT
    assert not results[2][0].exists(), "a copy is removed"
    assert sorted(path.name for path in folders[0].iterdir()) == ["checkpoints", "empty", "not sent", "recipe.yaml"]


def test_what_the_first_refuses_ends_the_others_with_its_reason(three, tmp_path):
    def choose():
        raise ModelError("the run is finished", fix="nothing")

    def refused(place):
        with pytest.raises((ModelError, LostProcessError)) as caught, folder_at_hand(tmp_path / "run", choose, place):
            pass
        print(caught.value)
        return caught.value.what

    assert three(refused) == ["the run is finished", *["process 0 ends, and this one with it: the run is finished"] * 2]
