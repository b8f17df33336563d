"""What a template writes around messages: it is rendered once with placeholders, whose positions give the structure."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nybble.data.text.spans import answer_spans, is_within
from nybble.errors import DataError

# Characters of Unicode's private use area: no tokenizer's vocabulary and no template has a use for them.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
PLACEHOLDER = re.compile(f"{OPEN}(\\d+)(c|i){CLOSE}")
Shape = tuple[tuple[str, bool], ...]
"""Each message's role, and whether it has an `input`."""
Render = Callable[[list[dict[str, str]], bool], str]
"""Renders messages as text; the second argument is whether to end where an answer begins."""


@dataclass(frozen=True)
class Part:
    """A part of a rendered conversation that has a single origin."""

    kind: str
    """special (a control token written by the template), text (the template's own text) or slot (a message's text)."""
    trained: bool
    token_id: int = -1
    text: str = ""
    message: int = -1
    field: str = ""


class SkeletonFinder:
    """Finds the structure of one template.

    Args:
        name: of the template, for error messages.
        special: the tokenizer's control tokens with their ids.
        render: renders messages with the template.
    """

    def __init__(self, name: str, special: Mapping[str, int], render: Render) -> None:
        self._name = name
        self._special = special
        self._render = render
        self._split = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))

    def find(self, shape: Shape) -> list[Part]:
        """The parts of a conversation with these roles, from one rendering with placeholders.

        Raises:
            DataError: the template leaves out or rewrites messages, or its text cannot be split into a prompt and its answer.
        """
        messages = [_placeholders(n, role, has_input) for n, (role, has_input) in enumerate(shape)]
        text = self._render(messages, False)
        slots = {(int(match[1]), match[2]): match for match in PLACEHOLDER.finditer(text)}
        for n, (role, has_input) in enumerate(shape):
            if (n, "c") not in slots or (has_input and (n, "i") not in slots):
                raise DataError(
                    f"the template {self._name} leaves out or rewrites what the {role} says (message {n + 1})"
                )
        prompt_length = functools.partial(self._prompt_length, text, messages)
        close = functools.partial(self._close, text)
        trained = answer_spans(text, [role for role, _ in shape], slots, prompt_length, close)
        return list(self._parts(text, trained))

    def _prompt_length(self, text: str, messages: list[dict[str, str]], n: int) -> int:
        """Characters in the prompt of answer `n`; the whole text has to begin with this prompt."""
        # An answer without a question, a greeting, has no prompt: templates render nothing without messages.
        greeting = text[: text.index(messages[0]["content"])]
        prompt = self._render(messages[:n], True) if n else greeting
        if not text.startswith(prompt):
            raise DataError(
                f"the template {self._name} renders a prompt that is not the beginning of prompt and answer, so "
                "training would differ from inference",
                fix="data.template=alpaca, llama2 or a Jinja file of your own",
            )
        return len(prompt)

    def _close(self, text: str, end: int) -> int:
        """The end of the control token that closes the answer ending at `end`."""
        close = self._split.search(text, end)
        following = PLACEHOLDER.search(text, end)
        if close is None or (following is not None and following.start() < close.start()):
            raise DataError(
                f"the template {self._name} writes no control token after an answer, so the model would never stop",
                fix="put {{ eos_token }} after the assistant's message",
            )
        return close.end()

    def _parts(self, text: str, trained: list[tuple[int, int]]) -> list[Part]:
        cuts = {0, len(text), *(edge for span in trained for edge in span)}
        for match in [*PLACEHOLDER.finditer(text), *self._split.finditer(text)]:
            cuts |= {match.start(), match.end()}
        edges = sorted(cuts)
        parts = []
        for start, end in itertools.pairwise(edges):
            piece, learn = text[start:end], is_within(start, trained)
            if slot := PLACEHOLDER.fullmatch(piece):
                parts.append(Part("slot", learn, message=int(slot[1]), field=slot[2]))
            elif piece in self._special:
                parts.append(Part("special", learn, token_id=self._special[piece], text=piece))
            else:
                parts.append(Part("text", learn, text=piece))
        return parts


def _placeholders(n: int, role: str, has_input: bool) -> dict[str, str]:
    message = {"role": role, "content": f"{OPEN}{n}c{CLOSE}"}
    return {**message, "input": f"{OPEN}{n}i{CLOSE}"} if has_input else message
