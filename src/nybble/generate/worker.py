"""A thread that computes submitted requests, for a server; `complete` needs none."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from nybble.generate.request import GenerationError, Generator, Handle, Request, Sink


class PacedGenerator(Generator, Protocol):
    """A generator that says when it is worth calling `step`."""

    @property
    def waiting(self) -> int:
        """How many requests a step could work on."""

    def healthy(self) -> bool:
        """Whether it can answer requests."""

    def worth_waiting_for(self, *, idle: bool) -> tuple[int, float]:
        """How many requests the next step should have, and for how many seconds it is worth waiting for them.

        Args:
            idle: whether the last step left nothing to do.
        """


class Worker:
    """Calls a generator's `step` in its own thread, as long as there is something to do."""

    def __init__(self, generator: PacedGenerator) -> None:
        self.generator = generator
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="nybble-generate", daemon=True)
        self.thread.start()

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none.

        Raises:
            BusyError, GenerationError: as `Generator.submit`, or the thread has failed.
        """
        if not self.thread.is_alive() and not self.closing:
            raise GenerationError("the engine failed")
        handles = self.generator.submit(requests, sinks)
        with self.changed:
            self.changed.notify()
        return handles

    def healthy(self) -> bool:
        """Whether it can answer requests."""
        return self.thread.is_alive() and self.generator.healthy()

    def close(self) -> None:
        """Cancel everything; returns when the thread has ended."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.generator.close()
        self.thread.join()

    def _work(self) -> None:
        try:
            idle = True
            with torch.inference_mode():
                while self._wait(idle=idle):
                    idle = not self.generator.step()
        finally:  # whatever happened, no client is left waiting
            self.generator.close()

    def _wait(self, *, idle: bool) -> bool:
        """Wait for a request, and briefly for others that arrive together with it; False when closing."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing or self.generator.waiting)
            count, seconds = self.generator.worth_waiting_for(idle=idle)
            self.changed.wait_for(lambda: self.closing or self.generator.waiting >= count, timeout=seconds)
            return not self.closing
