"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nybble.data.tokens import check_ids, encode_prompt, encode_text
from nybble.errors import DataError
from nybble.serve.answers import Job
from nybble.serve.bodies import DONE, chunks, closing, event, model_entry, opening, whole
from nybble.serve.engine import BusyError, Engine, GenerationError, Model
from nybble.serve.guard import Guard, read_body
from nybble.serve.metrics import CONTENT_TYPE, Metrics
from nybble.serve.protocol import ChatRequest, CompletionRequest, RequestError, parse

NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would ask again, and wait as long again
SAFE = {
    # the page loads nothing, and nothing may frame it
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What requests may take."""

    timeout: float = 600.0
    """Seconds from request to last token."""
    log_prompts: bool = False
    queue: int = 128
    """Answers that may wait; more are sent away."""


class EventStream(StreamingResponse):
    """Server-sent events of one job: whatever ends it, a reader that is gone or too slow included, ends the job."""

    def __init__(self, job: Job) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold the pieces back
        super().__init__(_events(job), media_type="text/event-stream", headers=headers)
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


class Api:
    """The handlers, around one engine."""

    def __init__(self, engine: Engine, metrics: Metrics, limits: Limits) -> None:
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.started = int(time.time())
        self.encoder = ThreadPoolExecutor(1, "nybble-encoder")  # one: a fast tokenizer is not safe in several threads
        self.page = resources.files("nybble.serve").joinpath("page/index.html").read_text(encoding="utf-8")

    async def index(self) -> Response:
        """The page."""
        return HTMLResponse(self.page, headers=SAFE)

    async def health(self) -> Response:
        """Whether answers can be made."""
        good = self.engine.healthy()
        body = {"status": "ok" if good else "failed", "engine": self.engine.name}
        return JSONResponse(body, status_code=200 if good else 503)

    async def read_metrics(self) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        """What the model field may say."""
        data = [model_entry(model, self.started) for model in self.engine.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, name: str) -> Response:
        """One of them."""
        return JSONResponse(model_entry(self._model(name), self.started))

    async def chat(self, request: Request) -> Response:
        """The assistant's next message."""
        asked = parse(ChatRequest, await read_body(request))
        model = self._model(asked.model)
        conversation = tuple(turn.message() for turn in asked.messages)
        prompt = await self._encode("messages", encode_prompt, model.template, conversation)
        return await self._answer(request, asked, model, [prompt])

    async def complete(self, request: Request) -> Response:
        """What follows a text."""
        asked = parse(CompletionRequest, await read_body(request))
        model = self._model(asked.model)
        prompts = [
            prompt if isinstance(prompt, list) else await self._encode("prompt", encode_text, model.template, prompt)
            for prompt in asked.prompt
        ]
        if not all(prompts):
            raise RequestError("an empty prompt has nothing to go on from", param="prompt", code="invalid_value")
        return await self._answer(request, asked, model, prompts)

    def _model(self, name: str) -> Model:
        if name not in self.engine.models:
            there = ", ".join(self.engine.models)
            raise RequestError(
                f"there is no model {name[:100]!r}; there are {there}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.engine.models[name]

    async def _encode(self, field: str, encode: Any, *arguments: Any) -> list[int]:
        """Token ids of what was sent; off the event loop, since a long text takes a while."""
        try:
            ids: list[int] = await asyncio.get_running_loop().run_in_executor(self.encoder, encode, *arguments)
        except DataError as error:  # a control word, or turns that the template cannot say
            raise RequestError(error.what, param=field, code="invalid_value") from None
        return ids

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, model: Model, prompts: list[list[int]]
    ) -> Response:
        field = "messages" if isinstance(asked, ChatRequest) else "prompt"
        for prompt in prompts:  # ids that were sent, or of tokens that were added to the tokenizer alone
            try:
                check_ids(prompt, model.rows, model.template.tokenizer)
            except DataError as error:
                raise RequestError(error.what, param=field, code="invalid_value") from None
        try:
            job = Job(
                asked, model, prompts, self.engine, self.metrics,
                timeout=self.limits.timeout, log_prompts=self.limits.log_prompts,
            )  # fmt: skip
        except BusyError as busy:
            raise RequestError(
                f"too many requests wait already; try again in {busy.seconds} s",
                status=429,
                code="queue_full",
                headers={"Retry-After": str(busy.seconds)},
            ) from None
        except GenerationError as error:
            raise RequestError(str(error), status=503, headers=NO_RETRY) from None
        if asked.stream:
            return EventStream(job)
        return await _unless_gone(request, job)


async def _unless_gone(request: Request, job: Job) -> Response:
    """The whole answer, unless its reader leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.ensure_future(_whole(job)), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else Response(status_code=499)  # nobody reads it; it stands in the metrics
    finally:
        work.cancel()
        leaving.cancel()
        job.cancel()


async def _whole(job: Job) -> Response:
    try:
        async for _ in job.pieces():
            pass
    except (TimeoutError, GenerationError) as error:
        raise _failure(job, error) from None
    return JSONResponse(whole(job))


async def _events(job: Job) -> AsyncIterator[bytes]:
    for chunk in opening(job):
        yield event(chunk)
    try:
        async for piece in job.pieces():
            for chunk in chunks(job, piece):
                yield event(chunk)
    except (TimeoutError, GenerationError) as error:
        yield event(_failure(job, error).body())
        return
    for chunk in closing(job):
        yield event(chunk)
    yield DONE


def _failure(job: Job, error: Exception) -> RequestError:
    if isinstance(error, TimeoutError):
        return RequestError(
            f"not done within {job.timeout:g} s; ask for fewer tokens, or start the server with a longer --timeout",
            status=408,
            code="timeout",
            headers=NO_RETRY,
        )
    return RequestError(str(error), status=503, code="engine_failed", headers=NO_RETRY)


def make_app(engine: Engine, metrics: Metrics, limits: Limits, key: str | None) -> Guard:
    """The whole server, as an ASGI application."""
    api = Api(engine, metrics, limits)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/", api.index)
    app.add_api_route("/health", api.health)
    app.add_api_route("/metrics", api.read_metrics)
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name:path}", api.model)
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])
    app.add_api_route("/v1/completions", api.complete, methods=["POST"])

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        what = "there is no route" if error.status_code == 404 else f"{error.detail}:"
        return await refused(
            request,
            RequestError(
                f"{what} {request.method} {request.url.path[:200]}",
                status=error.status_code,
                headers=dict(error.headers or {}),
            ),
        )

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return await refused(request, RequestError("a defect of the server; its log says more", status=500))

    return Guard(app, metrics, key)
