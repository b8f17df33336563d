"""The server's side of the generator's process: submits requests to it, and hands its tokens to their mailboxes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import subprocess
from collections.abc import Sequence

from nybble.generate.request import GenerationError, Handle, Observer, Request, Sink, Token
from nybble.serve.process.messages import Cancellation, PromptFacts, Report, Submission, Unpacker, pack

log = logging.getLogger("nybble.serve")
ENDING = 10.0  # seconds that the process has to end once its server has closed the connection
FAILED = "the engine failed"


class RemoteHandle:
    """A request that was submitted to the process."""

    def __init__(self, worker: RemoteWorker, answer: int) -> None:
        self._worker, self._answer = worker, answer

    def cancel(self) -> None:
        """Stop as soon as possible; from the event loop."""
        self._worker.cancel([self._answer])


class RemoteWorker(asyncio.Protocol):
    """See `nybble.serve.engine.AnswerWorker`; everything but `close` is called in the event loop.

    Args:
        process: has loaded its engine before `start` is called.
        connection: to the process.
        observer: is notified of the generator's load.
    """

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket, observer: Observer) -> None:
        self.process, self._connection, self._observer = process, connection, observer
        self._transport: asyncio.WriteTransport | None = None
        self._unpacker = Unpacker()
        self._numbers = itertools.count()
        self._answers: dict[int, Sink] = {}
        self._submissions: dict[int, tuple[asyncio.Future[None], range]] = {}
        self._healthy = True
        self._is_over = False
        self._told = False
        self._farewell: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to read what the process sends."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: self, sock=self._connection)

    async def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none; the sinks are called in the event loop.

        Raises:
            BusyError, UnsupportedError, GenerationError: as `nybble.generate.request.Generator.submit`, or the process has ended.
        """
        if self._is_over or self._transport is None:
            raise GenerationError(FAILED)
        first = next(self._numbers)
        answers = range(first, first + len(requests))
        self._numbers = itertools.count(answers.stop)
        self._answers |= dict(zip(answers, sinks, strict=True))
        queued = asyncio.get_running_loop().create_future()
        self._submissions[first] = (queued, answers)
        self._transport.write(pack(Submission(first, list(zip(answers, requests, strict=True)))))
        try:
            await queued
        except asyncio.CancelledError:  # the client has left: nobody will cancel what is being queued
            self.cancel(answers)
            raise
        return [RemoteHandle(self, number) for number in answers]

    def cancel(self, answers: Sequence[int]) -> None:
        """Stop these answers as soon as possible; their sinks are told when they have ended."""
        unfinished = [number for number in answers if number in self._answers]
        if unfinished and self._transport is not None and not self._is_over:
            self._transport.write(pack(Cancellation(unfinished)))

    def healthy(self) -> bool:
        """Whether it can answer requests."""
        return self._healthy and not self._is_over

    async def stop(self) -> None:
        """Close the connection, which ends the process."""
        self._is_over = self._told = True
        if self._farewell is not None:
            await self._farewell
        if self._transport is not None:
            self._transport.close()
            await asyncio.sleep(0)  # asyncio closes the socket in its next round

    def close(self) -> None:
        """Wait until the process has ended; one that does not end is killed."""
        self._is_over = True
        self._connection.close()
        try:
            self.process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        for report in self._unpacker.feed(data):
            self._receive(report)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio: the process has ended, unless the connection was closed here."""
        self._is_over = True
        for number in list(self._answers):
            self._answers.pop(number).fail(GenerationError(FAILED))
        for queued, _ in self._submissions.values():
            if not queued.done():
                queued.set_exception(GenerationError(FAILED))
        self._submissions.clear()
        self._observer.load_changed(0, 0)
        if not self._told:
            self._farewell = asyncio.ensure_future(self._tell_end())

    def _receive(self, report: Report) -> None:
        for rows in report.batches:
            self._observer.batch_started(rows)
        if report.load is not None:
            self._observer.load_changed(*report.load)
        handle_records(report.records)
        for submission, refusal in report.replies:
            self._answer_submission(submission, refusal)
        for number, item in report.items:
            sink = self._answers.get(number)
            if sink is None:
                continue
            if isinstance(item, int):
                sink.put(Token(item))
            elif isinstance(item, Token):
                sink.put(item)
            elif isinstance(item, PromptFacts):
                sink.begin(item.cached, item.prompt)
            else:
                del self._answers[number]
                if isinstance(item, GenerationError):
                    sink.fail(item)
                else:
                    sink.end(item)
        if report.healthy is not None:
            self._healthy = report.healthy
        if report.why_ended:
            self._told = True
            log.error("%s %s", FAILED, report.why_ended)

    def _answer_submission(self, submission: int, refusal: Exception | None) -> None:
        queued, answers = self._submissions.pop(submission)
        if refusal is not None:
            for number in answers:
                self._answers.pop(number, None)
        if queued.done():  # its client has left
            return
        if refusal is None:
            queued.set_result(None)
        else:
            queued.set_exception(refusal)

    async def _tell_end(self) -> None:
        """Say once why there will be no more answers. The connection ends a little before the process does."""
        for _ in range(100):
            if self.process.poll() is not None:
                break
            await asyncio.sleep(0.05)
        log.error("%s: its process %s; restart the server", FAILED, how_it_ended(self.process.poll()))


def how_it_ended(status: int | None) -> str:
    """A process's end as a verb: by its exit status, negative for a signal; None if it goes on."""
    if status is None:
        return "has closed its connection"
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = "; the system kills processes when memory runs out" if name == "SIGKILL" else ""
    return f"was killed ({name}{hint})"


def handle_records(records: Sequence[logging.LogRecord]) -> None:
    """Log the process's records as if they were this one's."""
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
