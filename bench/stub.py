"""A generator without a model, for what the server itself costs (`bench.serve_rate`) and for tests of its processes."""

from __future__ import annotations

import pathlib
import threading
import time
from collections.abc import Sequence

from transformers import AutoTokenizer

from nybble.data.text.template import choose_template
from nybble.generate.request import Handle, Observer, Request, Sink, Token
from nybble.serve.engine import AnswerWorker, Engine, ServedModel
from nybble.serve.threaded import InThread

TEXT = "The sea is a large body of salt water, and its waves never rest. " * 4
QUEUE = 256


class StubRow:
    """A request, and how many of its tokens were made."""

    def __init__(self, request: Request, sink: Sink) -> None:
        self.request, self.sink, self.made, self.cancelled = request, sink, 0, False

    def cancel(self) -> None:
        """Stop."""
        self.cancelled = True


class Stub:
    """A generator that gives every row one token a step.

    Args:
        ids: the tokens of every answer, again and again.
        pause: seconds that a step takes at least.
        observer: is notified of the load.
    """

    def __init__(self, ids: Sequence[int], pause: float, observer: Observer) -> None:
        self.vocabulary, self.positions = max(ids) + 1, 1_000_000
        self.ids, self.pause, self.observer = ids, pause, observer
        self.rows: list[StubRow] = []
        self.lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Requests that a step would bring on."""
        return len(self.rows)

    def healthy(self) -> bool:
        """Always."""
        return True

    def worth_waiting_for(self, *, idle: bool) -> tuple[int, float]:
        """None."""
        return 0, 0.0

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these."""
        new = [StubRow(request, sink) for request, sink in zip(requests, sinks, strict=True)]
        with self.lock:
            self.rows += new
        self.observer.load_changed(len(self.rows), 0)
        return list[Handle](new)

    def step(self) -> bool:
        """A token for each row."""
        began = time.perf_counter()
        with self.lock:
            rows = list(self.rows)
        self.observer.batch_started(len(rows))
        for row in rows:
            if not row.made:
                row.sink.begin(0, ())
            row.sink.put(Token(self.ids[row.made % len(self.ids)]))
            row.made += 1
        over = [row for row in rows if row.cancelled or row.made == row.request.max_tokens]
        for row in over:
            row.sink.end("cancelled" if row.cancelled else "length")
        if over:
            with self.lock:
                self.rows = [row for row in self.rows if row not in over]
            self.observer.load_changed(len(self.rows), 0)
        time.sleep(max(0.0, self.pause - (time.perf_counter() - began)))
        return bool(self.rows)

    def close(self) -> None:
        """End all."""
        for row in self.rows:
            row.sink.end("cancelled")
        self.rows = []


def load_stub(observer: Observer, *, folder: pathlib.Path, pause: float) -> Engine:
    """An engine around a stub."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return stub_engine(InThread(Stub(ids, pause, observer)), folder)


def stub_engine(worker: AnswerWorker, folder: pathlib.Path) -> Engine:
    """An engine of one model."""
    template = choose_template(AutoTokenizer.from_pretrained(folder), "alpaca", "alpaca")
    model = ServedModel("stub", template, 1_000_000, None, len(template.tokenizer))
    return Engine("stub", "", {"stub": model}, {}, QUEUE, worker, folder)
