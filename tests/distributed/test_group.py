"""What processes do together: three real ones, over gloo, and one that is alone."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.distributed import group
from nybble.distributed.group import all_gather, all_reduce, all_reduce_number, barrier, broadcast, in_group, share_of
from nybble.objective.objective import Mean, MetricSums

THREE = """
import json, os, sys
import torch
import torch.distributed
from nybble.distributed.group import all_reduce, all_reduce_number, broadcast, all_gather, in_group, share_of, barrier
from nybble.objective.objective import Mean, MetricSums

def work(rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=3)
    barrier()
    sums = MetricSums(["loss", "margin"], torch.device("cpu"))
    if rank:  # the first has no batch
        sums.add({"loss": Mean(torch.tensor(float(rank)), rank), "margin": Mean(torch.tensor(6.0 * rank), torch.tensor(2))})
    found = {
        "in group": in_group(),
        "shares": [list(share_of(count)) for count in (0, 2, 7)],
        "gathered": [all_gather([f"item {n}" for n in share_of(count)]) for count in (0, 2, 7)],
        "first": broadcast({"rank": rank}),
        "sum": all_reduce(torch.tensor([rank, 10])).tolist(),
        "number": all_reduce_number(rank, torch.device("cpu")),
        "means": sums.means(),
    }
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(found, file)
    torch.distributed.destroy_process_group()

children = []
for rank in range(3):
    child = os.fork()
    if not child:
        try:
            work(rank)
        except BaseException as error:
            print(rank, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_three_processes_divide_work_and_share_results(tmp_path):
    done = subprocess.run([sys.executable, "-c", THREE, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, one in enumerate(found):
        assert one["in group"]
        assert one["gathered"] == [[f"item {n}" for n in range(count)] for count in (0, 2, 7)], "in their old order"
        assert one["first"] == {"rank": 0}
        assert (one["sum"], one["number"]) == ([3, 30], 3)
        assert one["means"] == {"loss": 1.0, "margin": 4.5}, f"process {rank}: (1 + 2) / (1 + 2) and (6 + 12) / (2 + 2)"
    for number, count in enumerate((0, 2, 7)):
        shares = [one["shares"][number] for one in found]
        assert [index for share in shares for index in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_single_process_does_all_of_it(monkeypatch):
    assert not in_group()
    barrier()
    assert share_of(5) == range(5)
    assert all_gather([1, 2]) == [1, 2]
    assert broadcast("mine") == "mine"
    assert all_reduce(torch.tensor([2])).tolist() == [2]
    monkeypatch.setattr(group, "all_reduce", lambda _: 1 / 0)  # a tensor on the device would have to be waited for
    assert all_reduce_number(4, torch.device("cpu")) == 4


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 50)), max_size=10))
def test_means_count_each_term_once(batches):
    sums = MetricSums(["loss"], torch.device("cpu"))
    for total, count in batches:
        sums.add({"loss": Mean(torch.tensor(total, dtype=torch.float64), count)})
    found = sums.means()["loss"]
    terms = sum(count for _, count in batches)
    if not terms:
        assert found != found, "there is no mean of nothing"
    else:
        assert abs(found - sum(total for total, _ in batches) / terms) < 1e-9
