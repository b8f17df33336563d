"""Questions for an artefact and its run: conversations that tokenizers and templates treat differently, held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset

from nybble.chat.answerer import Answerer
from nybble.data.rows.formats import Conversation, Message
from nybble.data.text.tokens import encode_prompt
from nybble.errors import DataError
from nybble.evaluate.generation import FIXED, held_out_prompts

HELD_OUT = 4  # prompts of validation rows, besides the conversations below
CONVERSATIONS: tuple[Conversation, ...] = (
    *((Message("user", text),) for text in FIXED),
    (Message("user", "Name a fruit."), Message("assistant", "An apple."), Message("user", "And another one?")),
    (Message("system", "Answer in one word."), Message("user", "Which animal barks?")),
    (Message("user", "Zähle auf: 1234567, 3.14,  zwei  Leerzeichen\n\n\tx = [a, b]; 你好 🙂 naïve"),),
)
"""Several turns, a system message, and text that tokenizers treat differently: digits, repeated spaces, tabs, other scripts."""
PLAIN = CONVERSATIONS[-1][0].content
"""A text without turns, to compare how programs tokenise plain text."""


@dataclass(frozen=True)
class Question:
    """A prompt as token ids; with `messages` if users would send it as a conversation."""

    prompt: list[int]
    messages: tuple[dict[str, str], ...] | None = None


def questions_for(answerer: Answerer, validation: Dataset | None) -> list[Question]:
    """The conversations that the run's template can express, and prompts of its validation rows."""
    held_out = held_out_prompts(validation, answerer.tokenizer, HELD_OUT) if validation is not None else []
    return [*_conversations(answerer), *(Question(prompt.ids) for prompt in held_out)]


def _conversations(answerer: Answerer) -> list[Question]:
    """The conversations that the template can express: some have no system message, some no second turn."""
    questions = []
    for conversation in CONVERSATIONS:
        try:
            prompt = encode_prompt(answerer.template, conversation)
        except DataError:
            continue
        questions.append(Question(prompt, tuple({"role": turn.role, "content": turn.content} for turn in conversation)))
    return questions
