"""One connection: uvicorn's HTTP/1.1, with an end to those who hold it without a whole request.

uvicorn waits for a request's head and body as long as its sender likes, answers malformed HTTP in plain text, and counts
connections only once they ask something.
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
"""From a connection's beginning to its first byte, from a head's first byte to its last, and from there to the body's last."""
TURNED_AWAY = 2.0  # seconds for a request on a connection that is one too many
LINGER = 2.0  # seconds for which what still comes is read and dropped, so that its sender can read why it was refused
MOST_CRUMBS, CRUMB = 5000, 64  # pieces of a body, after which they have to be of so many bytes on the average
BYTES = re.compile(r"bytearray\((.*)\)")  # as h11 shows what it read
FULL = RequestError(
    "too many connections are open; try again in 1 s",
    status=503,
    code="too_many_connections",
    headers={**CLOSE, "Retry-After": "1"},
)


class Reader(h11.Connection):
    """h11's reader, without bodies in crumbs: 256 kB of single bytes would hold everybody up for 0.5 s."""

    crumbs, size = 0, 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What comes next.

        Raises:
            RemoteProtocolError: it is not HTTP, or a body in thousands of small pieces.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.crumbs, self.size = 0, 0
        elif isinstance(event, h11.Data):
            self.crumbs, self.size = self.crumbs + 1, self.size + len(event.data)
            if self.crumbs > MOST_CRUMBS and self.size < CRUMB * self.crumbs:
                raise h11.RemoteProtocolError("the body comes in too many small chunks")
        return event


class Connection(H11Protocol):
    """uvicorn's protocol with deadlines, OpenAI's errors, and an answer where there are too many connections.

    `limit_concurrency` of its configuration is the number of connections; those beyond get 503, those beyond twice as many
    nothing.
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
        self.most, self.limit_concurrency = config.limit_concurrency, None  # uvicorn's own would turn away everybody
        self.stage: Stage = "answer"
        self.timer: asyncio.TimerHandle | None = None
        self.seconds = SECONDS
        self.is_over = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's call."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self.most:
            transport.abort()
        elif len(self.connections) > self.most:
            self.app = _turn_away
            self.seconds = dict.fromkeys(SECONDS, TURNED_AWAY)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """asyncio's call."""
        if not self.is_over:
            super().data_received(data)
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's call."""
        if self.timer is not None:
            self.timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """uvicorn's call."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's call, while it handles h11's error."""
        error = sys.exception()
        is_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        if is_large:
            self._refuse(f"the headers have more than {HEAD:,} bytes", 431, "headers_too_large")
        else:
            why = BYTES.sub(r"\1", str(error))
            self._refuse(f"this is not HTTP/1.1: {why[:200]}", 400, "invalid_http")

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn's: it would fill the log with advice."""

    def _watch(self) -> None:
        """Set the clock once a part of a request is begun; further bytes of it do not wind it up again."""
        stage = self._find_stage()
        if stage == self.stage:
            return
        if self.timer is not None:
            self.timer.cancel()
        self.stage, self.timer = stage, None
        if stage in self.seconds:
            self.timer = self.loop.call_later(self.seconds[stage], self._give_up)

    def _find_stage(self) -> Stage:
        """Which part of a request is waited for. Between two requests uvicorn has a clock of its own."""
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
        """Answer what never became a request, and end the connection."""
        self.is_over = True
        if self.timer is not None:
            self.timer.cancel()
        if self.cycle is not None:
            self.cycle.disconnected = True  # its body broke off: nothing of it can be answered any more
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
