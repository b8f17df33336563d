"""Ranks that gather each layer together, but compute different numbers of batches: evaluations, answers to samples.

A rank that has nothing left to compute runs empty passes, in which it only helps to gather, until no rank computes any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from nybble.weights.store import Pass


class Lockstep:
    """Lets ranks differ in the number of their forward passes without gradients.

    Args:
        layers: number of layers of the model.
        gather: starts a layer without gradients, by its number.
        all_ranks: the sum of a number over all ranks.
    """

    def __init__(self, layers: int, gather: Callable[[int], None], all_ranks: Callable[[int], int]) -> None:
        self._layers = layers
        self._gather = gather
        self._all_ranks = all_ranks
        self._is_open = False
        self._begun = layers
        """How many layers of the current pass were started."""

    @contextlib.contextmanager
    def uneven(self) -> Iterator[None]:
        """Within this context, ranks may run different numbers of passes; all must enter it, and leave it together."""
        self._is_open = True
        try:
            yield
            self._finish_pass()
            while self._all_ranks(0):
                self._empty_pass(0)
        finally:
            self._is_open = False

    def before(self, number: int, passing: Pass) -> None:
        """A layer is about to start: before the first one, the other ranks hear that this rank computes."""
        if not self._is_open:
            return
        assert passing == "inference", "only passes without gradients may differ in number"
        if number == 0:
            self._finish_pass()
            self._all_ranks(1)
        self._begun = number + 1

    def _finish_pass(self) -> None:
        """The last pass may have ended early, with an error that its caller could go on after."""
        self._empty_pass(self._begun)

    def _empty_pass(self, first: int) -> None:
        for number in range(first, self._layers):
            self._gather(number)
        self._begun = self._layers
