"""Rows of every form to conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nybble.data.formats.conversation import Conversation, EmptyAnswerError, Message
from nybble.data.formats.turns import history, no_tools, turns_of
from nybble.data.formats.unknown import likely_map, preference, two_answers
from nybble.data.formats.values import answer_of, filled, string
from nybble.data.readers import Row
from nybble.errors import DataError

NO_TOOLS: tuple[object, ...] = (None, "", [], "[]")

FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # form: (required fields, optional fields); of forms that fit equally well the upper is meant
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt": (("prompt", "completion"), ("system",)),
    "text": (("text",), ()),
}


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
            return (Message("text", filled(values["text"], self.columns["text"], row.origin)),)
        system = string(values.get("system"), self.columns["system"], row.origin)
        opening = (Message("system", system),) if system.strip() else ()
        if self.name in ("messages", "sharegpt"):
            if values.get("tools") not in NO_TOOLS:
                raise no_tools(f"the row names {self.columns['tools']!r}", row.origin)
            (field,) = FIELDS[self.name][0]
            turns = tuple(turns_of(values[field], self.columns[field], row.origin))
            return turns if turns[0].role == "system" else (*opening, *turns)
        question, answer = FIELDS[self.name][0]
        user = Message(
            "user",
            filled(values[question], self.columns[question], row.origin),
            input=string(values.get("input"), self.columns.get("input", ""), row.origin),
        )
        earlier = history(values.get("history"), self.columns.get("history", ""), row.origin)
        said = answer_of(values[answer], self.columns[answer], row.origin)
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
            raise preference(row, why, "keep the rows whose label is true, without that column")
        try:
            return form.name, form.conversation(row)
        except EmptyAnswerError as error:
            is_mapped = "chosen" in form.columns.values()
            raise (None if is_mapped else two_answers(row)) or error from None

    def _unknown(self, row: Row) -> DataError:
        if (two := two_answers(row)) is not None:
            return two
        likely = [form for form in self.forms if self.evidence.get(form.name)] or self.forms
        expected = [", ".join(form.columns[field] for field in FIELDS[form.name][0]) for form in likely]
        return DataError(
            f"unknown fields: found {', '.join(map(repr, row.values)) or 'none'}; expected {'; or '.join(expected)}",
            where=row.origin,
            fix=f"name the columns, e.g. 'data.map={{{likely_map(row)}}}'",
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
