"""One connection: uvicorn's HTTP/1.1 with deadlines for clients that never complete a request.

uvicorn itself waits for headers and body without limit, answers malformed HTTP in plain text, and counts
connections only once they send a request.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from http import HTTPStatus
from typing import Any, Literal

import h11
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from nybble.serve.fields import RequestError
from nybble.serve.wellformed import CLOSE, HEAD, send_error

Stage = Literal["idle", "head", "body", "answer"]
SECONDS: dict[Stage, float] = {"idle": 15, "head": 15, "body": 40}
"""Deadlines: from opening to the first byte, from it to the last byte of the headers, and from there to the body's last."""
TURNED_AWAY = 2.0  # seconds for a request on a connection beyond the limit
LINGER = 2.0  # seconds for which input is still read and dropped, so that the client can read why it was refused
MOST_CHUNKS, CHUNK = 5000, 64  # beyond so many chunks of a body, they must have so many bytes on average
BYTES = re.compile(r"bytearray\((.*)\)")  # how h11 prints the bytes it read
FULL = RequestError(
    "too many connections are open; try again in 1 s",
    status=503,
    code="too_many_connections",
    headers={**CLOSE, "Retry-After": "1"},
)


class Reader(h11.Connection):
    """h11's reader; it refuses bodies in tiny chunks: 256 kB in single bytes would block all connections for 0.5 s."""

    chunks, size = 0, 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event of the protocol.

        Raises:
            RemoteProtocolError: the input is not HTTP, or a body in thousands of small chunks.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks, self.size = 0, 0
        elif isinstance(event, h11.Data):
            self.chunks, self.size = self.chunks + 1, self.size + len(event.data)
            if self.chunks > MOST_CHUNKS and self.size < CHUNK * self.chunks:
                raise h11.RemoteProtocolError("the body comes in too many small chunks")
        return event


class Connection(H11Protocol):
    """uvicorn's protocol with deadlines, errors in OpenAI's format, and an answer when too many connections are open.

    The configuration's `limit_concurrency` is the number of connections; further ones get 503, and those beyond twice the limit
    are closed at once.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert config.limit_concurrency is not None, "a server has a limit"
        self.conn = Reader(h11.SERVER, HEAD)
        self.most, self.limit_concurrency = config.limit_concurrency, None  # uvicorn's own limit would refuse everybody
        self.stage: Stage = "answer"
        self.timer: asyncio.TimerHandle | None = None
        self.seconds = SECONDS
        self.is_over = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self.most:
            transport.abort()
        elif len(self.connections) > self.most:
            self.app = _turn_away
            self.seconds = dict.fromkeys(SECONDS, TURNED_AWAY)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if not self.is_over:
            super().data_received(data)
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        if self.timer is not None:
            self.timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Called by uvicorn."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles an error of h11."""
        error = sys.exception()
        is_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        if is_large:
            self._refuse(f"the headers have more than {HEAD:,} bytes", 431, "headers_too_large")
        else:
            why = BYTES.sub(r"\1", str(error))
            self._refuse(f"this is not HTTP/1.1: {why[:200]}", 400, "invalid_http")

    def _unsupported_upgrade_warning(self) -> None:
        """Called by uvicorn, whose own version fills the log with advice."""

    def _watch(self) -> None:
        """Start the deadline when a part of a request begins; further bytes of that part do not extend it."""
        stage = self._find_stage()
        if stage == self.stage:
            return
        if self.timer is not None:
            self.timer.cancel()
        self.stage, self.timer = stage, None
        if stage in self.seconds:
            self.timer = self.loop.call_later(self.seconds[stage], self._give_up)

    def _find_stage(self) -> Stage:
        """Which part of a request is awaited. Between two requests, uvicorn's own keep-alive timeout applies."""
        if self.transport.is_closing() or self.is_over:
            return "answer"
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is not h11.IDLE:
            return "answer"
        begun, _ = self.conn.trailing_data
        if begun:
            return "head"
        return "idle" if self.cycle is None else "answer"

    def _give_up(self) -> None:
        if self.stage == "head":
            self._refuse("the request's headers did not arrive in time", 408, "timeout")
        else:
            self.transport.close()

    def _refuse(self, message: str, status: int, code: str) -> None:
        """Answer input that never became a request, and close the connection."""
        self.is_over = True
        if self.timer is not None:
            self.timer.cancel()
        if self.cycle is not None:
            self.cycle.disconnected = True  # its body broke off, so it cannot be answered any more
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way, or was given
            self.transport.close()
            return
        body = json.dumps(RequestError(message, status=status, code=code).body()).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        events = (
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self.timer = self.loop.call_later(LINGER, self.transport.close)


async def _turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    await send_error(FULL, send)
