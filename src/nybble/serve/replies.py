"""Sends an answer, whole or as a stream, and ends it early if its client disconnects or the server shuts down."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nybble.generate.constraint import GrammarError
from nybble.generate.request import GenerationError
from nybble.serve.answers import Job
from nybble.serve.bodies import ReplyFormat
from nybble.serve.fields import RequestError
from nybble.serve.mailbox import Mailbox, ShuttingDownError

NO_RETRY = {"x-should-retry": "false"}  # otherwise OpenAI's clients would retry, and wait as long again
CLIENT_CLOSED_REQUEST = 499  # for the metrics only, as the client is gone
Made = TypeVar("Made")


class ClientDisconnectedError(Exception):
    """The client disconnected before there was an answer."""


class Abort:
    """Aborts all running requests: their clients get 503, or an error as the last event of their stream."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.mailboxes: weakref.WeakSet[Mailbox] = weakref.WeakSet()

    def watch(self, job: Job) -> None:
        """Abort this job too, now or later."""
        self.mailboxes.add(job.mailbox)
        if self.called.is_set():
            job.mailbox.abort(ShuttingDownError())

    def __call__(self) -> None:
        """Abort everything."""
        self.called.set()
        for mailbox in self.mailboxes:
            mailbox.abort(ShuttingDownError())


async def unless_disconnected(request: Request | None, abort: Abort, work: Coroutine[Any, Any, Made]) -> Made:
    """The result of some work, unless the client disconnects first.

    Args:
        request: its body has been read. None while the body is still being read, which itself notices a disconnect.
        abort: aborts the work when the server shuts down.
        work: what to wait for.

    Raises:
        ClientDisconnectedError: the client has disconnected; the work is cancelled.
        RequestError: the server is shutting down.
    """
    task = asyncio.ensure_future(work)
    aborted = asyncio.ensure_future(abort.called.wait())
    disconnected = None if request is None else asyncio.ensure_future(_disconnect(request))
    futures: set[asyncio.Future[Any]] = {task, aborted} | ({disconnected} if disconnected else set())
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if disconnected is not None and disconnected.done():
            raise ClientDisconnectedError
        raise failure(ShuttingDownError())
    finally:
        for future in futures:
            future.cancel()
        await asyncio.wait(futures)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of one job. Whatever ends the stream, such as a client that left or is too slow, also ends the job."""

    def __init__(self, job: Job, reply: ReplyFormat, headers: dict[str, str]) -> None:
        stream_headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would buffer the pieces
        super().__init__(_events(job, reply), media_type="text/event-stream", headers=stream_headers | headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            async with asyncio.timeout(self.job.timeout + 5):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            self.job.cancel("timeout")  # the client does not read, so the connection is closed without a last event
        finally:
            self.job.cancel()


async def full_response(job: Job, reply: ReplyFormat) -> Response:
    """The response once all answers are complete.

    Raises:
        RequestError: the job failed, or timed out.
    """
    try:
        async for _ in job.pieces():
            pass
    except (TimeoutError, GenerationError) as error:
        raise failure(error, job.timeout) from None
    return JSONResponse(reply.full_body())


async def _events(job: Job, reply: ReplyFormat) -> AsyncIterator[bytes]:
    for event in reply.opening():
        yield event
    try:
        async for piece in job.pieces():
            for event in reply.piece(piece):
                yield event
    except (TimeoutError, GenerationError) as error:
        last = reply.failure(failure(error, job.timeout))
    else:
        last = reply.closing()
    for event in last:
        yield event


def failure(error: TimeoutError | GenerationError, timeout: float = 0.0) -> RequestError:
    """The client's error for a failed answer; `timeout` is the time that it had."""
    if isinstance(error, TimeoutError):
        return RequestError(
            f"not done within {timeout:g} s; ask for fewer tokens, or start the server with a longer --timeout",
            status=408,
            code="timeout",
            headers=NO_RETRY,
        )
    if isinstance(error, GrammarError):  # found only while it was followed
        return RequestError(str(error), code="invalid_value")
    code = "shutting_down" if isinstance(error, ShuttingDownError) else "engine_failed"
    return RequestError(str(error), status=503, code=code, headers=NO_RETRY)
