"""The generator's process: loads an engine, computes what the server submits, and ends when the server does."""

from __future__ import annotations

import logging
import os
import pickle
import pkgutil
import signal
import socket
import sys
import threading
import traceback
from logging.handlers import QueueHandler
from types import FrameType
from typing import Any

from nybble.generate.lost import why_card_is_lost
from nybble.generate.request import BusyError, GenerationError
from nybble.serve.engine import Engine
from nybble.serve.process.messages import (
    Cancellation,
    EngineFacts,
    FirstMessage,
    LoadingJob,
    ModelFacts,
    Submission,
    Unpacker,
    receive,
)
from nybble.serve.process.outbox import Outbox, RemoteSink
from nybble.serve.switching import SWITCH_INTERVAL
from nybble.serve.threaded import InThread


def run(descriptor: int) -> None:
    """Run the process until the server ends it.

    Args:
        descriptor: the file descriptor of the socket that the server has the other end of.
    """
    os.set_inheritable(descriptor, False)  # the server must see the end of this process, whatever it has started
    Child(socket.socket(fileno=descriptor)).run()


class Child:
    """The process: the main thread loads, one reads what the server sends, one computes, one sends."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unpacker = Unpacker()
        self.outbox = Outbox(connection)
        self.engine: Engine | None = None
        self.sinks: dict[int, RemoteSink] = {}
        self.is_orphan = False

    def run(self) -> None:
        """Load, then compute until the server ends."""
        self._leave_signals_to_the_server()
        sys.setswitchinterval(SWITCH_INTERVAL)
        threading.excepthook = self._end_with_defect
        logging.getLogger().addHandler(QueueHandler(self.outbox))  # type: ignore[arg-type]  # only put_nowait is called
        for name in ("nybble.serve", "nybble.generate"):
            logging.getLogger(name).setLevel(logging.INFO)
        messages = receive(self.connection, self.unpacker)
        if messages is None:
            return
        reader = threading.Thread(target=self._read, name="nybble-reader")
        reader.start()
        try:
            self._load(messages[0])
        except BaseException as error:  # noqa: BLE001 - a process's end: the server raises it again, whatever it is
            if not self.is_orphan:
                self.outbox.end(not_loaded=portable(error))
            os._exit(1)
        reader.join()

    def _leave_signals_to_the_server(self) -> None:
        """Ctrl-C and SIGTERM may reach both processes, and running answers are to be finished: the server's end is the signal."""
        signal.signal(signal.SIGTERM, self._end_if_orphan)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform != "win32":  # the server has blocked it before it could be ignored
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    def _end_if_orphan(self, number: int, frame: FrameType | None) -> None:
        if self.is_orphan:
            raise SystemExit(1)  # through what is being loaded, so that no half of a file stays in the cache

    def _load(self, start: FirstMessage) -> None:
        sys.path[:] = start.path
        job: LoadingJob = pickle.loads(start.job)
        if job.prepare:
            pkgutil.resolve_name(job.prepare)()
        engine: Engine = pkgutil.resolve_name(job.load)(self.outbox, **job.arguments)
        assert isinstance(engine.worker, InThread), "the job loads an engine that computes in this process"
        self.engine = engine
        self.outbox.loaded(engine_facts(engine), engine.healthy)

    def _read(self) -> None:
        while (messages := receive(self.connection, self.unpacker)) is not None:
            for message in messages:
                self._obey(message)
        self.is_orphan = True
        if self.engine is not None:  # every answer has ended, or nobody is there to read it
            os._exit(0)
        if sys.platform != "win32":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _obey(self, message: Any) -> None:
        if isinstance(message, Submission):
            self._submit(message)
        elif isinstance(message, Cancellation):
            for sink in [self.sinks[number] for number in message.answers if number in self.sinks]:
                if sink.handle is not None:
                    sink.handle.cancel()

    def _submit(self, submission: Submission) -> None:
        assert self.engine is not None, "the server submits once the engine is loaded"
        assert isinstance(self.engine.worker, InThread), "checked when it was loaded"
        sinks = [RemoteSink(number, self.outbox, self._forget, self._check_card) for number, _ in submission.requests]
        self.sinks |= {number: sink for (number, _), sink in zip(submission.requests, sinks, strict=True)}
        requests = [request for _, request in submission.requests]
        refusal: Exception | None = None
        try:
            handles = self.engine.worker.thread.submit(requests, sinks)
        except (BusyError, GenerationError) as error:
            refusal = error
            for number, _ in submission.requests:
                self._forget(number)
        else:
            for sink, handle in zip(sinks, handles, strict=True):
                sink.handle = handle
        self.outbox.reply(submission.number, refusal)

    def _forget(self, number: int) -> None:
        self.sinks.pop(number, None)

    def _end_with_defect(self, arguments: threading.ExceptHookArgs) -> None:
        """End the process after an unexpected error in one of its threads; the generator has ended its answers."""
        error = arguments.exc_value
        self._end_if_card_is_lost(error)
        text = "".join(traceback.format_exception(error)) if error is not None else str(arguments.exc_type)
        self._end(f"because of an unexpected error; restart the server\n{text.rstrip()}")

    def _check_card(self, failure: GenerationError) -> None:
        self._end_if_card_is_lost(failure.__cause__)

    def _end_if_card_is_lost(self, error: BaseException | None) -> None:
        """End the process if this error has left the card unusable: every later answer would fail, each with a traceback."""
        if (why := why_card_is_lost(error)) is not None:
            self._end(f"because the GPU is lost ({why}); restart the server")

    def _end(self, why: str) -> None:
        self.outbox.end(why=why)
        os._exit(1)


def engine_facts(engine: Engine) -> EngineFacts:
    """What the server must know of an engine."""
    models = [
        ModelFacts(model.name, model.positions, model.parent, model.rows, model.adapter, model.system)
        for model in engine.models.values()
    ]
    return EngineFacts(engine.name, engine.about, models, engine.adapters, engine.folder)


def portable(error: BaseException) -> BaseException:
    """An error that can be pickled, with its traceback as a note: the server raises it again."""
    note = "in the generator's process:\n" + "".join(traceback.format_exception(error))
    try:
        copy: BaseException = pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, TypeError, AttributeError):  # Rust's panics, and classes whose arguments are not kept
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(note)
    return copy
