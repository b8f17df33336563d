"""One pass over rows: to conversations, without duplicates, to tokens that fit, while everything is counted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nybble.data.rows.faults import Faults
from nybble.data.rows.formats import Conversation, EmptyAnswerError, Forms, Judged
from nybble.data.rows.readers import Item, Notice, Row
from nybble.data.text.fit import cut_text, halve, last_answer, truncate
from nybble.data.text.judged import JudgedTokens, fitted, judged_tokens
from nybble.data.text.meter import TemplateLimitError
from nybble.data.text.skeleton import Part
from nybble.data.text.template import Template, TextRun
from nybble.data.text.tokens import EncodingError, Tokens, encode, join
from nybble.errors import DataError
from nybble.recipe import DataOptions

BATCH = 512  # rows tokenised in one call: enough for the tokenizer's threads, few enough for memory
NOTICES_SHOWN = 10
BATCH_SIZE = 16_000_000  # characters of a batch of several rows
LONGEST_SYSTEM = 1 << 16  # characters of a system message; longer ones are not counted
MAX_SYSTEMS = 1000  # distinct system messages that are counted: one that most rows share is among the first
Progress = Callable[[int], None]
Runs = list[TextRun | Part]
"""A text as the template divides it."""


@dataclass
class Counts:
    """The results of a pass over rows, counted."""

    rows: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    faulty: int = 0
    """Rows that cannot be trained on, including those without an answer."""
    empty_answers: int = 0
    duplicates: int = 0
    overlength: int = 0
    """Rows over max_length, which are dropped, truncated or split."""
    lost_rows: int = 0
    """Rows in which truncating (or splitting, with overlength=split) leaves no answer."""
    lost_answer_tokens: int = 0
    """Trained tokens lost by truncating (or splitting)."""
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    highest_id: int = 0
    missing_columns: list[str] = field(default_factory=list)
    """Columns that data.map names and no row has."""
    notices: dict[str, int] = field(default_factory=dict)
    """Notices about how rows were read, each with the number of rows; 0 for a notice about a file."""
    system: str = ""
    """The system message with which more than half of the distinct rows begin; empty if there is none."""

    def notice_lines(self) -> list[str]:
        """The first 10 notices as lines, and how many more there are."""
        lines = [
            f"{what} ({count:,} row{'s' * (count != 1)})" if count else what for what, count in self.notices.items()
        ]
        return lines[:NOTICES_SHOWN] + [f"and {len(lines) - NOTICES_SHOWN} more notices"] * (len(lines) > NOTICES_SHOWN)

    @property
    def distinct(self) -> int:
        """The number of distinct rows that could be read."""
        return self.rows - self.faulty - self.duplicates


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation or document, or a piece of it."""

    tokens: Tokens
    origin: str
    source: int
    is_piece: bool = False
    """Whether it is the beginning or middle of a document, and so does not end with EOS."""
    judged: JudgedTokens | None = None
    """What is known of a judged answer besides its tokens; None for one that is imitated."""

    @property
    def length(self) -> int:
        """How many tokens are computed for it: a pair is two sequences."""
        both = self.judged.prompt + len(self.judged.rejected) if self.judged and self.judged.rejected else 0
        return len(self.tokens.ids) + both

    def as_row(self) -> dict[str, Any]:
        """As the collator takes it."""
        row = {
            "input_ids": self.tokens.ids,
            "trained": self.tokens.trained,
            "length": self.length,
            "is_piece": self.is_piece,
            "source": self.source,
            "origin": self.origin,
        }
        return row if self.judged is None else row | dataclasses.asdict(self.judged)


@dataclass(frozen=True)
class ReadRow:
    """A row as a conversation, perhaps judged."""

    judged: Judged
    origin: str
    source: int

    @property
    def conversation(self) -> Conversation:
        """The conversation, with the answer that was chosen or labelled."""
        return self.judged.conversation

    @property
    def conversations(self) -> list[Conversation]:
        """All that become tokens: of a pair, with each answer."""
        judged = self.judged
        return [judged.conversation, *([judged.rejected] if judged.rejected is not None else [])]


