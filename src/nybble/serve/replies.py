"""How an answer goes out, whole or in pieces; and how its reader's leaving, or the server's end, ends it."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nybble.generate.request import GenerationError
from nybble.serve.answers import Job
from nybble.serve.bodies import ReplyFormat
from nybble.serve.fields import RequestError
from nybble.serve.mailbox import Mailbox, ShuttingDownError

NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would ask again, and wait as long again
LEFT = 499  # nobody reads it; it stands in the metrics
Made = TypeVar("Made")


class LeftError(Exception):
    """The sender is gone before there was an answer."""


class CutOff:
    """The moment at which all that is under way is broken off: its senders get 503, or an error as the last of their events."""

    def __init__(self) -> None:
        self.come = asyncio.Event()
        self.mailboxes: weakref.WeakSet[Mailbox] = weakref.WeakSet()

    def watch(self, job: Job) -> None:
        """Break this off too, when it comes to that."""
        self.mailboxes.add(job.mailbox)
        if self.come.is_set():
            job.mailbox.break_off(ShuttingDownError())

    def __call__(self) -> None:
        """Now."""
        self.come.set()
        for mailbox in self.mailboxes:
            mailbox.break_off(ShuttingDownError())


async def while_there(request: Request | None, cut_off: CutOff, work: Coroutine[Any, Any, Made]) -> Made:
    """The result of some work, unless its sender leaves before.

    Args:
        request: its body has been read; None where it is still being read, which tells when its sender leaves.

    Raises:
        LeftError: the sender is gone; the work is cancelled.
        RequestError: the server ends.
    """
    task = asyncio.ensure_future(work)
    over = asyncio.ensure_future(cut_off.come.wait())
    gone = None if request is None else asyncio.ensure_future(_gone(request))
    everything: set[asyncio.Future[Any]] = {task, over} | ({gone} if gone else set())
    try:
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone is not None and gone.done():
            raise LeftError
        raise failure(ShuttingDownError())
    finally:
        for each in everything:
            each.cancel()
        await asyncio.wait(everything)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of one job: whatever ends it, a reader that is gone or too slow included, ends the job."""

    def __init__(self, job: Job, shape: ReplyFormat, headers: dict[str, str]) -> None:
        own = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold the pieces back
        super().__init__(_events(job, shape), media_type="text/event-stream", headers=own | headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            async with asyncio.timeout(self.job.timeout + 5):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            self.job.cancel("timeout")  # the reader does not read: the connection is closed without an end
        finally:
            self.job.cancel()


async def whole(job: Job, shape: ReplyFormat) -> Response:
    """The answer once it is made.

    Raises:
        RequestError: it could not be made, or not in time.
    """
    try:
        async for _ in job.pieces():
            pass
    except (TimeoutError, GenerationError) as error:
        raise failure(error, job.timeout) from None
    return JSONResponse(shape.whole())


async def _events(job: Job, shape: ReplyFormat) -> AsyncIterator[bytes]:
    for event in shape.opening():
        yield event
    try:
        async for piece in job.pieces():
            for event in shape.piece(piece):
                yield event
    except (TimeoutError, GenerationError) as error:
        last = shape.failure(failure(error, job.timeout))
    else:
        last = shape.closing()
    for event in last:
        yield event


def failure(error: TimeoutError | GenerationError, timeout: float = 0.0) -> RequestError:
    """Why there is no answer; `timeout` is the time that it had."""
    if isinstance(error, TimeoutError):
        return RequestError(
            f"not done within {timeout:g} s; ask for fewer tokens, or start the server with a longer --timeout",
            status=408,
            code="timeout",
            headers=NO_RETRY,
        )
    code = "shutting_down" if isinstance(error, ShuttingDownError) else "engine_failed"
    return RequestError(str(error), status=503, code=code, headers=NO_RETRY)
