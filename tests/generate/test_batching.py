"""Which requests are computed together, and when a batch gives way."""

from __future__ import annotations

import pytest

from nybble.generate.batching import ActiveRequest, GenerationBatch, Scheduler
from nybble.generate.padded import PATIENCE
from nybble.generate.request import NullObserver, Request, Token


class Nowhere:
    def begin(self, cached, prompt):
        pass

    def put(self, token):
        pass

    def end(self, finish):
        pass

    def fail(self, error):
        pass


def row(tokens=99, prompt=1, adapter=None):
    return ActiveRequest(Request([1] * prompt, tokens, adapter, frozenset()), Nowhere(), 0)


def scheduler(**options):
    settings = {
        "rows": 32,
        "queue": 200,
        "patience": PATIENCE,
        "token_budget": 10**6,
        "mixes_adapters": False,
        "rows_are_free": True,
    }
    return Scheduler(**settings | options, observer=NullObserver())


def steps_until_it_gives_way(batch):
    while not all(batch.step([Token(5)] * len(batch.rows))):
        assert batch.steps < 99
    return batch.steps


def test_a_batch_leaves_behind_the_rows_that_have_ended():
    rows = [row(most) for most in (2, 3, 99)]
    batch = GenerationBatch(rows, PATIENCE, lambda: False, lambda rows: 0)
    for _ in range(PATIENCE - 1):
        done = batch.step([Token(5)] * 3)
    assert done == [True, True, False]
    assert batch.step([Token(5)] * 3) == [True] * 3
    assert batch.unfinished() == [rows[2]]
    alone = GenerationBatch(batch.unfinished(), PATIENCE, lambda: False, lambda rows: 0)
    assert [alone.step([Token(5)]) for _ in range(PATIENCE + 1)][-1] == [False]


def test_without_patience_a_batch_goes_on_until_its_last_row_ends():
    batch = GenerationBatch([row(2), row(3), row(40)], None, lambda: True, lambda rows: 29)
    assert steps_until_it_gives_way(batch) == 40
    assert not batch.unfinished()


@pytest.mark.parametrize(("running", "joiners", "tokens"), [(1, 15, 1), (4, 4, 8), (15, 1, 15), (8, 0, 16)])
def test_a_batch_gives_way_the_sooner_the_more_could_join_it(running, joiners, tokens):
    batch = GenerationBatch([row() for _ in range(running)], PATIENCE, lambda: True, lambda rows: joiners)
    assert steps_until_it_gives_way(batch) == tokens


@pytest.mark.parametrize(("first", "budget", "tokens"), [(32, 10**6, 16), (1, 150, 16), (1, 10**6, 1)])
def test_a_batch_does_not_give_way_to_requests_that_would_not_fit(first, budget, tokens):
    """Full by its rows, full by its tokens, and not full; 15 come as it works."""
    own = scheduler(token_budget=budget)
    own.submit([row(prompt=10) for _ in range(first)])
    batch = own.next()
    own.submit([row(prompt=10) for _ in range(15)])
    assert steps_until_it_gives_way(batch) == tokens
    assert own.finish(batch, 1.0)


@pytest.mark.parametrize(("mixes", "sizes"), [(False, [5, 5, 5]), (True, [15])])
def test_adapters_take_turns_where_they_cannot_be_mixed(mixes, sizes):
    own = scheduler(mixes_adapters=mixes)
    own.submit([row(adapter=adapter) for _ in range(5) for adapter in ("a", None, "b")])
    found = []
    while (batch := own.next()) is not None:
        found.append(len(batch.rows))
    assert found == sizes


def test_rows_of_a_batch_that_gave_way_queue_behind_the_waiting_ones():
    own = scheduler()
    ahead, behind = row(adapter="a"), row(adapter="b")
    own.submit([ahead])
    batch = own.next()
    own.submit([behind])
    own.finish(batch, 1.0)
    assert own.next().rows == [behind]
    assert own.next().rows == [ahead]
