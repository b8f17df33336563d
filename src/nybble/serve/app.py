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
from nybble.serve.bodies import CompletionReply, ReplyFormat, model_entry
from nybble.serve.chat_request import ChatRequest
from nybble.serve.completion_request import CompletionRequest
from nybble.serve.encoding import Encoder, too_long
from nybble.serve.engine import Engine, ServedModel
from nybble.serve.fields import RequestError
from nybble.serve.grammar import json_grammar
from nybble.serve.guard import AccessRules, Guard, open_to, read_body
from nybble.serve.metrics import CONTENT_TYPE, Metrics
from nybble.serve.protocol import ParsedRequest, parse
from nybble.serve.replies import (
    CLIENT_CLOSED_REQUEST,
    Abort,
    ClientDisconnectedError,
    EventStream,
    failure,
    full_response,
    unless_disconnected,
)
from nybble.serve.responses import ResponseRequest, TextResponse
from nybble.serve.tools.form import call_form
from nybble.serve.tools.grammar import tool_grammar
from nybble.serve.tools.prompt import encode_tool_prompt, texts_of
from nybble.serve.tools.reply import ToolReply
from nybble.serve.wellformed import WellFormed

UNSUPPORTED_ROUTES = {
    # OpenAI's other routes, each with what to use instead or why it is missing
    "/v1/embeddings": "the models here generate text; they make no embeddings",
    "/v1/images": "the models here generate text; they make no images",
    "/v1/audio": "the models here generate text; they have no audio",
    "/v1/moderations": "the models here generate text; they do not moderate it",
    "/v1/responses/input_tokens": "tokens are not counted in advance; each answer's usage says how many there were",
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
PAGE_HEADERS = {
    # the page loads nothing, and no other page may frame it
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """Limits on requests, and what is logged of them."""

    timeout: float = 600.0
    """Seconds from request to last token."""
    log_prompts: bool = False
    queue: int = 128
    """How many answers may wait; more are refused."""


class Api:
    """The route handlers of one engine."""

    def __init__(self, engine: Engine, metrics: Metrics, limits: Limits) -> None:
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.started = int(time.time())
        self.encoder, self.abort = Encoder(), Abort()
        self.page = resources.files("nybble.serve").joinpath("page/index.html").read_text(encoding="utf-8")

    async def index(self) -> Response:
        """The chat page."""
        return HTMLResponse(self.page, headers=PAGE_HEADERS)

    async def health(self) -> Response:
        """Whether the engine can answer requests."""
        healthy = self.engine.healthy()
        body = {"status": "ok" if healthy else "failed", "engine": self.engine.name}
        return JSONResponse(body, status_code=200 if healthy else 503)

    async def read_metrics(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        """The models that requests can choose."""
        data = [model_entry(model, self.started) for model in self.engine.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, name: str) -> Response:
        """One model."""
        return JSONResponse(model_entry(self._model(name), self.started))

    async def chat(self, request: Request) -> Response:
        """The assistant's next message."""
        return await self._serve(request, ChatRequest)

    async def respond(self, request: Request) -> Response:
        """The assistant's next message, in the Responses API."""
        return await self._serve(request, ResponseRequest)

    async def complete(self, request: Request) -> Response:
        """The continuation of a text."""
        return await self._serve(request, CompletionRequest)

    async def _serve(self, request: Request, kind: type[ChatRequest | ResponseRequest | CompletionRequest]) -> Response:
        parsed = parse(kind, await unless_disconnected(None, self.abort, read_body(request)))
        model = self._model(parsed.model)
        self._check_answer_count(parsed, len(parsed.prompt) if isinstance(parsed, CompletionRequest) else 1)
        job = await unless_disconnected(request, self.abort, self._begin(parsed, model))
        return await self._answer(request, parsed, job)

    async def _encode_prompts(self, parsed: CompletionRequest, model: ServedModel) -> list[list[int]]:
        """Token ids of the prompts of a plain completion."""
        for prompt in parsed.prompt:
            if len(prompt) > model.positions and isinstance(prompt, list):
                raise too_long("prompt", model, f"{len(prompt):,} tokens")
        prompts = [
            prompt
            if isinstance(prompt, list)
            else await self._encode("prompt", model, [prompt], functools.partial(encode_text, model.template, prompt))
            for prompt in parsed.prompt
        ]
        if not all(prompts):
            raise RequestError("the prompt is empty", param="prompt", code="invalid_value")
        return prompts

    async def _encode_conversation(self, parsed: ChatRequest | ResponseRequest, model: ServedModel) -> list[list[int]]:
        """Token ids of a conversation, as the only prompt."""
        if isinstance(parsed, ChatRequest) and parsed.knows_calls:
            turns, functions = parsed.tool_turns(), parsed.functions
            work = functools.partial(encode_tool_prompt, model.template, turns, functions)
            return [await self._encode(parsed.source, model, texts_of(turns, functions), work)]
        conversation = parsed.conversation()
        encode = encode_continuation if conversation[-1].role == "assistant" else encode_prompt
        work = functools.partial(encode, model.template, conversation)
        texts = [message.content for message in conversation]
        return [await self._encode(parsed.source, model, texts, work, refused=first_turn(parsed))]

    def _check_answer_count(self, parsed: ParsedRequest, prompts: int) -> None:
        """Refuse more answers than the queue can ever hold, which would get 429 every time."""
        if parsed.answers * prompts <= self.engine.queue:
            return
        raise RequestError(
            f"this request asks for {parsed.answers * prompts:,} answers, but at most {self.engine.queue:,} can wait in the "
            "queue; ask for fewer at once, or start the server with a larger --queue",
            param="n" if prompts == 1 else parsed.source,
            code="too_many_answers",
        )

    def _model(self, name: str) -> ServedModel:
        if name not in self.engine.models:
            names = ", ".join(self.engine.models)
            raise RequestError(
                f"there is no model {name[:100]!r}; the models are {names}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.engine.models[name]

    async def _encode(
        self, field: str, model: ServedModel, texts: Sequence[str], encode: Callable[[], list[int]], refused: str = ""
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            field: the request's field that it comes from.
            model: the model that will answer.
            texts: the prompt's texts, without the template's own.
            encode: returns the ids.
            refused: the field to name in the error if it is the template that raises.
        """
        try:
            return await self.encoder.encode(field, model, texts, encode)
        except DataError as error:  # a control token in the text, or messages that the template cannot express
            param = refused if refused and error.__cause__ is not None else field
            raise RequestError(error.what, param=param, code="invalid_value") from None

    async def _begin(self, parsed: ChatRequest | ResponseRequest | CompletionRequest, model: ServedModel) -> Job:
        """A job that the engine has accepted."""
        if isinstance(parsed, CompletionRequest):
            prompts = await self._encode_prompts(parsed, model)
        else:
            prompts = await self._encode_conversation(parsed, model)
        for prompt in prompts:  # an id may come from the request, or be of a token that only the tokenizer has
            try:
                check_ids(prompt, model.rows, model.template.tokenizer)
            except DataError as error:
                raise RequestError(error.what, param=parsed.source, code="invalid_value") from None
        check_biases(parsed, model)
        grammar = await self._grammar(parsed, model)
        timeout, log_prompts = self.limits.timeout, self.limits.log_prompts
        job = Job(parsed, model, prompts, self.metrics, timeout=timeout, grammar=grammar, log_prompts=log_prompts)
        try:
            await job.submit(self.engine)
        except BusyError as busy:
            raise RequestError(
                f"too many requests are waiting; try again in {busy.seconds} s",
                status=429,
                code="queue_full",
                headers={"Retry-After": str(busy.seconds)},
            ) from None
        except (TimeoutError, GenerationError) as error:
            raise failure(error, timeout) from None
        return job

    async def _grammar(self, parsed: ParsedRequest, model: ServedModel) -> str | None:
        """What the answer has to follow; None for any text."""
        if isinstance(parsed, ChatRequest) and parsed.functions:
            make = functools.partial(
                tool_grammar,
                call_form(model.template),
                parsed.functions,
                must_call=parsed.tool_choice.must_call,
                several=parsed.parallel_tool_calls and not parsed.tool_choice.only,
            )
        elif parsed.schema_wanted is not None:
            make = functools.partial(json_grammar, parsed.schema_wanted)
        else:
            return None
        return await self.encoder.grammar(parsed.field_of("grammar"), make)

    async def _answer(self, request: Request, parsed: ParsedRequest, job: Job) -> Response:
        self.abort.watch(job)
        reply = make_reply(job, parsed)
        headers = {"x-nybble-ignored": ", ".join(parsed.unused)} if parsed.unused else {}
        if parsed.stream:
            return EventStream(job, reply, headers)
        response = await unless_disconnected(request, self.abort, full_response(job, reply))
        response.headers.update(headers)
        return response


def make_reply(job: Job, parsed: ParsedRequest) -> ReplyFormat:
    """How the answers of a job are sent."""
    if isinstance(parsed, ResponseRequest):
        return TextResponse(job, parsed)
    return ToolReply(job, call_form(job.model.template)) if parsed.functions else CompletionReply(job)


def check_biases(parsed: ParsedRequest, model: ServedModel) -> None:
    """Refuse a bias for a token that the model does not have.

    Raises:
        RequestError: there is one; it names the token.
    """
    for token, _ in parsed.logit_changes.get("logit_bias", ()):
        if token >= model.rows:
            raise RequestError(
                f"logit_bias names token {token}, but the ids of {model.name} go from 0 to {model.rows - 1:,}",
                param="logit_bias",
                code="invalid_value",
            )


def first_turn(parsed: ChatRequest | ResponseRequest) -> str:
    """The field of the first message after the system's if it is the assistant's, which many templates refuse; else empty."""
    speakers = [n for n, turn in enumerate(parsed.turns) if turn.role in ("user", "assistant")]
    return f"{parsed.source}.{speakers[0]}" if parsed.turns[speakers[0]].role == "assistant" else ""


def make_app(engine: Engine, metrics: Metrics, limits: Limits, access: AccessRules) -> tuple[ASGIApp, Abort]:
    """The whole server as an ASGI application, and what aborts all running requests in it."""
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

    @app.exception_handler(ClientDisconnectedError)
    async def disconnected(request: Request, error: ClientDisconnectedError) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        what = "there is no route" if error.status_code == 404 else f"{error.detail}:"
        why = next((f": {why}" for route, why in UNSUPPORTED_ROUTES.items() if path.startswith(route)), "")
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
        return await refused(request, RequestError("internal server error; the log has the details", status=500))

    return WellFormed(open_to(access.origins, Guard(app, metrics, access)), metrics), api.abort
