"""Checks a request's HTTP before anything else does: its length must be unambiguous, and it must have one host and one path.

A proxy that reads a request differently from this server could be tricked into passing on a second one hidden in it (request
smuggling), so ambiguous requests are refused, and their connection is closed.
"""

from __future__ import annotations

import json
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from nybble.serve.fields import RequestError
from nybble.serve.metrics import Metrics

HEADERS, HEAD = 100, 16 * 2**10  # header lines of a request, and bytes of them
TARGET = 8 * 2**10  # bytes of a path with its query
CLOSE = {"Connection": "close"}
HOST = re.compile(rb"(?P<name>[A-Za-z0-9._-]*|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\])(?::(?P<port>[0-9]{1,5}))?")


class WellFormed:
    """Middleware that refuses requests whose length, path or host is ambiguous."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        fault = _fault(scope)
        if fault is None:
            await self.app(scope, receive, send)
            return
        self.metrics.requests.labels("other", str(fault.status)).inc()
        await send_error(fault, send)


async def send_error(error: RequestError, send: Send) -> None:
    """Send an error as a complete response."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def host_name(host: bytes) -> str | None:
    """The name in a Host header, in lower case and without the port; None if it is not a host name."""
    match = HOST.fullmatch(host)
    if match is None or int(match["port"] or 0) > 65535:
        return None
    return match["name"].decode().strip("[]").lower()


def _fault(scope: Scope) -> RequestError | None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    values = dict(headers)
    if scope["http_version"] not in ("1.0", "1.1"):
        return _refusal(f"HTTP/{scope['http_version']} is not supported; use HTTP/1.1")
    if len(headers) > HEADERS or sum(len(name) + len(value) for name, value in headers) > HEAD:
        return _refusal(f"the headers have more than {HEADERS} lines or {HEAD:,} bytes", 431, "headers_too_large")
    if len(scope["raw_path"]) + len(scope["query_string"]) > TARGET:
        return _refusal(f"the path and its query have more than {TARGET:,} bytes", 414, "path_too_long")
    if not scope["raw_path"].startswith(b"/"):
        return _refusal(
            "the request line names no path on this server: send the path alone, as in POST /v1/completions"
        )
    if b"transfer-encoding" in values and (b"content-length" in values or scope["http_version"] == "1.0"):
        return _refusal("the length of the body is ambiguous: send Content-Length or Transfer-Encoding, not both")
    if host_name(values.get(b"host", b"")) is None:
        return _refusal(f"the header Host is not a host name with or without a port: {values[b'host'][:100]!r}")
    return None


def _refusal(message: str, status: int = 400, code: str = "invalid_request") -> RequestError:
    return RequestError(message, status=status, code=code, headers=CLOSE)
