"""How far a merged model is from the run it came from, before anything is written.

The live model answers twice: with its 4-bit weights and the adapter beside them, and with each linear layer's weight
replaced, for the moment of its product, by the merged one. So two bases can be measured on a card, or in a memory, that holds
the 4-bit model only. Weights are merged on the device of the model: a 7B takes minutes a pass on a few CPU cores.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from nybble.chat.answerer import Answerer
from nybble.data.batches import Collator, Sample, next_labels
from nybble.data.order import batches
from nybble.engine.loss import last_hidden
from nybble.export.merge.merge import Merge
from nybble.objective.likelihood import bare
from nybble.weights.frozen import is_quantised

ROWS = 64  # validation rows that are compared
BATCH_TOKENS = 16_384  # of padded rows: each batch merges all weights anew
POSITIONS_AT_ONCE = 256  # whose logits are in memory together: 33 MB of Llama 2's, for each model


@dataclass(frozen=True)
class Divergence:
    """A merged model against the run, over the tokens that training counts.

    Attributes:
        kl: mean of KL(run || merged) over the next token's distribution, in nats per token.
        error: the standard error of that mean over rows' tokens.
        perplexity: of the merged model.
        agreement: share of the tokens whose likeliest successor is the same.
    """

    kl: float
    error: float
    perplexity: float
    agreement: float


@dataclass(frozen=True)
class Comparison:
    """Every base against the run, on the same rows."""

    rows: int
    tokens: int
    what: str
    """Which rows: validation rows, or the run's own answers where it has none."""
    perplexity: float
    """Of the run itself."""
    bases: Mapping[str, Divergence]

    @property
    def closest(self) -> str:
        """The base with the smallest divergence."""
        return min(self.bases, key=lambda name: self.bases[name].kl)


class Swapped:
    """A live model whose linear layers compute with a merge's weights while one is set."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._merge: Merge | None = None

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Shadow the layers' forward on the instances; they are as before afterwards."""
        layers = list(_linears(self._model))
        try:
            for name, layer in layers:
                layer.forward = functools.partial(self._forward, f"{name}.weight", layer.forward)
            yield
        finally:
            for _, layer in layers:
                vars(layer).pop("forward", None)

    @contextlib.contextmanager
    def using(self, merge: Merge) -> Iterator[None]:
        """The merged model's answers."""
        self._merge = merge
        try:
            yield
        finally:
            self._merge = None

    def _forward(self, name: str, original: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any) -> torch.Tensor:
        if self._merge is None:
            return original(x, *args)
        layer = self._model.get_submodule(name.removesuffix(".weight"))
        parts = [torch.nn.functional.linear(x, rows.to(x.dtype)) for rows in self._merge.stored(name, x.device)]
        product = torch.cat(parts, dim=-1)
        return product if layer.bias is None else product + cast(torch.Tensor, layer.bias).to(x.dtype)


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Layers whose weight a merge replaces: adapted ones, and quantised ones."""
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(adapted) and adapted:
            continue
        if isinstance(module, BaseTunerLayer):
            adapted = (*adapted, f"{name}.")
            yield name, module
        elif is_quantised(module):
            yield name, module


def compare(
    answerer: Answerer,
    merges: Mapping[str, Merge],
    samples: Sequence[Sample],
    what: str,
    done: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Measure each merge against the live model.

    Args:
        answerer: the run.
        merges: by the name of their base.
        samples: tokenised rows with what is trained in them.
        what: says which rows they are.
        done: called with the number of rows done.
    """
    model = bare(answerer.model)
    swapped = Swapped(model)
    measured: dict[str, list[torch.Tensor]] = {name: [] for name in ("run", *merges)}
    finished = 0
    with swapped.ready(), torch.inference_mode():
        for chosen in batches([len(sample["input_ids"]) for sample in samples], BATCH_TOKENS):
            batch = Collator(answerer.tokenizer.pad_token_id)([samples[n] for n in chosen])
            for name, rows in _measure(model, swapped, merges, batch).items():
                measured[name].append(rows)
            finished += len(chosen)
            done(finished)
    columns = {name: torch.cat(parts).double() for name, parts in measured.items()}
    run = columns.pop("run")
    bases = {
        name: Divergence(
            kl=float(kl.mean()),
            error=float(kl.std() / len(kl) ** 0.5),
            perplexity=float(loss.mean().exp()),
            agreement=float(same.mean()),
        )
        for name, (kl, loss, same) in ((name, rows.unbind(1)) for name, rows in columns.items())
    }
    return Comparison(len(samples), len(run), what, float(run[:, 1].mean().exp()), bases)


def _measure(
    model: PreTrainedModel, swapped: Swapped, merges: Mapping[str, Merge], batch: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """For the run and each merge (positions, 3): divergence from the run, cross-entropy, whether the likeliest token is equal."""
    device = next(model.parameters()).device
    inputs = {
        key: value.to(device) for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")
    }
    positions, targets = batch["predicting"].to(device), next_labels(batch["labels"]).flatten().to(device)
    backbone, head = model.get_decoder(), model.get_output_embeddings()
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "run": contextlib.nullcontext,
        **{name: functools.partial(swapped.using, m) for name, m in merges.items()},
    }
    hidden = {}
    for name, context in contexts.items():
        with context():
            hidden[name] = last_hidden(model, backbone, inputs).flatten(0, 1)[positions]
    measured: dict[str, list[torch.Tensor]] = {name: [] for name in contexts}
    for first in range(0, len(positions), POSITIONS_AT_ONCE):
        chunk, reference = slice(first, first + POSITIONS_AT_ONCE), torch.empty(0)
        for name, context in contexts.items():
            with context():
                scores = head(hidden[name][chunk]).float().log_softmax(-1)
            reference = scores if name == "run" else reference
            measured[name].append(divergences(reference, scores, targets[positions[chunk]]).cpu())
    return {name: torch.cat(rows) for name, rows in measured.items()}


def divergences(run: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Position by position (n, 3): KL(run || other) in nats, the other's cross-entropy of the targets, equal likeliest tokens.

    Args:
        run: (n, vocabulary) log-probabilities.
        other: the same of the other model.
        targets: (n,) token ids.
    """
    kl = (run.exp() * (run - other)).sum(-1)
    loss = -other.gather(1, targets[:, None])[:, 0]
    return torch.stack([kl, loss, (run.argmax(-1) == other.argmax(-1)).float()], dim=1)
