"""A thread that computes what is submitted, for a server; who waits for whole answers calls `complete` and needs none."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from nybble.generate.request import GenerationError, Generator, Handle, Request, Sink


class PacedGenerator(Generator, Protocol):
    """A generator that says when a step is worth its while."""

    @property
    def waiting(self) -> int:
        """Requests that a step would bring on."""

    def healthy(self) -> bool:
        """Whether answers can be made."""

    def companions(self, *, idle: bool) -> tuple[int, float]:
        """How many waiting requests the next step is better off with, and for how many seconds they are worth waiting for.

        Args:
            idle: whether the last step left nothing to do.
        """


class Worker:
    """Calls a generator's `step`, in a thread of its own, as long as there is something to do."""

    def __init__(self, generator: PacedGenerator) -> None:
        self.generator = generator
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="nybble-generate", daemon=True)
        self.thread.start()

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none.

        Raises:
            BusyError, GenerationError: as `Generator.submit`, or the thread broke down.
        """
        if not self.thread.is_alive() and not self.closing:
            raise GenerationError("the engine failed")
        handles = self.generator.submit(requests, sinks)
        with self.changed:
            self.changed.notify()
        return handles

    def healthy(self) -> bool:
        """Whether answers are being made."""
        return self.thread.is_alive() and self.generator.healthy()

    def close(self) -> None:
        """Break off everything; returns when the thread has ended."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.generator.close()
        self.thread.join()

    def _work(self) -> None:
        try:
            idle = True
            with torch.inference_mode():  # no one trains with what is computed here
                while self._wait(idle=idle):
                    idle = not self.generator.step()
        finally:  # whatever happened, nobody is left waiting
            self.generator.close()

    def _wait(self, *, idle: bool) -> bool:
        """Wait for work, and a moment longer for what comes together with it; False when closing."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing or self.generator.waiting)
            count, seconds = self.generator.companions(idle=idle)
            self.changed.wait_for(lambda: self.closing or self.generator.waiting >= count, timeout=seconds)
            return not self.closing
