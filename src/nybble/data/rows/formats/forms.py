"""The forms of rows, how they are detected, and how their rows become conversations and judged answers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nybble.data.rows.formats.conversation import Conversation, EmptyAnswerError, Message, Rules
from nybble.data.rows.formats.preferences import Judged, Target, label_of, pair_of
from nybble.data.rows.formats.turns import history, turn_list, turns_of
from nybble.data.rows.formats.unknown import one_answer, preference, two_answers, unknown_form
from nybble.data.rows.formats.values import RowContext, answer_of, nonempty, refuse_media, string, tool_fault
from nybble.data.rows.readers import Row, Unreadable
from nybble.errors import DataError

MAX_CACHED_COLUMNS = 100  # the renaming of columns is cached for rows with at most this many
SPLIT_TURNS = "prompt and completion written as messages are read as turns"
SPELLING = "column names are matched without regard to case and spaces"
NO_TOOLS: tuple[object, ...] = (None, "", [], "[]")
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # form: (required fields, optional fields); if several forms fit equally well, the first one counts
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt": (("prompt", "completion"), ("system",)),
    "text": (("text",), ()),
    "prompt-pair": (("prompt", "chosen", "rejected"), ("system",)),
    "pair": (("chosen", "rejected"), ("system",)),
    "label": (("prompt", "completion", "label"), ("system",)),
}
FORMS_OF: Mapping[Target, tuple[str, ...]] = {
    "answers": ("messages", "sharegpt", "alpaca", "prompt", "text"),
    "pairs": ("prompt-pair", "pair"),
    "labels": ("label", "prompt-pair", "pair"),
}
SPELLINGS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    # form: names that exports give its columns; Argilla writes chosen_response, and instruction or input for the prompt
    "prompt-pair": tuple(
        {"prompt": prompt, "chosen": f"chosen{end}", "rejected": f"rejected{end}"}
        for end in ("", "_response")
        for prompt in ("prompt", "instruction", "question", "input", "conversations")
    ),
    "pair": ({}, {"chosen": "chosen_response", "rejected": "rejected_response"}),
}


@dataclass(frozen=True)
class Form:
    """A form of rows, with the column from which each of its fields is read."""

    name: str
    columns: Mapping[str, str]

    def fits(self, row: Row) -> bool:
        """Whether a row has the columns that this form needs."""
        return all(self.columns[field] in row.values for field in FIELDS[self.name][0])

    def has_value(self, row: Row) -> bool:
        """Whether the form's first column is not null: data sets merged into one have nulls in each other's columns."""
        return row.values[self.columns[FIELDS[self.name][0][0]]] is not None

    def judged(self, row: Row, context: RowContext) -> Judged:
        """The row as judged answers.

        Raises:
            DataError: the row is faulty; it names the `file:line`.
        """
        if self.name == "label":
            label = label_of(row.values[self.columns["label"]], self.columns["label"], context)
            return Judged(replace(self, name="prompt").conversation(row, context), is_good=label)
        return pair_of(self._values(row, context), self.columns, context)

    def conversation(self, row: Row, context: RowContext) -> Conversation:
        """The row as a conversation.

        Raises:
            DataError: the row is faulty; it names the `file:line`.
        """
        values = self._values(row, context)
        if self.name == "text":
            return (Message("text", nonempty(values["text"], self.columns["text"], context)),)
        system = string(values.get("system"), self.columns["system"], context)
        opening = (Message("system", system),) if system.strip() else ()
        if (turns := self._turns(values, context)) is not None:
            return turns if turns[0].role == "system" else (*opening, *turns)
        question, answer = FIELDS[self.name][0]
        user = Message(
            "user",
            nonempty(values[question], self.columns[question], context),
            input=string(values.get("input"), self.columns.get("input", ""), context),
        )
        earlier = history(values.get("history"), self.columns.get("history", ""), context)
        content = answer_of(values[answer], self.columns[answer], context)
        return (*opening, *earlier, user, Message("assistant", content))

    def _values(self, row: Row, context: RowContext) -> dict[str, Any]:
        """The row's values by field."""
        refuse_media(row.values, "the row", context)
        values = {field: row.values.get(column) for field, column in self.columns.items()}
        for field, value in values.items():
            if isinstance(value, Unreadable):
                raise DataError(
                    f"{self.columns[field]!r} cannot be read: {value.why}",
                    where=context.origin,
                    fix="write the column as text",
                )
        return values

    def _turns(self, values: Mapping[str, Any], context: RowContext) -> Conversation | None:
        """The turns of a row that has turns: in one column, or in TRL's style in prompt and completion; None for other rows."""
        if self.name in ("messages", "sharegpt"):
            if values.get("tools") not in NO_TOOLS:
                raise tool_fault(f"the row names {self.columns['tools']!r}", context)
            (field,) = FIELDS[self.name][0]
            return tuple(turns_of(values[field], self.columns[field], context))
        if self.name != "prompt":
            return None
        prompt, completion = values["prompt"], values["completion"]
        prompt_turns, completion_turns = turn_list(prompt), turn_list(completion)
        has_list = (isinstance(prompt, list) and prompt_turns) or (isinstance(completion, list) and completion_turns)
        if not has_list and not (prompt_turns and completion_turns):  # a single text that looks like turns is a text
            return None
        context.notes.add(SPLIT_TURNS)
        turns = [*(prompt_turns or [{"role": "user", "content": prompt}])]
        turns += completion_turns or [{"role": "assistant", "content": completion}]
        return tuple(turns_of(turns, self.columns["prompt"], context))


