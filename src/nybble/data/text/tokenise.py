"""One pass over rows: to conversations, without duplicates, to tokens that fit, with a count of everything found."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from nybble.data.rows.faults import Faults
from nybble.data.rows.formats import Conversation, EmptyAnswerError, Forms
from nybble.data.rows.readers import Item, Notice, Row
from nybble.data.text.fit import cut_text, halve, last_answer, truncate
from nybble.data.text.meter import TemplateLimitError
from nybble.data.text.skeleton import Part
from nybble.data.text.template import Template, TextRun
from nybble.data.text.tokens import EncodingError, Tokens, encode, join
from nybble.errors import DataError
from nybble.recipe import DataOptions

BATCH = 512  # rows tokenised in one call: enough for the tokenizer's threads, little enough to hold
NOTICES_SHOWN = 10
BATCH_SIZE = 16_000_000  # characters of them, or one row
LONGEST_SYSTEM = 1 << 16  # characters of a system message that is counted
SYSTEMS = 1000  # different system messages that are counted: one that most rows share is among the first
Progress = Callable[[int], None]


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    faulty: int = 0
    """Rows that cannot be trained on, those without an answer among them."""
    empty_answers: int = 0
    duplicates: int = 0
    overlength: int = 0
    """Rows over max_length: dropped, truncated or split."""
    lost_rows: int = 0
    """Rows of which truncating, or splitting where that is asked for, leaves no answer."""
    lost_answer_tokens: int = 0
    """Trained tokens that it takes away."""
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    highest_id: int = 0
    missing_columns: list[str] = field(default_factory=list)
    """What data.map names and no row has."""
    notices: dict[str, int] = field(default_factory=dict)
    """What the user should know of how rows were read, and of how many; 0 where it is about a file."""
    system: str = ""
    """The system message that more than half of the distinct rows begin with; empty where there is no such one."""

    def notice_lines(self) -> list[str]:
        """The notices as lines, the first 10."""
        lines = [
            f"{what} ({count:,} row{'s' * (count != 1)})" if count else what for what, count in self.notices.items()
        ]
        return lines[:NOTICES_SHOWN] + [f"and {len(lines) - NOTICES_SHOWN} more notices"] * (len(lines) > NOTICES_SHOWN)

    @property
    def distinct(self) -> int:
        """Rows that could be read, each once."""
        return self.rows - self.faulty - self.duplicates


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation or document, or a piece of it."""

    tokens: Tokens
    origin: str
    source: int
    is_piece: bool = False
    """The beginning or middle of a document, which EOS does not end."""


@dataclass(frozen=True)
class ReadRow:
    """A row as turns."""

    conversation: Conversation
    origin: str
    source: int


