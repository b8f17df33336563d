"""Starts a server for runs, in numbered steps, and shuts it down after running answers have finished."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import logging
import pathlib
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from rich.console import Console
from rich.text import Text

from nybble.chat.templates import load_template
from nybble.couplings.check import first_incompatibility
from nybble.data.text.template import Template
from nybble.errors import ServeError
from nybble.installed import pip
from nybble.run.folder import Run
from nybble.serve.app import Limits, make_app
from nybble.serve.connection import Connection
from nybble.serve.engine import Engine, ServedModel
from nybble.serve.guard import KEY, AccessRules, check_open_to
from nybble.serve.metrics import Metrics
from nybble.serve.names import run_names
from nybble.serve.process.messages import EngineFacts, LoadingJob
from nybble.serve.process.start import start_process
from nybble.serve.switching import short_switch_interval
from nybble.terminal import tell

CONNECTIONS = 384  # open at once, besides one for each answer that may wait
GRACE_PERIOD = 3.0  # seconds for clients whose answers were cut off to read why
UNREAD_TIMEOUT = 120  # seconds after which the kernel closes a connection whose client does not read (Linux)
MAX_KEY_BYTES = 65536  # read of a key file, even if it has no line break
ENGINES = ("auto", "decoder", "pipeline", "continuous")


@dataclass(frozen=True)
class Address:
    """Where the server listens, and who may use it."""

    host: str = "127.0.0.1"
    port: int = 8000
    access: AccessRules = field(default_factory=AccessRules)


class Server(uvicorn.Server):
    """uvicorn's server. At the first signal it lets running answers finish; at the second it cuts them off.

    Args:
        config: uvicorn's configuration.
        engine: is started and stopped in the server's event loop.
        console: where messages about the shutdown are printed.
        abort: ends all running requests, each with an error that says so.
        limit: seconds for which running answers may continue after the first signal.
    """

    def __init__(
        self, config: uvicorn.Config, engine: Engine, console: Console, abort: Callable[[], None], limit: float
    ) -> None:
        super().__init__(config)
        self.engine = engine
        self.console, self.abort, self.limit = console, abort, limit
        self.is_urgent = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: Ctrl-C or SIGTERM."""
        again = "running answers are cut off"
        first = "no new requests; running answers finish (Ctrl-C again cuts them off)"
        if not self.is_urgent:
            tell(self.console, Text(again if self.should_exit else first, "dim"), hang=2)
        self.is_urgent = self.should_exit
        self._captured_signals.append(sig)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the engine's worker, then accept connections."""
        await self.engine.worker.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running answers, until a second signal or the limit.

        uvicorn would cut them off by cancelling their tasks, without a response to their clients and with a traceback for each in
        the log.
        """
        urgent = asyncio.ensure_future(self._abort_when_urgent())
        try:
            await super().shutdown(sockets)
        finally:
            urgent.cancel()
            await asyncio.wait([urgent])
            await self.engine.worker.stop()

    async def _abort_when_urgent(self) -> None:
        await _until(lambda: self.is_urgent, self.limit)
        self.abort()
        await _until(lambda: not self.server_state.connections, GRACE_PERIOD)
        for connection in list(self.server_state.connections):  # their clients do not read the error
            connection.transport.abort()
        await _until(lambda: not self.server_state.tasks, GRACE_PERIOD)
        self.force_exit = True


async def _until(reached: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, at most so many seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not reached():
                await asyncio.sleep(0.05)


def serve(
    runs: Sequence[Run], address: Address, console: Console, *, engine: str, device: str, limits: Limits,
    cache: pathlib.Path | None = None, fp8_cache: bool = False, prepare: str = "",
) -> None:  # fmt: skip
    """Serve until interrupted. The engine vllm is `nybble.serve.vllm`'s.

    Args:
        fp8_cache: keys and values in fp8; the decoder on a GPU.
        prepare: a function, as `module:function`, that the generator's process calls before it imports anything else.

    Raises:
        ServeError: the port is taken, others could reach the server without a key, or the engine cannot take these runs.
        RunError, ModelError: the runs cannot be loaded, or not together.
    """
    if engine not in ENGINES:
        raise ServeError(f"there is no engine {engine!r}", fix=f"--engine {', '.join(ENGINES)}, vllm")
    local = check_open_to(address.host, address.access.key)  # 1. who may reach it
    listener = listen(address.host, address.port)  # 2. the port, before minutes go into loading
    try:
        metrics = Metrics()
        with console.status("loading"):  # 3. the model
            loaded = load_engine(
                engine,
                runs,
                metrics,
                device=device,
                queue=limits.queue,
                cache=cache,
                fp8_cache=fp8_cache,
                prepare=prepare,
            )
        try:
            print_summary(console, loaded, address, listener, local)  # 4. what is served, and where
            run_server(loaded, metrics, limits, address.access, listener, console)  # 5. answers
        finally:
            loaded.close()
    finally:
        listener.close()


def load_engine(
    name: str, runs: Sequence[Run], metrics: Metrics, *, device: str, queue: int, cache: pathlib.Path | None = None,
    fp8_cache: bool = False, prepare: str = "",
) -> Engine:  # fmt: skip
    """Load runs into the engine of that name, in a process of its own.

    Raises:
        ServeError: a library lacks something that the server relies on.
        RunError, ModelError: the runs cannot be loaded.
    """
    if (problem := first_incompatibility("serve")) is not None:
        raise ServeError(problem.what, fix=f"{pip()} install {problem.requirement}")
    names = run_names(runs)
    arguments = {
        "engine": name,
        "runs": list(runs),
        "device": device,
        "queue": queue,
        "cache": cache,
        "fp8_cache": fp8_cache,
    }
    worker, facts = start_process(LoadingJob("nybble.serve.loading:load_named", arguments, prepare), metrics)
    with contextlib.ExitStack() as unless_loaded:
        unless_loaded.callback(worker.close)
        templates = {name: load_template(run, facts.folder)[1] for name, run in zip(names, runs, strict=True)}
        unless_loaded.pop_all()
    return Engine(
        facts.name, facts.about, _with_templates(facts, templates), facts.adapters, queue, worker, facts.folder
    )


def _with_templates(facts: EngineFacts, templates: dict[str, Template]) -> dict[str, ServedModel]:
    """The models of a process; the base has the first run's template."""
    first = next(iter(templates.values()))
    return {
        model.name: ServedModel(
            model.name,
            templates.get(model.name, first),
            model.positions,
            model.parent,
            model.rows,
            model.adapter,
            model.system,
        )
        for model in facts.models
    }


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ServeError: the port is in use, or this user may not use it.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_TIMEOUT * 1000)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} of {host} is already in use by another program",
                fix=f"--port {port + 1}, or stop the other program",
            ) from error
        raise ServeError(f"cannot listen on {host}, port {port}: {error.strerror}", fix="--port 8000") from error
    return listener


