"""Starts the generator's process, and waits until its engine is loaded."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

from nybble.errors import ServeError
from nybble.generate.request import Observer
from nybble.installed import module_command
from nybble.serve.process.messages import EngineFacts, FirstMessage, LoadingJob, Report, Unpacker, pack, receive
from nybble.serve.process.remote import RemoteWorker, handle_records, how_it_ended


def start_process(job: LoadingJob, observer: Observer) -> tuple[RemoteWorker, EngineFacts]:
    """Start a process that loads an engine; returns once it is loaded.

    Args:
        job: what the process loads.
        observer: is notified of the generator's load here, in the event loop.

    Raises:
        ServeError: this is Windows, or the process ended before the engine was loaded.
        Exception: whatever the job raised.
    """
    if os.name == "nt":  # which hands no socket and no blocked signal to a process
        raise ServeError("nybble serve needs Linux or macOS", fix="nybble serve in the Windows Subsystem for Linux")
    ours, its = socket.socketpair()
    with its:
        command = module_command("nybble.serve.process", str(its.fileno()))
        with _interrupts_blocked():
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()])
    worker = RemoteWorker(process, ours, observer)
    with contextlib.ExitStack() as unless_loaded:
        unless_loaded.callback(worker.close)
        with contextlib.suppress(ConnectionError):  # it has ended already, which the next line tells
            ours.sendall(pack(FirstMessage(sys.path, pickle.dumps(job))))
        facts = _wait_until_loaded(ours, process)
        unless_loaded.pop_all()
    return worker, facts


def _wait_until_loaded(connection: socket.socket, process: subprocess.Popen[bytes]) -> EngineFacts:
    unpacker = Unpacker()
    while (reports := receive(connection, unpacker)) is not None:
        for report in reports:
            assert isinstance(report, Report), "the process sends nothing else"
            handle_records(report.records)
            if report.not_loaded is not None:
                raise report.not_loaded
            if report.why_ended:
                raise RuntimeError(f"the generator's process ended {report.why_ended}")
            if report.loaded is not None:
                return report.loaded
    raise ServeError(
        f"the process that loads the model {how_it_ended(process.wait())}",
        fix="if the machine ran out of memory: a smaller base, or --device cpu",
    )


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C: a process that is started meanwhile begins with it blocked, so that it cannot end before it ignores it."""
    if sys.platform != "win32":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        yield
