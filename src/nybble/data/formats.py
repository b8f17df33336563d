"""Rows of every form to conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nybble.data.readers import Row
from nybble.errors import DataError

Role = Literal["system", "user", "assistant", "text"]
ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "claude": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatbot": "assistant",
    "input": "user", "output": "assistant",
}  # fmt: skip
TOOLS = frozenset({"tool", "tool_call", "tool_calls", "tool_response", "tool_responses", "tool_result", "function",
                   "function_call", "function_response", "observation", "ipython"})  # fmt: skip
NO_TOOLS: tuple[object, ...] = (None, "", [], "[]")
PREFERENCES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
USUAL = {
    # field: names under which data sets often have it
    "system": ("system_prompt", "system_message"),
    "prompt": ("question", "query", "prompt", "instruction", "problem", "input"),
    "input": ("context",),
    "completion": ("response", "answer", "output", "completion", "reply", "solution", "target", "summary"),
}
SPEAKER = ("role", "from")
SPEECH = ("content", "value", "text")


@dataclass(frozen=True)
class Message:
    """One turn; a document stands alone, with the role text."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's second field, which its template sets apart from the instruction; other templates append it."""


Conversation = tuple[Message, ...]

FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # form: (required fields, optional fields); of forms that fit equally well the upper is meant
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt": (("prompt", "completion"), ("system",)),
    "text": (("text",), ()),
}


class EmptyAnswerError(DataError):
    """A row that would teach to say nothing."""


@dataclass(frozen=True)
class Form:
    """A form of rows, with the column each of its fields is read from."""

    name: str
    columns: Mapping[str, str]

    def fits(self, row: Row) -> bool:
        """Whether a row has the columns that this form needs."""
        return all(self.columns[field] in row.values for field in FIELDS[self.name][0])

    def speaks(self, row: Row) -> bool:
        """Whether more than the columns' names is there: data sets joined into one have nulls in each other's columns."""
        return row.values[self.columns[FIELDS[self.name][0][0]]] is not None

    def conversation(self, row: Row) -> Conversation:
        """The row as turns.

        Raises:
            DataError: what is wrong with the row, at its `file:line`.
        """
        values = {field: row.values.get(column) for field, column in self.columns.items()}
        if self.name == "text":
            return (Message("text", _filled(values["text"], self.columns["text"], row.origin)),)
        system = _string(values.get("system"), self.columns["system"], row.origin)
        opening = (Message("system", system),) if system.strip() else ()
        if self.name in ("messages", "sharegpt"):
            if values.get("tools") not in NO_TOOLS:
                raise _no_tools(f"the row names {self.columns['tools']!r}", row.origin)
            (field,) = FIELDS[self.name][0]
            turns = tuple(_turns(values[field], self.columns[field], row.origin))
            return turns if turns[0].role == "system" else (*opening, *turns)
        question, answer = FIELDS[self.name][0]
        user = Message(
            "user",
            _filled(values[question], self.columns[question], row.origin),
            input=_string(values.get("input"), self.columns.get("input", ""), row.origin),
        )
        earlier = _history(values.get("history"), self.columns.get("history", ""), row.origin)
        said = _answer(values[answer], self.columns[answer], row.origin)
        return (*opening, *earlier, user, Message("assistant", said))


