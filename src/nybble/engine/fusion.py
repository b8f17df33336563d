"""The state of a fused model: the requested policy, what its layers share, and how the last batch was computed."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from nybble.engine.attention.choice import AttentionChoice
from nybble.engine.compute import Fp8
from nybble.engine.layer import FusedLayer, Shared
from nybble.engine.layer_forward import has_fused_forward
from nybble.engine.memory import Budget
from nybble.engine.reader import LayerReader
from nybble.plan.policies import LADDER
from nybble.weights.watched import Ineligible

Policy = Literal["auto", "keep-all", "drop-mlp", "drop-qkv", "layer-input", "host"]
log = logging.getLogger("nybble")


@dataclass(frozen=True)
class BatchReport:
    """How the layers of a model computed one batch."""

    fused: int = 0
    refusals: Sequence[str] = ()
    """The reason for each layer that fell back to its original forward."""
    policies: Sequence[str] = ()
    """What each fused layer saved for backward."""
    attention: str = ""
    cached_layers: int = 0
    """How many layers' weights stayed dequantised."""


def streams_weights(model: torch.nn.Module) -> bool:
    """Whether a model's weights are on the host or spread over ranks, so that only the fused engine can compute its layers."""
    return any(found.shared.streamed is not None for found in _fusions(model))


@contextlib.contextmanager
def uneven_passes(model: torch.nn.Module) -> Iterator[None]:
    """Within this context, ranks may run different numbers of forward passes without gradients; all enter and leave it.

    With weights that are spread over ranks, every rank takes part in every pass of any of them: those that have nothing left to
    compute wait in here at the end, and help.
    """
    with contextlib.ExitStack() as stack:
        for found in _fusions(model):
            if found.shared.streamed is not None:
                stack.enter_context(found.shared.streamed.uneven_passes())
        yield


def _fusions(model: torch.nn.Module) -> Iterator[Fusion]:
    for module in model.modules():
        if isinstance(module, LlamaModel) and "nybble_fusion" in module.__dict__:
            yield module.nybble_fusion


@dataclass
class Fusion:
    """A model's engine: the requested policy, what all layers share, and how the last batch was computed."""

    policy: Policy
    readers: dict[LlamaDecoderLayer, LayerReader]
    budget: Budget
    shared: Shared
    fp8: Fp8 | None = None
    """What is computed in fp8 in training; None for nothing."""
    fp8_missing: str = ""
    """Why nothing is, where it was to be if possible."""
    last: BatchReport = field(default_factory=BatchReport)
    """The last batch that was trained on; before the first of those, simply the last batch."""
    has_trained: bool = False
    choices: dict[torch.dtype, AttentionChoice] = field(default_factory=dict)
    """The attention backends of each compute type."""
    notices: list[str] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    taken_over: set[LlamaDecoderLayer] = field(default_factory=set)
    """Layers for which somebody else had switched gradient checkpointing on."""
    checkpointed: bool = False
    """Whether checkpointing was on for the whole backbone at the last batch."""

    @property
    def fused(self) -> int:
        """Layers that were fused in the last batch."""
        return self.last.fused

    @property
    def fallen_back(self) -> int:
        """Layers that were not fused in the last batch."""
        return len(self.last.refusals)

    @property
    def shares_prompts(self) -> bool:
        """Whether a packed row may hold several answers to one prompt (`nybble.engine.branches`): every layer is fused now."""
        return not self.read(list(self.readers))[1]

    def describe(self) -> str:
        """Layers, operations, attention, policies and refusals, one per line."""
        total = self.fused + self.fallen_back
        lines = [f"{self.fused} of {total} decoder layers fused; {self.shared.reason}"]
        if self.fp8 is not None:
            lines.append(f"trained in {self.fp8}, evaluated in 16 bits")
        if self.fp8_missing:
            lines.append(self.fp8_missing)
        if self.last.attention:
            lines.append(f"attention: {self.last.attention}")
        if self.last.policies:
            lines.append(f"kept for backward: {self.policy_counts()}")
        if self.last.cached_layers:
            lines.append(f"spare memory keeps the weights of {self.last.cached_layers} layers dequantised")
        if (streamed := self.shared.streamed) is not None:
            lines.append(
                f"the weights of {streamed.streamed_layers} layers are {streamed.copier.where}, copied when used"
            )
        return "\n".join([*lines, *(f"{n} not fused: {why}" for why, n in Counter(self.last.refusals).items())])

    def policy_counts(self) -> str:
        """The last batch's policies, counted."""
        counts = Counter(self.last.policies)
        return ", ".join(f"{counts[name]} x {name}" for name in LADDER if counts[name])

    def read(self, layers: Sequence[LlamaDecoderLayer]) -> tuple[dict[LlamaDecoderLayer, FusedLayer], list[str]]:
        """The layers as they are now, and why the others cannot be fused."""
        fused: dict[LlamaDecoderLayer, FusedLayer] = {}
        refusals: list[str] = []
        for layer in layers:
            try:
                fused[layer] = self._read(layer)
            except Ineligible as why:
                refusals.append(str(why))
        return fused, refusals

    def _read(self, layer: LlamaDecoderLayer) -> FusedLayer:
        reader = self.readers.get(layer)
        if reader is None or not has_fused_forward(layer):
            raise Ineligible("its forward was replaced after nybble.fuse; fuse again")
        return reader.read()

    def warn_once(self, notice: str) -> None:
        """Log a notice that was not logged before."""
        if notice not in self.notices:
            self.notices.append(notice)
            log.warning("nybble: %s", notice)

    def note_checkpointing(self, backbone: LlamaModel) -> None:
        """Record the gradient checkpointing that was switched on or off since the last batch."""
        is_on = bool(getattr(backbone, "gradient_checkpointing", False))
        if self.checkpointed and not is_on:
            self.taken_over.clear()
        self.checkpointed = is_on
        self.taken_over |= {layer for layer in self.readers if getattr(layer, "gradient_checkpointing", False)}
