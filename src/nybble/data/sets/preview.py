"""Shows rows as the model reads them: the text after the template, what is trained and what is not, and the control tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from nybble.data.batches import IGNORED, Collator
from nybble.data.rows.formats import Target
from nybble.data.rows.reading import OpenRows
from nybble.data.text.template import choose_template
from nybble.data.text.tokenise import Pass, Sample
from nybble.data.text.tokens import Tokens
from nybble.errors import DataError
from nybble.recipe import DataOptions
from nybble.terminal import tell

READ_PER_ROW = 64  # rows to read at most for each row shown, in case most cannot be trained on
TRAINED, MASKED, SPECIAL = "bold green", "dim", "reverse"
OPEN, CLOSE = "[[", "]]"  # around trained text if there is no colour


def preview(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    console: Console,
    *,
    ids: bool = False,
    target: Target = "answers",
) -> None:
    """Print the first rows that can be trained on, as the collator returns them.

    Args:
        options: the recipe's data section.
        tokenizer: the base model's.
        count: number of rows.
        console: where to print.
        ids: print the token ids too, each with its text.
        target: what the rows are read for; both answers of a pair are shown.

    Raises:
        DataError: no row can be trained on; this is the first fault.
    """
    with OpenRows(options, target=target) as rows:
        template = choose_template(tokenizer, options.template, rows.forms.most_common)
        reading = Pass(rows.forms, template, options)
        samples = list(itertools.islice(reading.samples(itertools.islice(rows.items(), READ_PER_ROW * count)), count))
    if not samples:
        raise reading.faults[0] if reading.faults else DataError("there is no row that fits data.max_length")
    plain = console.no_color or not console.is_terminal
    legend = (
        f"{OPEN}trained{CLOSE}, not trained" if plain else Text.assemble(("trained", TRAINED), ", ", ("not", MASKED))
    )
    console.print(legend, highlight=False, markup=False)
    for sample in samples:
        for title, tokens in _texts(sample):
            _print(title, tokens, tokenizer, console, plain, ids)
    if reading.counts.faulty:
        line = f"{reading.counts.faulty} rows before these cannot be trained on; nybble data check lists them"
        console.print()
        tell(console, Text(line, "yellow"), hang=2)


def _texts(sample: Sample) -> Iterator[tuple[str, Tokens]]:
    """What the model reads of a sample, each text with its title: of a pair, the prompt with each answer."""
    judged = sample.judged
    if judged is None:
        yield sample.origin, sample.tokens
    elif not judged.rejected:
        yield f"{sample.origin}, {'good' if judged.is_good else 'bad'}", sample.tokens
    else:
        prompt, rejected = sample.tokens.ids[: judged.prompt], judged.rejected
        yield f"{sample.origin}, chosen", sample.tokens
        yield (
            f"{sample.origin}, rejected",
            Tokens([*prompt, *rejected], [False] * len(prompt) + [True] * len(rejected)),
        )


def _print(
    origin: str, row: Tokens, tokenizer: PreTrainedTokenizerBase, console: Console, plain: bool, ids: bool
) -> None:
    batch = Collator(tokenizer.pad_token_id or 0)([{"input_ids": row.ids, "trained": row.trained}])
    ids_of, labels = batch["input_ids"], batch["labels"]
    assert isinstance(ids_of, torch.Tensor)
    assert isinstance(labels, torch.Tensor)
    tokens, trained = ids_of[0].tolist(), (labels[0] != IGNORED).tolist()
    title = f"{origin}: {len(tokens)} tokens, {sum(trained)} trained"
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    text = Text()
    for piece, learnt, special in _pieces(tokenizer, tokens, trained):
        style = (TRAINED if learnt else MASKED) + (f" {SPECIAL}" if special else "")
        text.append(f"{OPEN}{piece}{CLOSE}" if plain and learnt else piece, style="" if plain else style)
    console.print(text, soft_wrap=True, highlight=False)
    if ids:
        shown = zip(tokens, tokenizer.convert_ids_to_tokens(tokens), trained, strict=True)
        token_texts = [
            f"{OPEN}{token} {name}{CLOSE}" if plain and learnt else f"{token} {name}" for token, name, learnt in shown
        ]
        listed = Text()
        for token_text, learnt in zip(token_texts, trained, strict=True):
            listed.append(token_text + "  ", style="" if plain else TRAINED if learnt else MASKED)
        console.print(listed, highlight=False)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], trained: list[bool]
) -> Iterator[tuple[str, bool, bool]]:
    """Pieces of the row's text, each with whether it is trained and whether it is a control token; together they are the row."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    start, shown = 0, ""
    while start < len(tokens):
        end = start + 1
        if tokens[start] not in special:
            while end < len(tokens) and trained[end] == trained[start] and tokens[end] not in special:
                end += 1
        # A piece is the difference from the text before it: decoded alone, it would lose a leading space.
        whole = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        yield whole[len(shown) :], trained[start], tokens[start] in special
        start, shown = end, whole
