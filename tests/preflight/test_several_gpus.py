"""An all-reduce by real processes, over gloo where there are no GPUs, and what the doctor says of made-up machines."""

from __future__ import annotations

import pytest
import torch

from nybble.preflight.doctor import several_gpus
from nybble.preflight.doctor.all_reduce import AllReduce, all_reduce_over
from nybble.preflight.doctor.several_gpus import judge_all_reduce, judge_nccl, judge_peers, links

TWO = ["cuda:0", "cuda:1"]


@pytest.mark.slow
def test_two_processes_sum_and_measure():
    result = all_reduce_over(["cpu", "cpu"], numbers=100_000)
    print(result)
    assert result.fault is None
    assert 0.001 < result.gigabytes < 1000


@pytest.mark.slow
def test_a_process_that_fails_is_named_with_its_error():
    result = all_reduce_over(["cpu", "meta"], numbers=100)  # the other one waits for it
    print(result)
    assert result.fault.startswith("meta: ")
    assert "Error" in result.fault


def test_what_hangs_is_ended():
    result = all_reduce_over(["cpu", "cpu"], numbers=100, seconds=0.2)
    assert result.fault == "it hangs: not done after 0 seconds"
    finding = judge_all_reduce(TWO, result)
    assert finding.verdict == "fail"
    assert finding.detail == "over 2 GPUs: it hangs: not done after 0 seconds"
    assert finding.fix.startswith("try NCCL_P2P_DISABLE=1 nybble doctor")


def test_nothing_is_said_of_a_single_gpu():
    assert links([]) == links(["cuda:0"]) == []


def test_two_gpus_have_a_line_for_each_thing_they_need(monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(several_gpus, "all_reduce_over", lambda names: AllReduce(312.34))
    found = [(finding.name, finding.verdict, finding.detail) for finding in links(TWO)]
    assert found == [
        ("peer access", "ok", "between both GPUs"),
        ("nccl", "ok", "2.27.5"),
        ("all-reduce", "ok", "over 2 GPUs: right sums, 312.3 GB/s"),
    ]
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert [finding.verdict for finding in links(TWO)] == ["ok", "fail"], "without NCCL there is nothing to measure"


def test_pairs_without_peer_access_are_named():
    assert judge_peers(3, []).detail == "between all 3 GPUs"
    finding = judge_peers(4, [(0, 2), (1, 3)])
    assert finding.verdict == "warn"
    assert finding.detail == "none in 2 of 6 pairs of GPUs (0 and 2, 1 and 3): they exchange through the host"
    assert "nvidia-smi topo -p2p r" in finding.fix
    assert judge_nccl(None).detail == "torch was built without NCCL: several GPUs cannot train together"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_gpus_of_this_machine_sum_together():
    found = {
        finding.name: finding for finding in links([f"cuda:{index}" for index in range(torch.cuda.device_count())])
    }
    print(found)
    assert set(found) == {"peer access", "nccl", "all-reduce"}
    assert found["all-reduce"].verdict == "ok"
