"""From runs to a server that listens, as numbered steps; and its end, which lets running answers finish."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import logging
import pathlib
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from rich.console import Console
from rich.text import Text

from nybble.couplings.check import unmet
from nybble.errors import ServeError
from nybble.installed import pip
from nybble.run.folder import Run
from nybble.serve.app import Limits, make_app
from nybble.serve.connection import Connection
from nybble.serve.engine import Engine
from nybble.serve.guard import KEY, AccessRules, check_open_to
from nybble.serve.loading import load_continuous, load_pipeline
from nybble.serve.metrics import Metrics
from nybble.serve.vllm import become_vllm
from nybble.terminal import tell as tell_line

CONNECTIONS = 384  # open at once, beside one for each answer that may wait
FAREWELL = 3.0  # seconds for those cut off to read why
SILENT = 120  # seconds after which the kernel ends a connection whose reader takes nothing of what is sent (Linux)
LONGEST = 65536  # bytes of a key, even in a file without a line's end
ENGINES = ("pipeline", "continuous", "vllm")
TURN = 0.0002
"""Seconds for which a thread keeps the interpreter from another that waits for it; CPython's own is 5 ms. Generation is Python
between one small kernel and the next, and who sends a token waits for it. On an H200 a served token took 4 to 13 ms more than one
of generate alone, whichever model and engine (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Address:
    """Where the server listens, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    access: AccessRules = field(default_factory=AccessRules)


class Server(uvicorn.Server):
    """uvicorn, whose first signal lets running answers finish and whose second one cuts them off.

    Args:
        cut_off: breaks off what is under way, each with an answer that says so.
        limit: seconds for which running answers may go on after the first signal.
    """

    def __init__(self, config: uvicorn.Config, console: Console, cut_off: Callable[[], None], limit: float) -> None:
        super().__init__(config)
        self.console, self.cut_off, self.limit = console, cut_off, limit
        self.is_urgent = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal, Ctrl-C or SIGTERM."""
        again = "running answers are cut off"
        first = "no new requests; running answers finish (Ctrl-C again cuts them off)"
        if not self.is_urgent:
            tell_line(self.console, Text(again if self.should_exit else first, "dim"), hang=2)
        self.is_urgent = self.should_exit
        self._captured_signals.append(sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running answers, as long as that is wished.

        uvicorn's own way to cut them off cancels their tasks, which gives their readers nothing and the log a traceback for each.
        """
        urgent = asyncio.ensure_future(self._cut_off_when_urgent())
        try:
            await super().shutdown(sockets)
        finally:
            urgent.cancel()
            await asyncio.wait([urgent])

    async def _cut_off_when_urgent(self) -> None:
        await _until(lambda: self.is_urgent, self.limit)
        self.cut_off()
        await _until(lambda: not self.server_state.connections, FAREWELL)
        for connection in list(self.server_state.connections):  # who does not read what it is told
            connection.transport.abort()
        await _until(lambda: not self.server_state.tasks, FAREWELL)
        self.force_exit = True


async def _until(reached: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, no longer than that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not reached():
                await asyncio.sleep(0.05)


def serve(
    runs: Sequence[Run], address: Address, console: Console, *, engine: str, device: str, limits: Limits,
    cache: pathlib.Path | None = None,
) -> None:  # fmt: skip
    """Listen until interrupted; with vllm, become vLLM's server.

    Raises:
        ServeError: the port is taken, others could reach the server without a key, or the engine cannot take these runs.
        RunError, ModelError: the runs cannot be loaded, or not together.
    """
    if engine not in ENGINES:
        raise ServeError(f"there is no engine {engine!r}", fix=f"--engine {', '.join(ENGINES)}")
    if engine == "vllm":
        if limits != Limits() or device != "auto" or address.access.origins or address.access.hosts:
            raise ServeError(
                "--queue, --timeout, --device, --log-prompts, --allow-origin and --allow-host are for nybble's own server; "
                "vLLM has its own options",
                fix="omit them, or --engine pipeline",
            )
        become_vllm(runs, address.host, address.port, address.access.key)
    local = check_open_to(address.host, address.access.key)  # 1. who may reach it
    listener = listen(address.host, address.port)  # 2. the port, before minutes go into loading
    try:
        metrics = Metrics()
        with console.status("loading"):  # 3. the model
            loaded = load_engine(engine, runs, metrics, device=device, queue=limits.queue, cache=cache)
        try:
            tell(console, loaded, address, listener, local)  # 4. what there is
            run_server(loaded, metrics, limits, address.access, listener, console)  # 5. answers
        finally:
            loaded.close()
    finally:
        listener.close()


def load_engine(
    name: str, runs: Sequence[Run], metrics: Metrics, *, device: str, queue: int, cache: pathlib.Path | None = None
) -> Engine:
    """The engine of that name.

    Raises:
        ServeError: a library without what the server relies upon.
        RunError, ModelError: as the engine's.
    """
    if (misfit := unmet("serve")) is not None:
        raise ServeError(misfit.what, fix=f"{pip()} install {misfit.requirement}")
    if name == "continuous":
        return load_continuous(runs, metrics, device=device, queue=queue, cache=cache)
    return load_pipeline(runs, metrics, device=device, queue=queue, cache=cache)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        ServeError: the port is taken or may not be taken.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT * 1000)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} of {host} is taken by another program",
                fix=f"--port {port + 1}, or stop the other program",
            ) from error
        raise ServeError(f"cannot listen on {host}, port {port}: {error.strerror}", fix="--port 8000") from error
    return listener


def tell(console: Console, engine: Engine, address: Address, listener: socket.socket, local: bool) -> None:
    """Engine and why, models, address, page."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    tuned = [model.name for model in engine.models.values() if model.parent is not None]
    bases = [model.name for model in engine.models.values() if model.parent is None]
    lines = [
        f"engine    {engine.name}: {engine.about}",
        f"models    {', '.join(tuned)}" + (f"; the base as {', '.join(bases)}" if bases else ""),
        *(
            f"adapter   {changes}" + (f" ({name})" if len(tuned) > 1 else "")
            for name, changes in engine.adapters.items()
        ),
        f"address   http://{shown}:{port}/v1" + ("" if address.access.key else "   (no key needed)"),
        f"page      http://{shown}:{port}/",
        "access    accepts connections from this machine only"
        if local
        else "access    accepts connections from other machines, with the API key",
    ]
    for line in lines:
        tell_line(console, line)


def run_server(
    engine: Engine, metrics: Metrics, limits: Limits, access: AccessRules, listener: socket.socket, console: Console
) -> None:
    """Serve on a socket until a signal; then let running answers finish."""
    _log_to_stderr()
    with short_turns():
        make_server(engine, metrics, limits, access, console).run(sockets=[listener])


def make_server(engine: Engine, metrics: Metrics, limits: Limits, access: AccessRules, console: Console) -> Server:
    """The server, which does not listen yet."""
    # uvicorn's warnings are about requests, each of which gets its answer
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    app, cut_off = make_app(engine, metrics, limits, access)
    config = uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        access_log=False,  # nybble writes a line an answer
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.queue + CONNECTIONS,
    )
    return Server(config, console, cut_off, limits.timeout + 10)


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Meanwhile threads give way to each other after TURN."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def read_key(key: str | None, file: pathlib.Path | None) -> str | None:
    """The API key: given, or the first line of a file, or of standard input where the file is `-`.

    Raises:
        ServeError: both are given, the file is missing or of another encoding, or the key is empty or holds what a header cannot.
    """
    source = None if file is None else "standard input" if str(file) == "-" else str(file)
    if file is not None:
        if key is not None:
            raise ServeError("--api-key and --api-key-file were both given", fix="one of them")
        try:
            text = sys.stdin.readline(LONGEST) if str(file) == "-" else _decoded(_beginning(file))
        except OSError as error:
            raise ServeError(f"the API key cannot be read: {error.strerror}", where=source) from error
        except UnicodeDecodeError as error:
            raise ServeError("the API key cannot be read: it is no UTF-8 text", where=source, fix=KEY) from error
        key = next(iter(text.splitlines()), "").strip()
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ServeError("the API key must be printable ASCII without spaces, and not empty", where=source, fix=KEY)
    return key


def _beginning(file: pathlib.Path) -> bytes:
    """As much of a file as a key can have: what a shell hands over is a pipe, and a device may have no end."""
    with file.open("rb") as stream:
        return stream.read(LONGEST)


def _decoded(raw: bytes) -> str:
    """A file's text; PowerShell's `>` writes UTF-16, and Windows' editors mark UTF-8."""
    is_wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if is_wide else "utf-8-sig")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    for name in ("nybble.serve", "nybble.generate"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)