def print_summary(console: Console, engine: Engine, address: Address, listener: socket.socket, local: bool) -> None:
    """Print the engine, its models and adapters, the addresses of the API and the page, and who may connect."""
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
        tell(console, line)


def run_server(
    engine: Engine, metrics: Metrics, limits: Limits, access: AccessRules, listener: socket.socket, console: Console
) -> None:
    """Serve on a socket until a signal; then let running answers finish."""
    _log_to_stderr()
    with short_switch_interval():
        make_server(engine, metrics, limits, access, console).run(sockets=[listener])


def make_server(engine: Engine, metrics: Metrics, limits: Limits, access: AccessRules, console: Console) -> Server:
    """The server, before it runs."""
    # uvicorn's warnings are about requests, and each request gets a response anyway
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    app, abort = make_app(engine, metrics, limits, access)
    config = uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        access_log=False,  # nybble logs one line per request
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.queue + CONNECTIONS,
    )
    return Server(config, engine, console, abort, limits.timeout + 10)


def read_key(key: str | None, file: pathlib.Path | None) -> str | None:
    """The API key: either `key`, or the first line of a file, or of standard input if the file is `-`.

    Raises:
        ServeError: both are given, the file is missing or has another encoding, or the key is empty or not valid in a header.
    """
    source = None if file is None else "standard input" if str(file) == "-" else str(file)
    if file is not None:
        if key is not None:
            raise ServeError("--api-key and --api-key-file were both given", fix="give one of them")
        try:
            text = sys.stdin.readline(MAX_KEY_BYTES) if str(file) == "-" else _decoded(_read_start(file))
        except OSError as error:
            raise ServeError(f"the API key cannot be read: {error.strerror}", where=source) from error
        except UnicodeDecodeError as error:
            raise ServeError("the API key cannot be read: it is not UTF-8 text", where=source, fix=KEY) from error
        key = next(iter(text.splitlines()), "").strip()
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ServeError("the API key must be printable ASCII without spaces, and not empty", where=source, fix=KEY)
    return key


def _read_start(file: pathlib.Path) -> bytes:
    """The first bytes of a file, as many as a key can have: it may be a pipe from a shell, or a device without an end."""
    with file.open("rb") as stream:
        return stream.read(MAX_KEY_BYTES)


def _decoded(raw: bytes) -> str:
    """A file's text; PowerShell's `>` writes UTF-16, and Windows editors put a byte order mark before UTF-8."""
    is_wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if is_wide else "utf-8-sig")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    for name in ("nybble.serve", "nybble.generate"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)
