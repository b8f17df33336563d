"""Which requests are accepted: API key, Host header, origin, and size of the body."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.errors import ServeError
from nybble.serve.fields import RequestError
from nybble.serve.metrics import Metrics
from nybble.serve.wellformed import CLOSE, host_name, send_error

BODY = 4 * 2**20  # bytes of a request; 128,000 tokens of English are half a megabyte
DRAIN = (
    64 * 2**20
)  # bytes of a body that is too large which are read and dropped, so that its sender can read the answer
PATIENCE = 30  # seconds for a request's body to arrive
OPEN = {"/", "/health"}  # need no key: the page has no secrets and shows nothing until it is given a key
ROUTES = {*OPEN, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"}
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*]+")
UTF_8 = re.compile(r'charset="?(utf-?8|us-ascii)"?')
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
KEY = "python -c 'import secrets; print(secrets.token_urlsafe())' > key.txt, then --api-key-file key.txt"


def addresses(host: str) -> list[str]:
    """The addresses that a host name resolves to.

    Raises:
        ServeError: it does not resolve.
    """
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        raise ServeError(
            f"--host {host} is not an address of a machine: {error.strerror}", fix="--host 127.0.0.1"
        ) from error


def check_open_to(host: str, key: str | None) -> bool:
    """Whether only this machine can reach the server.

    Raises:
        ServeError: others could, and there is no key.
    """
    local = all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses(host))
    if not local and not key:
        raise ServeError(
            f"--host {host} lets other machines in, but there is no API key: anyone could use this GPU",
            fix=f"{KEY}; or omit --host, to accept connections from this machine only",
        )
    return local


@dataclass(frozen=True)
class AccessRules:
    """Who may use the server."""

    key: str | None = None
    origins: tuple[str, ...] = ()
    """Origins of web pages that may send requests, such as https://app.example; * is any."""
    hosts: tuple[str, ...] = ()
    """Host names that requests without a key may use, besides this machine's own."""


def make_access_rules(key: str | None, origins: Sequence[str], hosts: Sequence[str]) -> AccessRules:
    """The rules that the command line's options describe.

    Raises:
        ServeError: an origin or a host is malformed, or every page is allowed without a key.
    """
    cleaned = tuple(origin.rstrip("/").lower() for origin in origins)
    for origin, given in zip(cleaned, origins, strict=True):
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ServeError(
                f"--allow-origin {given} is not the origin of a web page: a scheme and a host, without a path",
                fix="--allow-origin https://app.example, or --allow-origin http://localhost:3000",
            )
    if "*" in cleaned and not key:
        raise ServeError(
            "--allow-origin '*' without an API key lets any web page opened in a browser here use this model",
            fix=f"{KEY}; or name the pages: --allow-origin https://app.example",
        )
    for host in hosts:
        if not HOST.fullmatch(host):
            raise ServeError(
                f"--allow-host {host} is not a host name: no scheme, no port, no path",
                fix="--allow-host gpu.example",
            )
    return AccessRules(key, cleaned, tuple(host.lower() for host in hosts))


def open_to(origins: Sequence[str], app: ASGIApp) -> ASGIApp:
    """The application with CORS for web pages of these origins.

    It wraps the guard, since a browser's preflight request comes without the key.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], allow_private_network=True,
        expose_headers=["x-nybble-ignored", "retry-after"],
    )  # fmt: skip


class Guard:
    """Middleware that sees each request first: it counts it, and refuses it if the key is wrong or missing.

    Without a key, the server answers this machine only, and only under its own names and those allowed by --allow-host: a site
    whose name resolves to 127.0.0.1 (DNS rebinding) is refused.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, access: AccessRules) -> None:
        self.app, self.metrics, self.hosts = app, metrics, access.hosts
        self.key = access.key.encode() if access.key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        route = path if path in ROUTES else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(path, scope["headers"])
        if refusal is None:
            await self.app(scope, receive, counted)
        else:
            await send_error(refusal, counted)

    def _refusal(self, path: str, headers: list[tuple[bytes, bytes]]) -> RequestError | None:
        if self.key is None:
            host = dict(headers).get(b"host", b"")
            name = host_name(host) or ""
            if not _is_this_machine(name) and name not in self.hosts:
                known = ", ".join(["localhost", "127.0.0.1", *self.hosts])
                return RequestError(
                    f"this server answers to {known}, not to {host.decode('latin-1')[:100]!r}; start it with "
                    "--allow-host NAME, or with an API key",
                    status=403,
                    code="wrong_host",
                )
            return None
        given = [value for name, value in headers if name == b"authorization"]
        if path in OPEN or (len(given) == 1 and hmac.compare_digest(_token(given[0]), self.key)):
            return None
        return RequestError(
            "wrong or missing API key; send the header Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: Request) -> bytes:
    """The body of a JSON request.

    Raises:
        RequestError: it is not JSON, too large, or too slow.
    """
    _check_encoding(request)
    declared = int(request.headers.get("content-length", 0))  # h11 has read it already
    asks_first = "expect" in request.headers  # Expect: 100-continue, the client waits before it sends the body
    if declared > DRAIN or (declared > BODY and asks_first):
        raise _too_large()
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                size += len(part)
                if size <= BODY:
                    body += part
                elif size > DRAIN:
                    break
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {PATIENCE} s", status=408, headers=CLOSE) from None
    except ClientDisconnect:
        raise RequestError("the body was cut off", headers=CLOSE) from None
    if size > BODY:
        raise _too_large()
    return bytes(body)


def _check_encoding(request: Request) -> None:
    """Refuse a body that is not plain JSON in UTF-8, by its headers."""
    kind, *parameters = (part.strip().lower() for part in request.headers.get("content-type", "").split(";"))
    if kind != "application/json":  # a form on another site's page cannot send this
        raise RequestError(f"Content-Type is {kind[:100] or 'missing'}; send application/json", status=415)
    odd = next((part for part in parameters if part.startswith("charset=") and not UTF_8.fullmatch(part)), "")
    if odd:
        raise RequestError(f"Content-Type says {odd[:100]}; send JSON in UTF-8", status=415)
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed != "identity":
        raise RequestError(f"Content-Encoding is {packed[:100]}; send the body as it is", status=415)


def _too_large() -> RequestError:
    return RequestError(f"the body has more than {BODY:,} bytes", status=413, code="body_too_large", headers=CLOSE)


def _token(authorization: bytes) -> bytes:
    """The token after Bearer, in any case; empty for other schemes."""
    scheme, _, token = authorization.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _is_this_machine(name: str) -> bool:
    """Whether the name is localhost or a loopback address, which nobody else can point to this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