@dataclass
class Pass:
    """One pass over rows, in the order they come.

    Args:
        forms: how rows are read.
        template: how conversations become tokens.
        options: what is done with duplicates, long rows and prompts.
        progress: called with the number of rows read so far.
    """

    forms: Forms
    template: Template | None
    options: DataOptions
    progress: Progress = lambda _: None
    keep_duplicates: bool = False
    counts: Counts = field(default_factory=Counts)
    noted: Faults = field(default_factory=Faults)
    """What is wrong with rows; `counts.faulty` says with how many."""
    lengths: dict[int, int] = field(default_factory=dict)
    """How many rows have so many tokens, before any is cut."""

    @property
    def faults(self) -> list[DataError]:
        """The first different ones, each with all its lines."""
        return self.noted.listed()

    def conversations(self, items: Iterable[Item]) -> Iterator[ReadRow]:
        """Every distinct row as turns; what is wrong with others is noted."""
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
                digest = hashlib.blake2b(repr(read.conversation).encode(), digest_size=16).digest()
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
        """Tokens of every distinct row that fits or is made to fit."""
        assert self.template is not None
        distinct = self.conversations(items)
        for batch in _batches(distinct):
            for sample in self._tokenised(batch):
                self.counts.kept += 1
                self.counts.tokens += len(sample.tokens.ids)
                self.counts.trained_tokens += sum(sample.tokens.trained)
                self.counts.highest_id = max(self.counts.highest_id, *sample.tokens.ids)
                yield sample

    def _read(self, item: Row | DataError) -> ReadRow | None:
        try:
            if isinstance(item, DataError):
                raise item
            if self.counts.missing_columns:
                present = self.forms.named(item).values
                self.counts.missing_columns = [name for name in self.counts.missing_columns if name not in present]
            form, conversation, notes = self.forms.read(item)
        except DataError as fault:
            self._note(fault)
            return None
        self.counts.forms[form] = self.counts.forms.get(form, 0) + 1
        for note in notes:
            self.counts.notices[note] = self.counts.notices.get(note, 0) + 1
        return ReadRow(conversation, item.origin, item.source)

    def _note(self, fault: DataError) -> None:
        self.counts.faulty += 1
        self.counts.empty_answers += isinstance(fault, EmptyAnswerError)
        self.noted.add(fault, self.counts.rows)

    def _note_at(self, read: ReadRow, fault: DataError) -> None:
        self._note(DataError(fault.what, where=read.origin, fix=fault.fix))

    def _tokenised(self, batch: list[ReadRow]) -> Iterator[Sample]:
        assert self.template is not None
        runs: list[list[TextRun | Part]] = []
        good: list[ReadRow] = []
        for read in batch:
            try:
                runs.append(self.template.runs(read.conversation))
                good.append(read)
            except TemplateLimitError:
                raise  # it is no fault of this row
            except DataError as fault:
                self._note_at(read, fault)
        for tokens, read in self._encoded(runs, good):
            length = len(tokens.ids)
            self.lengths[length] = self.lengths.get(length, 0) + 1
            tokens = self._masked(tokens)
            if length <= self.options.max_length:
                yield Sample(tokens, read.origin, read.source)
            else:
                yield from self._shortened(tokens, read)

    def _encoded(self, runs: list[list[TextRun | Part]], reads: list[ReadRow]) -> Iterator[tuple[Tokens, ReadRow]]:
        """The tokens of rows, all at once; where the tokenizer fails, one by one, to know on which."""
        assert self.template is not None
        try:
            whole = join(self.template.tokenizer, runs)
        except EncodingError as fault:
            if len(reads) == 1:
                self._note_at(reads[0], fault)
                return
            for row, read in zip(runs, reads, strict=True):
                yield from self._encoded([row], [read])
        else:
            yield from zip(whole, reads, strict=True)

    def _masked(self, tokens: Tokens) -> Tokens:
        if self.options.train_on == "last":
            return last_answer(tokens)
        if self.options.train_on == "all":
            return Tokens(tokens.ids, [True] * len(tokens.ids))
        return tokens

    def _shortened(self, tokens: Tokens, read: ReadRow) -> Iterator[Sample]:
        """What is made of a row over max_length; what is lost by it, or would be by truncating, is counted."""
        made = list(self._split(tokens, read) if self.options.overlength == "split" else self._truncated(tokens, read))
        self.counts.overlength += 1
        self.counts.lost_rows += not made
        trained = sum(
            sum(sample.tokens.trained) for sample in made
        )  # more than before where a split part has its own last
        self.counts.lost_answer_tokens += max(sum(tokens.trained) - trained, 0)
        if self.options.overlength in ("truncate", "split"):
            yield from made

    def _truncated(self, tokens: Tokens, read: ReadRow) -> Iterator[Sample]:
        assert self.template is not None
        is_text = read.conversation[0].role == "text"
        end_id = self.template.tokenizer.eos_token_id if is_text else self.template.end_id
        rest = truncate(tokens, self.options.max_length, end_id)
        if rest is not None:
            yield Sample(rest, read.origin, read.source)

    def _split(self, tokens: Tokens, read: ReadRow) -> Iterator[Sample]:
        if read.conversation[0].role == "text":
            *pieces, last = cut_text(tokens, self.options.max_length)
            yield from (Sample(piece, read.origin, read.source, is_piece=True) for piece in pieces)
            yield Sample(last, read.origin, read.source)
        else:
            yield from (Sample(piece, read.origin, read.source) for piece in self._parted(read.conversation))

    def _parted(self, conversation: Conversation) -> Iterator[Tokens]:
        """A chat in parts that fit; a question whose own answer does not fit is left out."""
        assert self.template is not None
        for half in halve(conversation) or ():
            (tokens,) = encode(self.template, [half])
            if len(tokens.ids) <= self.options.max_length:
                yield self._masked(tokens)
            else:
                yield from self._parted(half)


def _batches(distinct: Iterable[ReadRow]) -> Iterator[list[ReadRow]]:
    """Rows in the batches that are tokenised together."""
    batch: list[ReadRow] = []
    size = 0
    for read in distinct:
        length = sum(len(message.content) + len(message.input) for message in read.conversation)
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
    if first.content in systems or len(systems) < SYSTEMS:
        systems[first.content] += 1
