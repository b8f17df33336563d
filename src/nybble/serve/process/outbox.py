"""Collects what happens in the generator's process, and sends it to the server: one report for each step."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from nybble.generate.request import Finish, GenerationError, Handle, Token
from nybble.serve.process.messages import EngineFacts, Item, PromptFacts, Report, pack

GATHER = (
    0.0005  # seconds from the first token of a step until it is sent, with the others: 64 are handed over in 0.2 ms
)
CHECK = 1.0  # seconds after which an idle process looks whether its generator still is healthy


class Outbox:
    """What is to be sent; a thread of its own sends it, so that a server that reads slowly never holds a step up.

    It is also the generator's observer, and where log records go.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._report = Report()
        self._changed = threading.Condition()
        self._has_news = False
        self._sending = threading.Lock()
        self._healthy: Callable[[], bool] | None = None
        self._was_healthy = True
        self._thread = threading.Thread(target=self._work, name="nybble-outbox", daemon=True)
        self._thread.start()

    def item(self, answer: int, item: Item) -> None:
        """A token of an answer, or its end."""
        with self._changed:
            self._report.items.append((answer, item))
            self._notify()

    def reply(self, submission: int, refusal: Exception | None) -> None:
        """Whether requests were queued."""
        with self._changed:
            self._report.replies.append((submission, refusal))
            self._notify()

    def batch_started(self, rows: int) -> None:
        """See `nybble.generate.request.Observer`; sent with what comes next."""
        with self._changed:
            self._report.batches.append(rows)

    def load_changed(self, running: int, waiting: int) -> None:
        """See `nybble.generate.request.Observer`."""
        with self._changed:
            self._report.load = (running, waiting)
            self._notify()

    def put_nowait(self, record: logging.LogRecord) -> None:
        """A log record; called by logging's QueueHandler."""
        with self._changed:
            self._report.records.append(record)
            self._notify()

    def loaded(self, facts: EngineFacts, healthy: Callable[[], bool]) -> None:
        """The engine was loaded.

        Args:
            facts: what the server must know.
            healthy: whether the generator can answer; asked after every report, and every second.
        """
        self._healthy = healthy
        with self._changed:
            self._report.loaded = facts
            self._notify()

    def end(self, *, not_loaded: BaseException | None = None, why: str = "") -> None:
        """The last report, sent at once: why the process ends."""
        with self._changed:
            self._report.not_loaded, self._report.why_ended = not_loaded, why
        self._send()

    def _notify(self) -> None:
        if not self._has_news:
            self._has_news = True
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news, timeout=CHECK)
            time.sleep(GATHER)
            self._check_health()
            if self._has_news and not self._send():
                return

    def _check_health(self) -> None:
        healthy = self._healthy is None or self._healthy()
        if healthy != self._was_healthy:
            self._was_healthy = healthy
            with self._changed:
                self._report.healthy = healthy
                self._notify()

    def _send(self) -> bool:
        """Send what there is. False if the server has ended; the thread that reads from it then ends the process."""
        with self._sending:
            with self._changed:
                report, self._report, self._has_news = self._report, Report(), False
            try:
                self._connection.sendall(pack(report))
            except ConnectionError:
                return False
        return True


class RemoteSink:
    """One answer's sink in the generator's process."""

    def __init__(
        self, number: int, outbox: Outbox, ended: Callable[[int], object], failed: Callable[[GenerationError], object]
    ) -> None:
        self._number, self._outbox, self._ended, self._failed = number, outbox, ended, failed
        self.handle: Handle | None = None
        """For cancelling; set once the request was submitted."""

    def begin(self, cached: int, prompt: Sequence[Token]) -> None:
        """Send what there is to say of the prompt."""
        self._outbox.item(self._number, PromptFacts(cached, prompt))

    def put(self, token: Token) -> None:
        """Send a token."""
        is_plain = token.logprob is None and not token.top
        self._outbox.item(self._number, token.id if is_plain else token)

    def end(self, finish: Finish) -> None:
        """Send why the answer ended."""
        self._ended(self._number)
        self._outbox.item(self._number, finish)

    def fail(self, error: GenerationError) -> None:
        """Send why the answer failed; its cause stays here, as the log has it."""
        self._ended(self._number)
        self._outbox.item(self._number, error)
        self._failed(error)
