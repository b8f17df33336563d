"""Processes that wait for others which do not come."""

from __future__ import annotations

import datetime
import socket
import subprocess
import sys

import pytest
from torch.distributed import DistBackendError, DistNetworkError, TCPStore

from nybble.distributed import meeting
from nybble.distributed.group import explained_lost_process
from nybble.distributed.launcher import ProcessPlace
from nybble.errors import DeviceError, LostProcessError


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
        meeting.meet(ProcessPlace(0, 0, 3, "torchrun"), "test")
    print(caught.value)
    assert "the 3 processes did not meet: " in caught.value.what
    assert caught.value.where == f"127.0.0.1:{port}"
    assert "see what the other processes say" in caught.value.fix


def test_another_names_those_that_did_not_arrive(port, monkeypatch):
    """The store belongs to the launcher, as torchrun's does."""
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DeviceError) as caught:
        meeting.meet(ProcessPlace(1, 0, 3, "torchrun"), "test")
    print(caught.value)
    assert "of 3 processes these did not arrive within 0 minutes: 0, 2" in caught.value.what
    store.set("nybble-0-test/arrived-0", "")
    store.set("nybble-0-test/arrived-2", "")
    meeting.meet(ProcessPlace(1, 0, 3, "torchrun"), "test")


def test_each_meeting_waits_anew(port, monkeypatch):
    """Who has been at an earlier one, or was there before torchrun started the processes again, has not arrived."""
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("RANK", "1")
    for attempt, purpose in (("0", "a"), ("0", "b"), ("1", "b")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with pytest.raises(DeviceError, match="did not arrive within 0 minutes: 0, 2"):
            meeting.meet(ProcessPlace(1, 0, 3, "torchrun"), purpose)
        for rank in (0, 2):
            store.set(f"nybble-{attempt}-{purpose}/arrived-{rank}", "")
        meeting.meet(ProcessPlace(1, 0, 3, "torchrun"), purpose)


def test_what_all_must_say_alike(port, monkeypatch):
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("RANK", "1")
    for rank, device in ((0, "cuda"), (2, "cpu")):
        store.set(f"nybble-0-test/arrived-{rank}", device)
    with pytest.raises(DeviceError) as caught:
        meeting.meet(ProcessPlace(1, 0, 3, "torchrun"), "test", "cuda")
    print(caught.value)
    assert caught.value.what == "process 0 computes on cuda, but process 2 on cpu"
    assert "nybble doctor on each machine" in caught.value.fix


def test_the_meeting_point_ends_meanwhile(port, monkeypatch):
    monkeypatch.setattr(meeting, "ARRIVAL", datetime.timedelta(seconds=20))
    code = f"import time, torch.distributed as d; s = d.TCPStore('127.0.0.1', {port}, is_master=True, wait_for_workers=False)"
    owner = subprocess.Popen([sys.executable, "-c", f"{code}; s.wait(['nybble-0-test/arrived-1'])"])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(LostProcessError) as caught:
        meeting.meet(ProcessPlace(1, 0, 3, "torchrun"), "test")
    print(caught.value)
    assert owner.wait(30) == 0
    assert "the process at the meeting point has ended" in caught.value.what


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DistNetworkError("recvValue failed"), LostProcessError, "has ended, or cannot be reached: recvValue failed"),
        (DistBackendError("NCCL error: remote process exited: connection closed"), LostProcessError, "has ended"),
        (
            DistBackendError("NCCL error in: Init.cpp:3\nLast error:\nError while creating shared memory: No space left"),
            DeviceError, "an exchange between the processes failed: NCCL error in: Init.cpp:3; Error while creating",
        ),
    ],
)  # fmt: skip
def test_an_exchange_that_fails_is_one_message(error, kind, text):
    with pytest.raises(DeviceError) as caught, explained_lost_process():
        raise error
    print(caught.value)
    assert type(caught.value) is kind
    assert text in caught.value.what


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="elsewhere"), explained_lost_process():
        raise RuntimeError("an error from elsewhere: connection reset")


def test_nobody_at_the_address(port, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DeviceError) as caught:
        meeting.meet(ProcessPlace(1, 0, 3, "torchrun"), "test")
    print(caught.value)
    assert "the 3 processes did not meet: " in caught.value.what
