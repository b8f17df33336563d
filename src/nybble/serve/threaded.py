"""An engine's worker that computes in a thread of this process."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.generate.request import Handle, Request, Sink
from nybble.generate.worker import PacedGenerator, Worker


class InThread:
    """See `nybble.serve.engine.AnswerWorker`."""

    def __init__(self, generator: PacedGenerator) -> None:
        self.generator = generator
        self.thread = Worker(generator)

    async def start(self) -> None:
        """Nothing: its thread has begun."""

    async def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none.

        Raises:
            BusyError, GenerationError: as `nybble.generate.worker.Worker.submit`.
        """
        return self.thread.submit(requests, sinks)

    def healthy(self) -> bool:
        """Whether it can answer requests."""
        return self.thread.healthy()

    async def stop(self) -> None:
        """Nothing: `close` ends the thread."""

    def close(self) -> None:
        """Cancel what is running, and end the thread."""
        self.thread.close()