@dataclass
class Pass:
    """One pass over rows, in their order.

    Args:
        forms: how rows are read.
        template: how conversations become tokens; None if they need not.
        options: what is done with duplicates, long rows and prompts.
        progress: called with the number of rows read so far.
    """

    forms: Forms
    template: Template | None
    options: DataOptions
    progress: Progress = lambda _: None
    keep_duplicates: bool = False
    counts: Counts = field(default_factory=Counts)
    row_faults: Faults = field(default_factory=Faults)
    """The faults of rows; `counts.faulty` is the number of faulty rows."""
    lengths: dict[int, int] = field(default_factory=dict)
    """The number of rows of each length in tokens, before any is shortened."""

    @property
    def faults(self) -> list[DataError]:
        """The first distinct faults, each with all its lines."""
        return self.row_faults.listed()

    def conversations(self, items: Iterable[Item]) -> Iterator[ReadRow]:
        """Every distinct row as a conversation; the faults of other rows are noted."""
        seen: set[bytes] = set()
        kept = 0
        systems: Counter[str] = Counter()
        self.counts.missing_columns = list(self.options.map.values())
        for item in items:
            if kept == self.options.limit:
                break
            if isinstance(item, Notice):
                self.counts.notices.setdefault(item.what, 0)
                continue
            self.counts.rows += 1
            if self.counts.rows % BATCH == 0:
                self.progress(self.counts.rows)
            read = self._read(item)
            if read is None:
                continue
            if not self.keep_duplicates:
                what = read.conversation if self.forms.target == "answers" else read.judged
                digest = hashlib.blake2b(repr(what).encode(), digest_size=16).digest()
                if digest in seen:
                    self.counts.duplicates += 1
                    continue
                seen.add(digest)
            kept += 1
            _count_system(read.conversation, systems)
            yield read
        self.counts.system = next((text for text, count in systems.most_common(1) if 2 * count > kept), "")
        self.progress(self.counts.rows)

    def samples(self, items: Iterable[Item]) -> Iterator[Sample]:
        """The tokens of every distinct row that fits or is shortened to fit."""
        assert self.template is not None
        distinct = self.conversations(items)
        for batch in _batches(distinct):
            for sample in self._tokenised(batch):
                self.counts.kept += 1
                rejected = sample.judged.rejected if sample.judged else []
                self.counts.tokens += sample.length
                self.counts.trained_tokens += sum(sample.tokens.trained) + len(rejected)
                self.counts.highest_id = max(self.counts.highest_id, *sample.tokens.ids, *rejected)
                yield sample

    def _read(self, item: Row | DataError) -> ReadRow | None:
        try:
            if isinstance(item, DataError):
                raise item
            if self.counts.missing_columns:
                present = self.forms.with_form_names(item).values
                self.counts.missing_columns = [name for name in self.counts.missing_columns if name not in present]
            form, judged, notes = self.forms.read(item)
        except DataError as fault:
            self._note(fault)
            return None
        self.counts.forms[form] = self.counts.forms.get(form, 0) + 1
        for note in notes:
            self.counts.notices[note] = self.counts.notices.get(note, 0) + 1
        return ReadRow(judged, item.origin, item.source)

    def _note(self, fault: DataError) -> None:
        self.counts.faulty += 1
        self.counts.empty_answers += isinstance(fault, EmptyAnswerError)
        self.row_faults.add(fault, self.counts.rows)

    def _note_at(self, read: ReadRow, fault: DataError) -> None:
        self._note(DataError(fault.what, where=read.origin, fix=fault.fix))

    def _tokenised(self, batch: list[ReadRow]) -> Iterator[Sample]:
        assert self.template is not None
        runs: list[list[Runs]] = []
        good: list[ReadRow] = []
        for read in batch:
            try:
                runs.append([self.template.runs(conversation) for conversation in read.conversations])
                good.append(read)
            except TemplateLimitError:
                raise  # it is not this row's fault
            except DataError as fault:
                self._note_at(read, fault)
        for texts, read in self._encoded(runs, good):
            length = max(len(tokens.ids) for tokens in texts)
            self.lengths[length] = self.lengths.get(length, 0) + 1
            if self.forms.target != "answers":
                yield from self._judged(texts, read)
                continue
            tokens = self._masked(texts[0])
            if length <= self.options.max_length:
                yield Sample(tokens, read.origin, read.source)
            else:
                yield from self._shortened(tokens, read)

    def _judged(self, texts: list[Tokens], read: ReadRow) -> Iterator[Sample]:
        """The samples of a judged row: its pair, or, where labels are learnt from, each of its answers."""
        assert self.template is not None
        try:
            found = judged_tokens(texts, read.judged, self.forms.target, self.options.train_on == "all")
        except DataError as fault:
            self._note_at(read, fault)
            return
        for tokens, judged in found:
            fits = fitted(tokens, judged, self.options.max_length, self.template.end_id)
            if fits != (tokens, judged):
                self.counts.overlength += 1
                lost = [] if fits is None else [sum(fits[0].trained), len(fits[1].rejected)]
                self.counts.lost_rows += fits is None
                self.counts.lost_answer_tokens += sum(tokens.trained) + len(judged.rejected) - sum(lost)
                if self.options.overlength != "truncate":
                    continue
            if fits is not None:
                yield Sample(fits[0], read.origin, read.source, judged=fits[1])

    def _encoded(self, runs: list[list[Runs]], reads: list[ReadRow]) -> Iterator[tuple[list[Tokens], ReadRow]]:
        """The tokens of each text of each row, computed all at once or, if the tokenizer fails, row by row, to find the one that
        it fails on."""
        assert self.template is not None
        try:
            tokens = iter(join(self.template.tokenizer, [text for texts in runs for text in texts]))
        except EncodingError as fault:
            if len(reads) == 1:
                self._note_at(reads[0], fault)
                return
            for row, read in zip(runs, reads, strict=True):
                yield from self._encoded([row], [read])
        else:
            yield from (
                (list(itertools.islice(tokens, len(texts))), read) for texts, read in zip(runs, reads, strict=True)
            )

    def _masked(self, tokens: Tokens) -> Tokens:
        if self.options.train_on == "last":
            return last_answer(tokens)
        if self.options.train_on == "all":
            return Tokens(tokens.ids, [True] * len(tokens.ids))
        return tokens

    def _shortened(self, tokens: Tokens, read: ReadRow) -> Iterator[Sample]:
        """The samples made from a row over max_length; what is lost by that, or would be lost by truncating, is counted."""
        split = self.options.overlength == "split"
        samples = list(self._split(tokens, read) if split else self._truncated(tokens, read))
        self.counts.overlength += 1
        self.counts.lost_rows += not samples
        # With train_on=last each part of a split chat has its own last answer, so more may be trained than before.
        trained = sum(sum(sample.tokens.trained) for sample in samples)
        self.counts.lost_answer_tokens += max(sum(tokens.trained) - trained, 0)
        if self.options.overlength in ("truncate", "split"):
            yield from samples

    def _truncated(self, tokens: Tokens, read: ReadRow) -> Iterator[Sample]:
        assert self.template is not None
        is_text = read.conversation[0].role == "text"
        end_id = self.template.tokenizer.eos_token_id if is_text else self.template.end_id
        truncated = truncate(tokens, self.options.max_length, end_id)
        if truncated is not None:
            yield Sample(truncated, read.origin, read.source)

    def _split(self, tokens: Tokens, read: ReadRow) -> Iterator[Sample]:
        if read.conversation[0].role == "text":
            *pieces, last = cut_text(tokens, self.options.max_length)
            yield from (Sample(piece, read.origin, read.source, is_piece=True) for piece in pieces)
            yield Sample(last, read.origin, read.source)
        else:
            yield from (Sample(piece, read.origin, read.source) for piece in self._split_chat(read.conversation))

    def _split_chat(self, conversation: Conversation) -> Iterator[Tokens]:
        """A chat in parts that fit; a single question and answer that do not fit are left out."""
        assert self.template is not None
        for half in halve(conversation) or ():
            (tokens,) = encode(self.template, [half])
            if len(tokens.ids) <= self.options.max_length:
                yield self._masked(tokens)
            else:
                yield from self._split_chat(half)


def _batches(distinct: Iterable[ReadRow]) -> Iterator[list[ReadRow]]:
    """Rows in the batches that are tokenised together."""
    batch: list[ReadRow] = []
    size = 0
    for read in distinct:
        messages = itertools.chain.from_iterable(read.conversations)
        length = sum(len(message.content) + len(message.input) for message in messages)
        if batch and (len(batch) == BATCH or size + length > BATCH_SIZE):
            yield batch
            batch, size = [], 0
        batch.append(read)
        size += length
    if batch:
        yield batch


def _count_system(conversation: Conversation, systems: Counter[str]) -> None:
    first = conversation[0]
    if first.role != "system" or len(first.content) > LONGEST_SYSTEM:
        return
    if first.content in systems or len(systems) < MAX_SYSTEMS:
        systems[first.content] += 1
