"""One request on its way: prompts to the engine, tokens back as pieces of text, counted and logged."""

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
MOST_KEPT = 2**24  # top_k: more than any vocabulary has, and exact in float32
LONGEST_ANSWER = 1024  # tokens, of a chat that names no limit
BEFORE = 8  # tokens of a text that its continuation is decoded after


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
    """Tokens made, the one that ends it included."""
    shown: list[Token] = field(default_factory=list)
    """The same without the one that ends it, for log probabilities."""


@dataclass(frozen=True)
class Piece:
    """What is new of an answer."""

    choice: Choice
    text: str
    tokens: Sequence[Token]


class Job:
    """The answers to one request.

    Args:
        prompts: token ids, one list a prompt; each is answered `asked.answers` times.
        timeout: seconds until it is given up.

    Raises:
        RequestError: too long for the model, or not for this engine.
        BusyError: no room in the queue.
    """

    def __init__(
        self,
        asked: ParsedRequest,
        model: ServedModel,
        prompts: Sequence[list[int]],
        engine: Engine,
        metrics: Metrics,
        *,
        timeout: float,
        log_prompts: bool = False,
    ) -> None:
        self.asked, self.model, self.metrics, self.log_prompts = asked, model, metrics, log_prompts
        self.id = f"{asked.id_prefix}{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.timeout, self.began, self.first = timeout, time.perf_counter(), 0.0
        self.deadline = asyncio.get_running_loop().time() + timeout
        self.prompt_tokens, self.stop_ids = sum(map(len, prompts)), model.stop_ids
        requests = [self._request(prompt, number) for prompt in prompts for number in range(asked.answers)]
        self.mailbox = Mailbox()
        try:
            answers = engine.submit(requests, self.mailbox)
        except UnsupportedError as error:
            raise RequestError(
                f"{error}; start the server with --engine pipeline for that",
                param=asked.spelt.get(error.option, error.option),
                code="unsupported_parameter",
            ) from None
        self.tokenizer: PreTrainedTokenizerBase = model.template.tokenizer
        self.choices = [
            Choice(index, answer, self._stream(list(request.prompt)), list(request.prompt))
            for index, (request, answer) in enumerate(zip(requests, answers, strict=True))
        ]

    @property
    def completion_tokens(self) -> int:
        """Tokens made for all answers."""
        return sum(choice.generated for choice in self.choices)

    def cancel(self, why: str = "cancelled") -> None:
        """Stop whatever still goes on; nobody reads it. `why` is for the metrics."""
        for choice in self.choices:
            if choice.finish is None:
                choice.answer.cancel()
                self.metrics.answers.labels(self.model.name, why).inc()
                choice.finish = why

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it becomes certain, and the end of each answer; answers that are left over are cancelled.

        Raises:
            GenerationError: the engine failed, or the server goes down.
            TimeoutError: the request took longer than `timeout`.
        """
        by_answer = {id(choice.answer): choice for choice in self.choices}
        try:
            while any(choice.finish is None for choice in self.choices):
                answer, token = await self.mailbox.take(self.deadline)
                choice = by_answer[id(answer)]
                if choice.finish is not None:
                    continue  # a token that was under way when a stop string ended the answer
                piece = self._more(choice, token) if token is not None else self._last(choice)
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
        asked = self.asked
        room = self.model.positions - len(prompt)
        limit = asked.limit or min(LONGEST_ANSWER, room)
        if limit > room or room < 1:
            wanted = f"{max(limit, 1):,}" if limit < 10**12 else "longer than any answer"  # it may have 4,300 digits
            length = f"{len(prompt):,} tokens and {asked.limit_field} is {wanted}"
            raise too_long(asked.source, self.model, length)
        seed = None if asked.seed is None else (asked.seed + number) % 2**64
        greedy = asked.top_p == 0  # of the likeliest tokens that make up nothing, the first is left
        temperature, top_p = (0.0, 1.0) if greedy else (asked.temperature, asked.top_p)
        top_k = min(max(asked.top_k, 0), MOST_KEPT)
        return Request(
            prompt, limit, self.model.adapter, self.stop_ids, temperature, top_p, top_k, seed, asked.likeliest
        )

    def _stream(self, prompt: list[int]) -> TextStream:
        template, chat, said = self.model.template, self.asked.is_chat, self.asked.begun
        kept = said if template.verbatim else said.strip()
        before = prompt[-BEFORE:] if kept or not chat else []
        # white space that the template took from the end of what was said is not to come back with the rest
        begun = bool(kept) and said.endswith(kept)
        return TextStream(template.tokenizer, self.asked.stop, before, strip=chat, continues=begun)

    def _more(self, choice: Choice, token: Token) -> Piece:
        if not self.first:
            self.first = time.perf_counter() - self.began
            self.metrics.first.labels(self.model.name).observe(self.first)
            self.metrics.tokens.labels(self.model.name, "prompt").inc(self.prompt_tokens)
        self.metrics.tokens.labels(self.model.name, "answer").inc()
        choice.generated += 1
        text = choice.stream.push(token)
        tokens = [] if token.id in self.stop_ids or self.asked.likeliest is None else [token]
        if choice.stream.stopped:
            choice.answer.cancel()
            self._finish(choice, "stop")
        return self._piece(choice, text, tokens)

    def _last(self, choice: Choice) -> Piece:
        text = choice.stream.end()
        if choice.answer.finish == "cancelled":  # by no reader: the engine was closed
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
        self.metrics.seconds.labels(self.model.name).observe(time.perf_counter() - self.began)

    def _report(self) -> None:
        """A line in the log, with what was said only where that was asked for."""
        seconds = time.perf_counter() - self.began
        ends = ", ".join(str(choice.finish) for choice in self.choices)
        log.info(
            "%s: %d + %d tokens, the first after %.2f s, all in %.2f s (%.1f a second); %s%s",
            self.model.name, self.prompt_tokens, self.completion_tokens, self.first, seconds,
            self.completion_tokens / seconds, ends,
            f"; ignored {', '.join(self.asked.unused)}" if self.asked.unused else "",
        )  # fmt: skip
        if self.log_prompts:
            for choice in self.choices:
                said = {"prompt": self.tokenizer.decode(choice.prompt), "answer": choice.text}
                log.info("%s: %s", self.model.name, json.dumps(said, ensure_ascii=False))
