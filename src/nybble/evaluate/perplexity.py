"""Loss in nats per token and perplexity, of single rows and of whole texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from nybble.data.batches import Collator, Sample
from nybble.data.order import batches
from nybble.data.text.template import puts_bos
from nybble.errors import ModelError
from nybble.objective.likelihood import MEASURED_TOKENS, bare, token_losses


@dataclass(frozen=True)
class Losses:
    """Cross-entropy of rows.

    Attributes:
        sums: (rows,) nats, summed over each row's trained tokens.
        tokens: (rows,) the number of trained tokens.
    """

    sums: numpy.ndarray
    tokens: numpy.ndarray

    @property
    def mean(self) -> float:
        """Nats per token, over all tokens."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(numpy.exp(self.mean))


def row_losses(
    model: torch.nn.Module,
    samples: Sequence[Sample],
    pad_id: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Losses:
    """The loss of each sample, independent of its batch.

    Args:
        model: the model, on its device and in evaluation mode.
        samples: tokenised rows: input_ids and trained.
        pad_id: any id; nothing attends to it.
        progress: called with the number of rows done.

    Raises:
        ModelError: a token id without an embedding.
    """
    highest, rows = max((max(sample["input_ids"]) for sample in samples), default=0), bare(model).config.vocab_size
    if highest >= rows:
        raise ModelError(
            f"the tokenizer gives token id {highest}, but the model has embeddings for ids 0 to {rows - 1:,}",
            fix="use the tokenizer that came with the weights",
        )
    sums, tokens = numpy.zeros(len(samples)), numpy.zeros(len(samples))
    device = next(model.parameters()).device
    done = 0
    for members in batches([len(sample["input_ids"]) for sample in samples], MEASURED_TOKENS):
        batch = Collator(pad_id)([samples[member] for member in members])
        moved = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
        losses = token_losses(model, moved)
        owners = batch["predicting"] // batch["input_ids"].shape[1]  # type: ignore[union-attr]
        sums[members] = numpy.bincount(owners, weights=losses.double().cpu().numpy(), minlength=len(members))
        tokens[members] = numpy.bincount(owners, minlength=len(members))
        done += len(members)
        progress(done)
    return Losses(sums, tokens)


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Sample]:
    """A text as consecutive rows of `length` tokens; each starts with BOS if the tokenizer adds one.

    This is the usual perplexity of a document: every token of a window except its first is predicted.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [tokenizer.bos_token_id] if puts_bos(tokenizer) else []
    step = length - len(start)
    windows = [[*start, *ids[first : first + step]] for first in range(0, len(ids), step)]
    return [{"input_ids": window, "trained": [True] * len(window)} for window in windows if len(window) > 1]
