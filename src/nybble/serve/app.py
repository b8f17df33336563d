"""The routes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from nybble.data.text.tokens import check_ids, encode_continuation, encode_prompt, encode_text
from nybble.errors import DataError
from nybble.generate.request import BusyError, GenerationError
from nybble.serve.answers import Job
from nybble.serve.bodies import CompletionReply, model_entry
from nybble.serve.encoding import Encoder, too_long
from nybble.serve.engine import Engine, ServedModel
from nybble.serve.fields import RequestError
from nybble.serve.guard import AccessRules, Guard, open_to, read_body
from nybble.serve.metrics import CONTENT_TYPE, Metrics
from nybble.serve.protocol import ChatRequest, CompletionRequest, ParsedRequest, parse
from nybble.serve.replies import LEFT, CutOff, EventStream, LeftError, failure, while_there, whole
from nybble.serve.responses import ResponseRequest, TextResponse
from nybble.serve.wellformed import WellFormed

ABSENT = {
    # OpenAI's other routes, and what there is instead
    "/v1/embeddings": "the models here generate text; they make no embeddings",
    "/v1/images": "the models here generate text; they make no images",
    "/v1/audio": "the models here generate text; they have no audio",
    "/v1/moderations": "the models here generate text; they do not moderate it",
    "/v1/responses/input_tokens": "tokens are not counted beforehand; each answer's usage tells how many there were",
    "/v1/responses/compact": "conversations are not shortened",
    "/v1/responses/": "responses are not stored, so they cannot be retrieved, cancelled or deleted",
    "/v1/chat/completions/": "answers are not stored, so they cannot be retrieved or deleted",
    "/v1/conversations": "conversations are not stored; send all messages with each request",
    "/v1/files": "files are not stored; nybble train reads them from disk",
    "/v1/fine_tuning": "use nybble train",
    "/v1/batches": "send the requests together; the server batches them",
    "/v1/assistants": "use /v1/chat/completions or /v1/responses",
    "/v1/threads": "use /v1/chat/completions or /v1/responses",
    "/v1/vector_stores": "nothing is stored",
    "/api/": "Ollama's own routes are not supported; its OpenAI address, /v1, is",
}
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


class Api:
    """The handlers, around one engine."""

    def __init__(self, engine: Engine, metrics: Metrics, limits: Limits) -> None:
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.started = int(time.time())
        self.encoder, self.cut_off = Encoder(), CutOff()
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
        return await self._serve(request, ChatRequest)

    async def respond(self, request: Request) -> Response:
        """The same by the Responses API."""
        return await self._serve(request, ResponseRequest)

    async def complete(self, request: Request) -> Response:
        """What follows a text."""
        return await self._serve(request, CompletionRequest)

    async def _serve(self, request: Request, kind: type[ChatRequest | ResponseRequest | CompletionRequest]) -> Response:
        asked = parse(kind, await while_there(None, self.cut_off, read_body(request)))
        model = self._model(asked.model)
        self._check_number(asked, len(asked.prompt) if isinstance(asked, CompletionRequest) else 1)
        work = self._given(asked, model) if isinstance(asked, CompletionRequest) else self._said(asked, model)
        prompts = await while_there(request, self.cut_off, work)
        return await self._answer(request, asked, model, prompts)

    async def _given(self, asked: CompletionRequest, model: ServedModel) -> list[list[int]]:
        """The prompts of plain completions."""
        for prompt in asked.prompt:
            if len(prompt) > model.positions and isinstance(prompt, list):
                raise too_long("prompt", model, f"{len(prompt):,} tokens")
        prompts = [
            prompt
            if isinstance(prompt, list)
            else await self._encode("prompt", model, [prompt], functools.partial(encode_text, model.template, prompt))
            for prompt in asked.prompt
        ]
        if not all(prompts):
            raise RequestError("the prompt is empty", param="prompt", code="invalid_value")
        return prompts

    async def _said(self, asked: ChatRequest | ResponseRequest, model: ServedModel) -> list[list[int]]:
        """The prompt of a conversation."""
        conversation = asked.conversation()
        encode = encode_continuation if conversation[-1].role == "assistant" else encode_prompt
        work = functools.partial(encode, model.template, conversation)
        texts = [message.content for message in conversation]
        return [await self._encode(asked.source, model, texts, work, refused=first_turn(asked))]

    def _check_number(self, asked: ParsedRequest, prompts: int) -> None:
        """More answers than may ever wait would be sent away with 429 for ever."""
        if asked.answers * prompts <= self.engine.queue:
            return
        raise RequestError(
            f"this request asks for {asked.answers * prompts:,} answers, and at most {self.engine.queue:,} can wait in the "
            "queue; send fewer at once, or start the server with a larger --queue",
            param="n" if prompts == 1 else asked.source,
            code="too_many_answers",
        )

    def _model(self, name: str) -> ServedModel:
        if name not in self.engine.models:
            there = ", ".join(self.engine.models)
            raise RequestError(
                f"there is no model {name[:100]!r}; the models are {there}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.engine.models[name]

    async def _encode(
        self, field: str, model: ServedModel, texts: Sequence[str], encode: Callable[[], list[int]], refused: str = ""
    ) -> list[int]:
        """Token ids of what was sent.

        Args:
            refused: the field to name where it is the template that raises.
        """
        try:
            return await self.encoder.encode(field, model, texts, encode)
        except DataError as error:  # a control word, or turns that the template cannot say
            param = refused if refused and error.__cause__ is not None else field
            raise RequestError(error.what, param=param, code="invalid_value") from None

    async def _answer(
        self, request: Request, asked: ParsedRequest, model: ServedModel, prompts: list[list[int]]
    ) -> Response:
        for prompt in prompts:  # ids that were sent, or of tokens that were added to the tokenizer alone
            try:
                check_ids(prompt, model.rows, model.template.tokenizer)
            except DataError as error:
                raise RequestError(error.what, param=asked.source, code="invalid_value") from None
        try:
            job = Job(
                asked, model, prompts, self.engine, self.metrics,
                timeout=self.limits.timeout, log_prompts=self.limits.log_prompts,
            )  # fmt: skip
        except BusyError as busy:
            raise RequestError(
                f"too many requests are waiting; try again in {busy.seconds} s",
                status=429,
                code="queue_full",
                headers={"Retry-After": str(busy.seconds)},
            ) from None
        except GenerationError as error:
            raise failure(error) from None
        self.cut_off.watch(job)
        shape = TextResponse(job, asked) if isinstance(asked, ResponseRequest) else CompletionReply(job)
        headers = {"x-nybble-ignored": ", ".join(asked.unused)} if asked.unused else {}
        if asked.stream:
            return EventStream(job, shape, headers)
        response = await while_there(request, self.cut_off, whole(job, shape))
        response.headers.update(headers)
        return response


def first_turn(asked: ChatRequest | ResponseRequest) -> str:
    """The first message that is not the system's, where it is the assistant's: many templates refuse that."""
    speakers = [n for n, turn in enumerate(asked.turns) if turn.role in ("user", "assistant")]
    return f"{asked.source}.{speakers[0]}" if asked.turns[speakers[0]].role == "assistant" else ""


def make_app(engine: Engine, metrics: Metrics, limits: Limits, access: AccessRules) -> tuple[ASGIApp, CutOff]:
    """The whole server, as an ASGI application; and what breaks off all that is under way in it."""
    api = Api(engine, metrics, limits)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_api_route("/", api.index)
    app.add_api_route("/health", api.health)
    app.add_api_route("/metrics", api.read_metrics)
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name:path}", api.model)
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])
    app.add_api_route("/v1/completions", api.complete, methods=["POST"])
    app.add_api_route("/v1/responses", api.respond, methods=["POST"])

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(LeftError)
    async def left(request: Request, error: LeftError) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        what = "there is no route" if error.status_code == 404 else f"{error.detail}:"
        why = next((f": {why}" for route, why in ABSENT.items() if path.startswith(route)), "")
        return await refused(
            request,
            RequestError(
                f"{what} {request.method} {path[:200]}{why}",
                status=error.status_code,
                code="unsupported" if why else None,
                headers=dict(error.headers or {}),
            ),
        )

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return await refused(request, RequestError("a defect of the server; its log says more", status=500))

    return WellFormed(open_to(access.origins, Guard(app, metrics, access)), metrics), api.cut_off
