"""Processes that wait for others which do not come."""

from __future__ import annotations

import datetime
import socket

import pytest
from torch.distributed import TCPStore

from nybble.distributed import meeting
from nybble.distributed.launcher import ProcessPlace
from nybble.errors import DeviceError


@pytest.fixture
def port(monkeypatch):
    """A port at which process RANK of three will meet the others for one second."""
    monkeypatch.setattr(meeting, "ARRIVAL", datetime.timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 3, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    return port


def test_the_first_says_that_others_did_not_arrive(port, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DeviceError) as caught:
        meeting.meet(ProcessPlace(0, 0, 3, "torchrun"))
    print(caught.value)
    assert "the 3 processes did not meet: " in caught.value.what
    assert caught.value.where == f"127.0.0.1:{port}"
    assert "see what the other processes say" in caught.value.fix


def test_another_names_those_that_did_not_arrive(port, monkeypatch):
    """The store belongs to the launcher, as torchrun's does."""
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DeviceError) as caught:
        meeting.meet(ProcessPlace(1, 0, 3, "torchrun"))
    print(caught.value)
    assert "of 3 processes these did not arrive within 0 minutes: 0, 2" in caught.value.what
    store.set("arrived-0", "")
    store.set("arrived-2", "")
    meeting.meet(ProcessPlace(1, 0, 3, "torchrun"))


def test_nobody_at_the_address(port, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DeviceError) as caught:
        meeting.meet(ProcessPlace(1, 0, 3, "torchrun"))
    print(caught.value)
    assert "the 3 processes did not meet: " in caught.value.what