class ParsedRow(NamedTuple):
    """A row that has been read."""

    form: str
    judged: Judged
    """The conversation; a row that is read for its answers has no judgement."""
    notes: frozenset[str]
    """What the user should know about how it was read."""

    @property
    def conversation(self) -> Conversation:
        """The row as a conversation, with the answer that was chosen or labelled."""
        return self.judged.conversation


@dataclass(frozen=True)
class Forms:
    """The forms that rows may have, the most common one first."""

    forms: Sequence[Form]
    evidence: Mapping[str, int]
    """The number of the first rows that fit each form."""
    rules: Rules = Rules.NOW
    target: Target = "answers"
    """What rows are read for."""

    @property
    def most_common(self) -> str:
        """The form of most rows."""
        return self.forms[0].name

    def read(self, row: Row) -> ParsedRow:
        """A row's form, and the row as a conversation.

        Raises:
            DataError: the row is faulty; it names the `file:line`.
        """
        if row.repeated is not None and self.rules == Rules.NOW:
            raise DataError(
                f"the key {row.repeated!r:.60} appears twice in one object",
                where=row.origin,
                fix="delete one of them: nybble cannot know which is meant",
            )
        original, row = row, self.with_form_names(row)
        form = _form_of(row, self.forms)
        if form is None:
            raise self._unknown(original, row)
        if form.name == "prompt" and isinstance(row.values.get("label"), bool):
            why = "'label' says whether the completion is good"
            raise preference(row, why, "kto", "keep the rows whose label is true, without that column")
        context = RowContext(row.origin, set() if row is original else {SPELLING}, self.rules)
        try:
            judged = Judged(form.conversation(row, context)) if self.target == "answers" else form.judged(row, context)
        except EmptyAnswerError as error:
            is_mapped = "chosen" in form.columns.values()
            raise (None if is_mapped else two_answers(row)) or error from None
        if self.rules == Rules.V0_5 and context.notes:
            raise DataError(f"{', '.join(sorted(context.notes))}, but not when the run began", where=row.origin)
        return ParsedRow(form.name, judged, frozenset(context.notes))

    def _unknown(self, original: Row, named: Row) -> DataError:
        seen = [form for form in self.forms if self.evidence.get(form.name)]
        firsts = {form.name: form for form in reversed(seen or self.forms)}  # one spelling of each
        expected = [_required(form) for form in reversed(firsts.values())]
        partial = [form for form in expected if seen and not named.values.keys().isdisjoint(form)]
        missing = [column for form in partial[:1] for column in form if column not in named.values]
        if self.target != "answers":
            return one_answer(original, self.target, expected, missing)
        return unknown_form(original, expected, missing)

    def with_form_names(self, row: Row) -> Row:
        """The row with its columns named as in the forms, if the names differ only in case or spaces, such as ' Output'."""
        names = tuple(row.values)
        # The names of rows with very many columns, perhaps a million, are not cached.
        find = _renamed if len(names) <= MAX_CACHED_COLUMNS else _renamed.__wrapped__
        renamed = find(names, self.columns)
        if not renamed:
            return row
        return replace(row, values={renamed.get(name, name): value for name, value in row.values.items()})

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """The columns that any of the forms reads."""
        return frozenset(column for form in self.forms for column in form.columns.values())


def detect_forms(rows: Iterable[Row], form: str, mapping: Mapping[str, str], target: Target = "answers") -> Forms:
    """Find the forms of rows from their columns.

    Args:
        rows: the first rows, as many as should be examined.
        form: a form's name, or auto.
        mapping: the columns of fields that have other names; only forms that have all these fields are considered.
        target: what the rows are read for.

    Raises:
        DataError: the mapping names fields that no form has.
    """
    candidates = [name for name in FORMS_OF[target] if form in ("auto", name)]
    names = [name for name in candidates if mapping.keys() <= {*FIELDS[name][0], *FIELDS[name][1]}]
    if not names:
        raise DataError(
            f"no form has all fields that data.map names: {', '.join(mapping)}",
            fix="data.map={field: your column}, with the fields of one form: "
            + "; ".join(f"{', '.join([*FIELDS[name][0], *FIELDS[name][1]])} ({name})" for name in candidates),
        )
    forms = [
        Form(name, {field: mapping.get(field, spelling.get(field, field)) for field in sum(FIELDS[name], ())})
        for name in names
        for spelling in SPELLINGS.get(name, ({},))
    ]
    evidence: Counter[str] = Counter()
    unsorted = Forms(forms, evidence)
    for row in rows:
        row_form = _form_of(unsorted.with_form_names(row), forms)
        evidence.update([row_form.name if row_form is not None else ""])
    return Forms(sorted(forms, key=lambda form: -evidence[form.name]), evidence, target=target)


@functools.lru_cache(maxsize=256)
def _renamed(names: tuple[str, ...], columns: frozenset[str]) -> dict[str, str]:
    """The names that stand for a missing column in another spelling, each with that column."""
    missing = {column.strip().lower(): column for column in columns if column not in names}
    renamed = {name: missing.get(name.strip().lower()) for name in names if name not in columns}
    counts = Counter(renamed.values())
    return {name: column for name, column in renamed.items() if column is not None and counts[column] == 1}


def _required(form: Form) -> list[str]:
    return [form.columns[field] for field in FIELDS[form.name][0]]


def _form_of(row: Row, forms: Sequence[Form]) -> Form | None:
    """The first form that fits, preferably one whose first column is not null."""
    fitting = [form for form in forms if form.fits(row)]
    return next((form for form in fitting if form.has_value(row)), fitting[0] if fitting else None)