@dataclass(frozen=True)
class Forms:
    """The forms that rows may have, the likeliest first."""

    forms: Sequence[Form]
    evidence: Mapping[str, int]
    """How many of the first rows fit each form."""

    @property
    def likeliest(self) -> str:
        """The form of most rows."""
        return self.forms[0].name

    def read(self, row: Row) -> tuple[str, Conversation]:
        """A row's form, and the row as turns.

        Raises:
            DataError: what is wrong with the row, at its `file:line`.
        """
        form = _form_of(row, self.forms)
        if form is None:
            raise self._unknown(row)
        if form.name == "prompt" and isinstance(row.values.get("label"), bool):
            why = "'label' says whether the completion is wanted"
            raise _preference(row, why, "keep the rows whose label is true, without that column")
        try:
            return form.name, form.conversation(row)
        except EmptyAnswerError as error:
            is_mapped = "chosen" in form.columns.values()
            raise (None if is_mapped else _two_answers(row)) or error from None

    def _unknown(self, row: Row) -> DataError:
        if (two := _two_answers(row)) is not None:
            return two
        likely = [form for form in self.forms if self.evidence.get(form.name)] or self.forms
        expected = [", ".join(form.columns[field] for field in FIELDS[form.name][0]) for form in likely]
        return DataError(
            f"unknown fields: found {', '.join(map(repr, row.values)) or 'none'}; expected {'; or '.join(expected)}",
            where=row.origin,
            fix=f"name the columns, e.g. 'data.map={{{_likely_map(row)}}}'",
        )


def detect_forms(rows: Iterable[Row], form: str, mapping: Mapping[str, str]) -> Forms:
    """Find the forms of rows from their columns.

    Args:
        rows: the first ones, as many as should be looked at.
        form: a form's name, or auto.
        mapping: column of a field, where it carries another name; only forms that have all these fields are meant.

    Raises:
        DataError: the mapping names fields that no form has.
    """
    asked = [name for name in FIELDS if form in ("auto", name)]
    names = [name for name in asked if mapping.keys() <= {*FIELDS[name][0], *FIELDS[name][1]}]
    if not names:
        raise DataError(
            f"no form has all fields that data.map names: {', '.join(mapping)}",
            fix="data.map={field: your column}, with the fields of one form: "
            + "; ".join(f"{', '.join([*FIELDS[name][0], *FIELDS[name][1]])} ({name})" for name in asked),
        )
    forms = [Form(name, {field: mapping.get(field, field) for field in sum(FIELDS[name], ())}) for name in names]
    evidence: Counter[str] = Counter()
    for row in rows:
        found = _form_of(row, forms)
        evidence.update([found.name if found is not None else ""])
    return Forms(sorted(forms, key=lambda form: -evidence[form.name]), evidence)


def _form_of(row: Row, forms: Sequence[Form]) -> Form | None:
    """The first form that fits, of those that do one that is not null."""
    fitting = [form for form in forms if form.fits(row)]
    return next((form for form in fitting if form.speaks(row)), fitting[0] if fitting else None)


