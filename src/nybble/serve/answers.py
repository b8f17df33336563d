"""The answers to one request: prompts go to the engine, tokens come back as pieces of text, and both are counted and logged."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from nybble.chat.text import TextStream
from nybble.generate.request import GenerationError, Request, Token, UnsupportedError
from nybble.serve.encoding import too_long
from nybble.serve.engine import Engine, ServedModel
from nybble.serve.fields import RequestError
from nybble.serve.mailbox import AnswerSink, Mailbox
from nybble.serve.metrics import Metrics
from nybble.serve.protocol import ParsedRequest

log = logging.getLogger("nybble.serve")
MAX_TOP_K = 2**24  # top_k: more than any vocabulary has, and exact in float32
DEFAULT_MAX_TOKENS = 1024  # of an answer in a chat without a limit
CONTEXT_TOKENS = 8  # the last tokens of a prompt, with which the text that continues it is decoded


@dataclass
class Choice:
    """One answer as text."""

    index: int
    answer: AnswerSink
    stream: TextStream
    prompt: list[int]
    finish: str | None = None
    text: str = ""
    generated: int = 0
    """Tokens generated, including the one that ends the answer."""
    shown: list[Token] = field(default_factory=list)
    """The tokens for log probabilities: those of a prompt that is sent back, then the answer's, without the one that ends it
    unless the prompt is sent back."""
    echo: str | None = None
    """The prompt that was sent back."""


@dataclass(frozen=True)
class Piece:
    """The new part of an answer."""

    choice: Choice
    text: str
    tokens: Sequence[Token]
    is_prompt: bool = False
    """Whether it is the prompt that is sent back."""


class Job:
    """The answers to one request; `submit` begins them.

    Args:
        parsed: the request.
        prompts: token ids, one list per prompt; each is answered `parsed.answers` times.
        grammar: that the answers follow; None for any text.
        timeout: seconds until the job is cancelled.

    Raises:
        RequestError: it is too long for the model.
    """

    def __init__(
        self,
        parsed: ParsedRequest,
        model: ServedModel,
        prompts: Sequence[list[int]],
        metrics: Metrics,
        *,
        timeout: float,
        grammar: str | None = None,
        log_prompts: bool = False,
    ) -> None:
        self.parsed, self.model, self.metrics, self.log_prompts = parsed, model, metrics, log_prompts
        self.grammar = grammar
        self.id = f"{parsed.id_prefix}{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.timeout, self.started, self.first_token_seconds = timeout, time.perf_counter(), 0.0
        self.deadline = asyncio.get_running_loop().time() + timeout
        self.prompt_tokens, self.stop_ids = sum(map(len, prompts)), model.stop_ids
        self.requests = [self._request(prompt, number) for prompt in prompts for number in range(parsed.answers)]
        self.tokenizer: PreTrainedTokenizerBase = model.template.tokenizer
        self.mailbox = Mailbox(self.deadline)
        self.choices: list[Choice] = []
        self.made = metrics.tokens.labels(model.name, "answer")  # to look it up takes longer than to count

    async def submit(self, engine: Engine) -> None:
        """Have the engine make the answers.

        Raises:
            RequestError: an option that this engine does not support.
            BusyError: the queue is full.
            GenerationError: the engine is closed, or has failed.
            TimeoutError: the engine did not reply in time.
        """
        answers: list[AnswerSink] = []
        try:
            async with asyncio.timeout_at(self.deadline):
                answers = await engine.submit(self.requests, self.mailbox)
        except UnsupportedError as error:
            raise RequestError(
                f"{error}; start the server with --engine auto to use it",
                param=self.parsed.field_of(error.option),
                code="unsupported_parameter",
            ) from None
        finally:
            if not answers:
                self.mailbox.close()
        self.choices = [
            Choice(index, answer, self._stream(list(request.prompt)), list(request.prompt))
            for index, (request, answer) in enumerate(zip(self.requests, answers, strict=True))
        ]

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that did not have to be computed; of several answers to one prompt, the least."""
        cached, n = [choice.answer.cached for choice in self.choices], self.parsed.answers
        return sum(min(cached[start : start + n]) for start in range(0, len(cached), n))

    @property
    def completion_tokens(self) -> int:
        """Tokens generated for all answers."""
        return sum(choice.generated for choice in self.choices)

    def cancel(self, why: str = "cancelled") -> None:
        """Cancel the unfinished answers; nobody reads them any more. `why` is for the metrics."""
        self.mailbox.close()
        for choice in self.choices:
            if choice.finish is None:
                choice.answer.cancel()
                self.metrics.answers.labels(self.model.name, why).inc()
                choice.finish = why

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it becomes certain, and the end of each answer. If the caller stops early, unfinished answers are cancelled.

        Raises:
            GenerationError: the engine failed, or the server is shutting down.
            TimeoutError: the request took longer than `timeout`.
        """
        by_answer = {id(choice.answer): choice for choice in self.choices}
        try:
            while any(choice.finish is None for choice in self.choices):
                answer, token = await self.mailbox.take()
                choice = by_answer[id(answer)]
                if choice.finish is not None:
                    continue  # a token that arrived after a stop string had ended the answer
                if self.parsed.echoes and choice.echo is None:
                    yield self._echo(choice)
                piece = self._add_token(choice, token) if token is not None else self._end_choice(choice)
                if piece.text or piece.tokens or choice.finish:
                    yield piece
            self._report()
        except TimeoutError:
            self.cancel("timeout")
            raise
        except GenerationError:
            self.cancel("failed")
            raise
        finally:
            self.cancel()

    def _request(self, prompt: list[int], number: int) -> Request:
        parsed = self.parsed
        available = self.model.positions - len(prompt)
        limit = min(DEFAULT_MAX_TOKENS, available) if parsed.limit is None else parsed.limit
        if limit > available or (parsed.limit is None and available < 1):
            # The number may have 4,300 digits.
            requested = f"{max(limit, 1):,}" if limit < 10**12 else "longer than any answer"
            length = f"{len(prompt):,} tokens and {parsed.limit_field} is {requested}"
            raise too_long(parsed.source, self.model, length)
        seed = None if parsed.seed is None else (parsed.seed + number) % 2**64
        greedy = parsed.top_p == 0  # only the likeliest token remains
        temperature, top_p = (0.0, 1.0) if greedy else (parsed.temperature, parsed.top_p)
        top_k = min(max(parsed.top_k, 0), MAX_TOP_K)
        return Request(
            prompt,
            limit,
            self.model.adapter,
            self.stop_ids,
            temperature,
            top_p,
            top_k,
            grammar=self.grammar,
            seed=seed,
            logprobs=parsed.likeliest,
            prompt_logprobs=parsed.likeliest if parsed.echoes else None,
            **parsed.logit_changes,
        )

    def _stream(self, prompt: list[int]) -> TextStream:
        template, chat, prefix = self.model.template, self.parsed.is_chat, self.parsed.answer_prefix
        rendered = prefix if template.verbatim else prefix.strip()
        before = prompt[-CONTEXT_TOKENS:] if rendered or not chat else []
        # If the template stripped white space from the end of the prefix, the answer must not begin with it.
        continues = bool(rendered) and prefix.endswith(rendered)
        return TextStream(template.tokenizer, self.parsed.stop, before, strip=chat, continues=continues)

    def _echo(self, choice: Choice) -> Piece:
        """The prompt as text. Its tokens are known by now, if they were asked for."""
        self._note_first()
        choice.text = choice.echo = self.tokenizer.decode(choice.prompt, skip_special_tokens=True)
        choice.shown += choice.answer.prompt
        return Piece(choice, choice.text, choice.answer.prompt, is_prompt=True)

    def _note_first(self) -> None:
        if not self.first_token_seconds:
            self.first_token_seconds = time.perf_counter() - self.started
            self.metrics.first_token.labels(self.model.name).observe(self.first_token_seconds)
            self.metrics.tokens.labels(self.model.name, "prompt").inc(self.prompt_tokens)

    def _add_token(self, choice: Choice, token: Token) -> Piece:
        self._note_first()
        self.made.inc()
        choice.generated += 1
        text = choice.stream.push(token)
        is_hidden = token.id in self.stop_ids and not self.parsed.echoes
        tokens = [] if is_hidden or self.parsed.likeliest is None else [token]
        if choice.stream.stopped:
            choice.answer.cancel()
            self._finish(choice, "stop")
        return self._piece(choice, text, tokens)

    def _end_choice(self, choice: Choice) -> Piece:
        text = choice.stream.end()
        if choice.answer.finish == "cancelled":  # not by the client: the engine was closed
            raise GenerationError("the engine stopped")
        self._finish(choice, "stop" if choice.stream.stopped else str(choice.answer.finish))
        return self._piece(choice, text, [])

    def _piece(self, choice: Choice, text: str, tokens: list[Token]) -> Piece:
        choice.text += text
        choice.shown += tokens
        return Piece(choice, text, tokens)

    def _finish(self, choice: Choice, finish: str) -> None:
        choice.finish = finish
        self.metrics.answers.labels(self.model.name, finish).inc()
        self.metrics.seconds.labels(self.model.name).observe(time.perf_counter() - self.started)

    def _report(self) -> None:
        """Write a line to the log, and prompts and answers only with --log-prompts."""
        seconds = time.perf_counter() - self.started
        ends = ", ".join(str(choice.finish) for choice in self.choices)
        log.info(
            "%s: %d + %d tokens, the first after %.2f s, all in %.2f s (%.1f per second); %s%s",
            self.model.name, self.prompt_tokens, self.completion_tokens, self.first_token_seconds, seconds,
            self.completion_tokens / seconds, ends,
            f"; ignored {', '.join(self.parsed.unused)}" if self.parsed.unused else "",
        )  # fmt: skip
        if self.log_prompts:
            for choice in self.choices:
                texts = {
                    "prompt": self.tokenizer.decode(choice.prompt),
                    "answer": choice.text.removeprefix(choice.echo or ""),
                }
                log.info("%s: %s", self.model.name, json.dumps(texts, ensure_ascii=False))
