"""The structure of chat templates: which characters come from the template, which from a message, and which are trained.

Training, chat and evaluation all use the same `Template`, so they cannot differ. The template is rendered once for each sequence
of roles, with placeholders for the messages. The positions of the placeholders give the structure, so that text is never searched
for and a message can never be mistaken for a control token.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from transformers import PreTrainedTokenizerBase

from nybble.data.rows.formats import Conversation, Message, Rules
from nybble.data.rows.readers import read_text_file
from nybble.data.text.clock import reads_clock, with_fixed_date
from nybble.data.text.rendering import check_length, render
from nybble.data.text.skeleton import Part, Shape, SkeletonFinder
from nybble.errors import DataError

BUILT_IN = ("alpaca", "llama2", "plain")
LONGEST_CACHED = 64  # turns; the structure of longer conversations is not cached: with 2,000 turns it takes 2 MB
# Words in brackets by which a template controls the model, such as [INST] and <<SYS>>, although they are not single tokens.
CONTROL_WORD = re.compile(r"\[/?[A-Z_]+\]|<</?[A-Z_]+>>|<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class TextRun:
    """The text between control tokens, tokenised at once: a prompt, an answer, or a prompt with its answer."""

    text: str
    boundary: int
    """Characters of `text` before the trained part; the length of `text` if nothing is trained."""


class Template:
    """How turns become text, with the model's control tokens, for one tokenizer.

    Args:
        tokenizer: the base model's.
        name: model, alpaca, llama2, plain, the name of one of the model's own, or the path of a Jinja file.
        source: Jinja text as Transformers reads it (`messages`, `bos_token`, `eos_token`, `add_generation_prompt`).
        verbatim: keep white space around messages; otherwise it is stripped, so that a prompt never ends in a space.
        day: the date for a template that reads the clock; None if it does not.
        bos: whether a document begins with BOS; None if it should only when the tokenizer itself adds one.
        fingerprint_source: the Jinja text for the fingerprint if it is not `source`: in runs of version 0.5.1 it contains no day.
        rules: the version's rules for reading the rows of its run.

    Raises:
        DataError: the template fails, rewrites messages, or its text cannot be split into a prompt and its answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, source: str, *, verbatim: bool = False,
        day: datetime.date | None = None, bos: bool | None = None, fingerprint_source: str | None = None,
        rules: Rules = Rules.NOW,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.name = name
        self.source = source if day is None else with_fixed_date(source, day)
        self.verbatim = verbatim
        self.day = day
        self.puts_bos = puts_bos(tokenizer)
        self.document_bos = (self.puts_bos if bos is None else bos) and tokenizer.bos_token is not None
        self._fingerprint_source = fingerprint_source or self.source
        self.rules = rules
        self.takes_input = "message.input" in source
        self.control_tokens = _control_tokens(tokenizer)
        """With their ids; those that the tokenizer calls special."""
        control_words = sorted(set(CONTROL_WORD.findall(source)) - self.control_tokens.keys())
        self._control_words = re.compile("|".join(map(re.escape, control_words)) or r"(?!)")
        self._finder = SkeletonFinder(name, self.control_tokens, self._render)
        self._cached_skeleton = functools.lru_cache(maxsize=4096)(self._finder.find)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the Jinja text, the day in it, and how documents begin."""
        bos_mark = "" if self.document_bos or self.tokenizer.bos_token is None else "documents without BOS"
        return hashlib.sha256(f"{self.verbatim}{self._fingerprint_source}{bos_mark}".encode()).hexdigest()

    @property
    def label(self) -> str:
        """The template's name, with the day that is written into it."""
        return self.name if self.day is None else f"{self.name} (its date stays {self.day:%d %b %Y})"

    @functools.cached_property
    def end_id(self) -> int:
        """The token that ends an answer, trained in every row; generation stops at it."""
        skeleton = self._skeleton((("user", False), ("assistant", False)))
        return next(part.token_id for part in reversed(skeleton) if part.kind == "special" and part.trained)

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end trained text, and at which generation stops: `end_id` for answers, EOS for documents."""
        return frozenset({self.end_id, self.tokenizer.eos_token_id})

    @functools.cached_property
    def bos_of_turns(self) -> tuple[int, int]:
        """How many BOS tokens a question with its answer has, and each further one: (1, 0) in Alpaca, (1, 1) in Llama 2."""
        turn = (("user", False), ("assistant", False))
        one, two = (
            sum(
                part.kind == "special" and part.token_id == self.tokenizer.bos_token_id
                for part in self._skeleton(turns)
            )
            for turns in (turn, turn + turn)
        )
        return one, two - one

    def runs(self, conversation: Conversation) -> list[TextRun | Part]:
        """A whole conversation: control tokens and the runs of text between them, in order.

        Raises:
            DataError: the template cannot render this, or a message contains one of its control words.
        """
        if conversation[0].role == "text":
            return self._document(conversation[0].content)
        messages = self._messages(conversation)
        return self._fill(self._skeleton(_shape(messages)), messages)

    def prompt_runs(self, conversation: Conversation) -> list[TextRun | Part]:
        """A conversation that ends with a user message, up to where the assistant's answer begins."""
        messages = self._messages(conversation)
        assert messages[-1].role == "user", "a prompt ends with a user message"
        answered = (*_shape(messages), ("assistant", False))
        skeleton = self._skeleton(answered)
        last = max(n for n, part in enumerate(skeleton) if part.message == len(messages))
        first = last
        while first and skeleton[first - 1].trained:
            first -= 1
        return self._fill(skeleton[:first], messages, generation=True)

    def continuation_runs(self, conversation: Conversation) -> list[TextRun | Part]:
        """A conversation whose last answer is to be continued, up to the last character of that answer."""
        messages = self._messages(conversation)
        assert messages[-1].role == "assistant", "only an answer is continued"
        if not messages[-1].content:
            return self.prompt_runs(conversation[:-1])
        skeleton = self._skeleton(_shape(messages))
        last = max(n for n, part in enumerate(skeleton) if part.message == len(messages) - 1)
        return self._fill(skeleton[: last + 1], messages, partial=True)

    def _document(self, text: str) -> list[TextRun | Part]:
        """A text without turns, all of it trained: BOS if documents begin with it, the text, and EOS."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        begin = [Part("special", False, token_id=self.control_tokens[bos], text=bos)] if self.document_bos else []
        return [*begin, TextRun(text, 0), Part("special", True, token_id=self.control_tokens[eos], text=eos)]

    def _messages(self, conversation: Conversation) -> Conversation:
        """The turns as this template needs them: stripped, and with `input` appended if it has no such field."""
        return tuple(self._message(message) for message in conversation)

    def _message(self, message: Message) -> Message:
        content, extra = message.content, message.input
        if not self.verbatim:
            content, extra = content.strip(), extra.strip()
        self.check_words(f"{content}\0{extra}", f"the {message.role}'s text")
        if extra and not self.takes_input:
            content, extra = f"{content}\n\n{extra}", ""
        return Message(message.role, content, extra)

    def check_words(self, text: str, what: str) -> None:
        """Refuse a text that contains a word by which the template controls the model, such as [INST].

        Args:
            text: the text.
            what: it is, for the message.

        Raises:
            DataError: it does.
        """
        if control_word := self._control_words.search(text):
            raise DataError(
                f"{what} contains {control_word[0]}, a control word of the template {self.name}",
                fix=f"write it differently, [ INST ] for [INST], or use a template other than {self.name}",
            )

    def _render(self, messages: Sequence[dict[str, str]], generation: bool = False) -> str:
        return render(self.tokenizer, self.name, self.source, messages, generation)

    def _skeleton(self, shape: Shape) -> list[Part]:
        return self._cached_skeleton(shape) if len(shape) <= LONGEST_CACHED else self._finder.find(shape)

    def _fill(
        self, skeleton: list[Part], messages: Conversation, *, generation: bool = False, partial: bool = False
    ) -> list[TextRun | Part]:
        """Insert the messages, join the text between control tokens, and compare the result with the template's rendering."""
        runs: list[TextRun | Part] = []
        text, boundary, pieces = "", None, []
        for part in [*skeleton, Part("special", False)]:
            if part.kind == "special":
                if text:
                    runs.append(TextRun(text, len(text) if boundary is None else boundary))
                if part.token_id >= 0:
                    runs.append(part)
                pieces += [text, part.text]
                text, boundary = "", None
                continue
            if part.trained and boundary is None:
                boundary = len(text)
            text += part.text if part.kind == "text" else _slot_text(messages[part.message], part.field)
        self._verify("".join(pieces), messages, generation, partial)
        return runs

    def _verify(self, composed: str, messages: Conversation, generation: bool, partial: bool) -> None:
        rendered = self._render([_as_dict(message) for message in messages], generation)
        if composed != (rendered[: len(composed)] if partial else rendered):
            raise DataError(
                f"the template {self.name} rewrites the text of messages, so prompt and answer cannot be told apart",
                fix="data.template=alpaca, llama2 or a Jinja file that writes messages as they are",
            )


def puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with BOS: Llama 2's does, SmolLM2's does not."""
    return bool(tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])


def choose_template(tokenizer: PreTrainedTokenizerBase, option: str, form: str) -> Template:
    """The template that an option names; today's date is written into one that reads the clock.

    Args:
        tokenizer: the base model's.
        option: auto, model, alpaca, llama2, plain, the name of one of the model's own, or a Jinja file. auto is the model's own
            if it has one, else Alpaca's for alpaca rows, Llama 2's for turns, and plain for prompt and completion.
        form: the form of most rows, by which auto chooses.

    Raises:
        DataError: there is no such template.
    """
    of_model = tokenizer.chat_template
    named = of_model if isinstance(of_model, dict) else {}  # some models have several: for tools, for documents
    if option == "auto":
        by_form = {"alpaca": "alpaca", "messages": "llama2", "sharegpt": "llama2", "pair": "llama2"}
        option = "model" if of_model else by_form.get(form, "plain")
    if option in BUILT_IN:
        source = resources.files("nybble.data.text").joinpath(f"templates/{option}.jinja").read_text(encoding="utf-8")
        return Template(tokenizer, option, source.strip(), verbatim=option == "plain")
    if option == "model":
        source = _default_of_model(of_model)
    elif option in named:
        source = named[option]
    else:
        file = pathlib.Path(option)
        if not file.is_file():
            names = ", ".join(("auto", "model", *BUILT_IN, *sorted(named)))
            raise DataError(f"data.template={option} is neither a Jinja file nor one of {names}")
        check_length(file)
        source = read_text_file(file)
    day = today() if reads_clock(source) else None
    return Template(tokenizer, option, source, day=day)


def today() -> datetime.date:
    """The day that a new run writes into its template."""
    return datetime.date.today()


def _default_of_model(templates: str | dict[str, str] | None) -> str:
    if isinstance(templates, dict):
        if "default" not in templates and len(templates) > 1:
            raise DataError(
                f"the model has several chat templates, none of them named default: {', '.join(sorted(templates))}",
                fix=f"data.template={sorted(templates)[0]}, or another of them",
            )
        return templates.get("default") or next(iter(templates.values()))
    if not isinstance(templates, str):
        raise DataError("the model has no chat template", fix="data.template=alpaca, llama2 or a Jinja file")
    return templates


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    special = {**added, **named}
    if tokenizer.eos_token is None or not special:
        raise DataError("the tokenizer has no EOS token, so answers could not end")
    return special


def _shape(messages: Conversation) -> Shape:
    return tuple((message.role, bool(message.input)) for message in messages)


def _as_dict(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content, **({"input": message.input} if message.input else {})}


def _slot_text(message: Message, field: str) -> str:
    return message.content if field == "c" else message.input