def _likely_map(row: Row) -> str:
    """What data.map should say, by the names that columns usually have, else by their order."""
    turns = [
        name for name, value in row.values.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if turns:
        return f"messages: {turns[0]}"
    texts = {name.lower(): name for name, value in row.values.items() if isinstance(value, str)}
    found = {field: next((texts[name] for name in names if name in texts), "") for field, names in USUAL.items()}
    others = [name for name in texts.values() if name not in found.values() and name.lower() != "id"]
    others += ["question", "answer"][len(others) :]
    for field in ("prompt", "completion"):
        found[field] = found[field] or others.pop(0)
    renamed = {"prompt": "instruction", "completion": "output"} if found["input"] else {}
    return ", ".join(f"{renamed.get(field, field)}: {column}" for field, column in found.items() if column)


def _two_answers(row: Row) -> DataError | None:
    names = next((pair for pair in PREFERENCES if row.values.keys() >= {*pair}), None)
    if names is None:
        return None
    chosen = row.values[names[0]]
    if isinstance(chosen, list) and len(chosen) > 1:
        fix = f"data.map={{messages: {names[0]}}} trains on the wanted answer"
    elif isinstance(chosen, str) and "prompt" in row.values:
        fix = f"data.map={{completion: {names[0]}}} trains on the wanted answer"
    else:
        fix = "write the wanted answer where the other forms have theirs: behind the last message, or as output"
    return _preference(row, f"two answers, {names[0]!r} and {names[1]!r}", fix)


def _preference(row: Row, why: str, fix: str) -> DataError:
    return DataError(
        f"a preference row ({why}): nybble trains on one answer a row, not on preferences", where=row.origin, fix=fix
    )


def _no_tools(what: str, origin: str) -> DataError:
    return DataError(
        f"{what}: calls of tools are not trained", where=origin, fix="take these rows out, or write the calls as text"
    )


def _string(value: Any, column: str, origin: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = "NaN" if value != value else type(value).__name__
        raise DataError(f"{column!r} must be text, found {kind}: {value!r:.60}", where=origin)
    if "\0" in value:
        raise DataError(f"{column!r} holds a null character", where=origin, fix="delete it")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{column!r} holds half a surrogate pair, which is no character", where=origin)
    return value


def _filled(value: Any, column: str, origin: str) -> str:
    text = _string(value, column, origin)
    if not text.strip():
        raise DataError(f"an empty {column!r}", where=origin, fix="delete the row or fill it in")
    return text


def _answer(value: Any, column: str, origin: str) -> str:
    answer = _string(value, column, origin)
    if not answer.strip():
        raise EmptyAnswerError(
            f"a row without an answer: {column!r} is empty", where=origin, fix="delete the row or fill it in"
        )
    return answer


def _history(value: Any, column: str, origin: str) -> Iterator[Message]:
    """The turns before an alpaca row's own, as LLaMA-Factory writes them."""
    for pair in value if isinstance(value, list) else [value] if value else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{column!r} must be a list of [question, answer], found {value!r:.60}", where=origin)
        yield Message("user", _filled(pair[0], f"question in {column}", origin))
        yield Message("assistant", _answer(pair[1], f"answer in {column}", origin))


def _turns(value: Any, column: str, origin: str) -> Iterator[Message]:
    """Turns that alternate user and assistant after at most one system message, and end with an answer."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{column!r} must be a list of turns, {{role, content}} or {{from, value}}", where=origin)
    expected: Role = "user"
    for place, turn in enumerate(value, 1):
        message = _turn(turn, place, origin)
        if message.role == "system" and place == 1:
            if message.content.strip():
                yield message
            continue
        if message.role != expected:
            raise DataError(
                f"message {place} is from {message.role}, expected {expected}: turns alternate", where=origin,
                fix="join what one speaker says in a row; a conversation begins with the user",
            )  # fmt: skip
        yield message
        expected = "assistant" if expected == "user" else "user"
    if expected == "assistant" or message.role == "system":
        raise EmptyAnswerError(
            "a row without an answer: the conversation ends before the assistant speaks", where=origin
        )


def _turn(turn: Any, place: int, origin: str) -> Message:
    speaker, speech = _key_of(turn, SPEAKER), _key_of(turn, SPEECH)
    if speaker is None or speech is None:
        raise DataError(
            f"message {place} must have role and content, or from and value; found {turn!r:.80}", where=origin
        )
    role = turn[speaker] if isinstance(turn[speaker], str) else repr(turn[speaker])
    if role.lower() in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise _no_tools(f"message {place} is from or for a tool", origin)
    if role.lower() not in ROLES:
        raise DataError(f"message {place}: {speaker} {role!r:.40} is not one of {', '.join(ROLES)}", where=origin)
    name = ROLES[role.lower()]
    for key, usual in (("weight", (None, 1)), ("train", (None, True))):
        if name == "assistant" and turn.get(key) not in usual:
            raise DataError(
                f"message {place} has {key} {turn[key]!r:.20}; every answer counts the same here", where=origin,
                fix=f"delete the {key}, or set data.train_on=last where only the last answer should count",
            )  # fmt: skip
    read = _answer if name == "assistant" else _filled if name == "user" else _string
    return Message(name, read(turn[speech], f"{speech} of message {place}", origin))


def _key_of(turn: Any, keys: Sequence[str]) -> str | None:
    """Which of the keys a turn has, and rather one that is not null."""
    present = [key for key in keys if isinstance(turn, dict) and key in turn]
    return next((key for key in present if turn[key] is not None), present[0] if present else None)
