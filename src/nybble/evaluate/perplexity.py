"""Loss in nats per token and perplexity, without a batch's logits: the head is applied to chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.data.batches import Collator, Sample, next_labels
from nybble.data.order import batches
from nybble.data.text.template import puts_bos
from nybble.engine.loss import CHUNK, last_hidden, summed_cross_entropy
from nybble.errors import ModelError

TOKENS_AT_ONCE = 4096  # of padded rows in a batch: 35 MB of hidden states for a 7B


@dataclass(frozen=True)
class Losses:
    """Cross-entropy of rows.

    Attributes:
        sums: (rows,) nats, over each row's trained tokens.
        tokens: (rows,) how many those are.
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


def summed_loss(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropy over a batch's trained tokens in nats, and how many they are.

    The head is applied in chunks to the places that have something to predict; a batch's logits never stand together.
    """
    inputs, targets, rows = _taken_apart(batch)
    count = torch.full((), len(rows), device=targets.device)  # a tensor from the host would be waited for
    head = bare(model).get_output_embeddings()
    if is_plain(head):
        return summed_cross_entropy(
            last_hidden(model, bare(model).get_decoder(), inputs), head.weight, targets, rows
        ), count
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[rows]  # the head has an adapter of its own
    return torch.nn.functional.cross_entropy(logits.float(), targets.flatten()[rows], reduction="sum"), count


def row_losses(
    model: torch.nn.Module,
    samples: Sequence[Sample],
    pad_id: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Losses:
    """The loss of each sample by itself, whatever is batched with it.

    Args:
        model: on its device, in evaluation mode.
        samples: tokenised rows: input_ids and trained.
        pad_id: any id; nothing attends to it.
        progress: called with the number of rows done.

    Raises:
        ModelError: a token id without an embedding.
    """
    highest, rows = max((max(sample["input_ids"]) for sample in samples), default=0), bare(model).config.vocab_size
    if highest >= rows:
        raise ModelError(
            f"the tokenizer gives token id {highest}, and the model has embeddings for ids 0 to {rows - 1:,}",
            fix="use the tokenizer that came with the weights",
        )
    sums, tokens = numpy.zeros(len(samples)), numpy.zeros(len(samples))
    device = next(model.parameters()).device
    done = 0
    for places in batches([len(sample["input_ids"]) for sample in samples], TOKENS_AT_ONCE):
        batch = Collator(pad_id)([samples[place] for place in places])
        moved = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
        losses = _token_losses(model, moved)
        owners = batch["predicting"] // batch["input_ids"].shape[1]  # type: ignore[union-attr]
        sums[places] = numpy.bincount(owners, weights=losses.double().cpu().numpy(), minlength=len(places))
        tokens[places] = numpy.bincount(owners, minlength=len(places))
        done += len(places)
        progress(done)
    return Losses(sums, tokens)


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Sample]:
    """A text as rows of so many tokens that follow one another; each begins with BOS where the tokenizer puts one.

    The usual perplexity of a document: all tokens are predicted but a window's first.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [tokenizer.bos_token_id] if puts_bos(tokenizer) else []
    room = length - len(start)
    windows = [[*start, *ids[place : place + room]] for place in range(0, len(ids), room)]
    return [{"input_ids": own, "trained": [True] * len(own)} for own in windows if len(own) > 1]


def bare(model: torch.nn.Module) -> PreTrainedModel:
    """The Transformers model inside what PEFT and DDP wrap around it."""
    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    found: PreTrainedModel = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    return found


def _token_losses(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy at each place that predicts something, (places,) in nats."""
    inputs, targets, rows = _taken_apart(batch)
    head = bare(model).get_output_embeddings()
    with torch.inference_mode():
        hidden = last_hidden(model, bare(model).get_decoder(), inputs).flatten(0, 1)[rows]
        wanted = targets.flatten()[rows]
        parts = [
            torch.nn.functional.cross_entropy(
                head(hidden[n : n + CHUNK]).float(), wanted[n : n + CHUNK], reduction="none"
            )
            for n in range(0, len(rows), CHUNK)
        ]
    return torch.cat(parts)


def _taken_apart(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """What the model takes, what each place predicts, and the places that predict something."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "predicting")}
    return inputs, next_labels(batch["labels"]), batch["predicting"]


def is_plain(head: Any) -> bool:
    """Whether a head is a frozen matrix, whose loss goes in chunks; others make the logits of a whole batch."""
    known: bool = type(head) is torch.nn.Linear  # not a quantised one, which is derived from it
    return known and head.bias is None and not head.weight.requires_grad
