"""Merging an adapter into a base, one slice of rows at a time.

QLoRA trains an adapter on the 4-bit base, so there are two bases to merge into: the original 16-bit weights, or the values that
the 4-bit weights represent. `nybble.export.parity.compare` measures which is closer to the model that was trained.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.errors import ModelError
from nybble.export.merge.shards import Spec, Tensors, slices_of
from nybble.export.merge.updates import Update
from nybble.model.base.files import weight_files
from nybble.model.base.soundness import BUFFER, EMBEDDING, HEAD
from nybble.weights.stored import BESIDE, dequantise_int8_rows, dequantise_rows, int8_scales_name, read_state

CPU = torch.device("cpu")


class Weights(Protocol):
    """A base's weights by name."""

    def names(self) -> list[str]:
        """Its tensors, in the order of its files."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def slices(self, name: str, device: torch.device = CPU) -> Iterator[torch.Tensor]:
        """A tensor's rows on a device, in consecutive slices."""


class Original:
    """The weights as they are in the checkpoint's files."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._tensors = Tensors(weight_files(folder))

    def names(self) -> list[str]:
        """Its tensors, without the buffers of old checkpoints."""
        return [name for name in self._tensors if not name.endswith(BUFFER)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def slices(self, name: str, device: torch.device = CPU) -> Iterator[torch.Tensor]:
        """A tensor's rows, unchanged."""
        tensor = self._tensors[name]
        rows, columns = tensor.shape if tensor.dim() == 2 else (len(tensor), 1)
        return (tensor[part].to(device) for part in slices_of(rows, columns))


class Dequantised:
    """The values that a checkpoint in bitsandbytes' format represents, computed as in training."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._tensors = Tensors(weight_files(folder))
        self._plain = Original(folder)

    def names(self) -> list[str]:
        """Its tensors, without what describes their quantisation."""
        return [name for name in self._plain.names() if not name.endswith(BESIDE)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor after dequantisation."""
        state = read_state(name, self._tensors)
        return tuple(self._tensors[name].shape) if state is None else tuple(state.shape)

    def slices(self, name: str, device: torch.device = CPU) -> Iterator[torch.Tensor]:
        """A tensor's rows, dequantised to the type in which the run computed."""
        state = read_state(name, self._tensors)
        if state is not None:
            rows, columns = state.shape
            parts = slices_of(rows, columns, state.blocksize)
            yield from dequantise_rows(self._tensors[name], state, parts, device)
        elif (scales := int8_scales_name(name)) in self._tensors:
            yield from dequantise_int8_rows(self._plain.slices(name, device), self._tensors[scales].to(device))
        else:
            yield from self._plain.slices(name, device)


@dataclass(frozen=True)
class Merge:
    """A base with the updates of an adapter.

    Attributes:
        base: the weights that the updates are added to.
        updates: the update of each tensor, by name.
        tied: whether the model's head is its embedding.
        dtype: the type in which the result is stored.
    """

    base: Weights
    updates: Mapping[str, Update]
    tied: bool
    dtype: torch.dtype

    @property
    def unties(self) -> bool:
        """Whether head and embedding must be untied, because the adapter changes only the head."""
        return self.tied and HEAD in self.updates

    def specs(self) -> list[Spec]:
        """Every tensor of the merged model.

        Raises:
            ModelError: the adapter updates a weight that the base does not have, or that has another shape.
        """
        names = [name for name in self.base.names() if name != HEAD or not self.tied]
        specs = [Spec(name, self.base.shape(name), self.dtype) for name in names]
        if self.unties:
            specs.append(Spec(HEAD, self.base.shape(EMBEDDING), self.dtype))
        shapes = {spec.name: spec.shape for spec in specs}
        for name, update in self.updates.items():
            if shapes.get(name) != (len(update.b), update.a.shape[1]):
                what = f"of shape {shapes[name]}" if name in shapes else "missing"
                raise ModelError(
                    f"the adapter does not fit this base: it updates {name} as ({len(update.b)}, {update.a.shape[1]}), "
                    f"which is {what} there",
                    fix="--base PATH, with the base that the adapter was trained on",
                )
        return specs

    def slices(self, name: str, device: torch.device = CPU) -> Iterator[torch.Tensor]:
        """Rows of a merged tensor in float32, in consecutive slices, merged on a device."""
        update, first = self.updates.get(name), 0
        source = EMBEDDING if name == HEAD and self.tied else name
        for rows in self.base.slices(source, device):
            part = slice(first, first + len(rows))
            yield rows.float() if update is None else update.onto(rows, part)
            first += len(rows)

    def stored(self, name: str, device: torch.device = CPU) -> Iterator[torch.Tensor]:
        """The same in the storage type.

        Raises:
            ModelError: the type cannot represent a number.
        """
        for rows in self.slices(name, device):
            narrow = rows.to(self.dtype)
            if not narrow.isfinite().all():
                raise ModelError(
                    f"{name} contains a number that is not finite in {str(self.dtype).removeprefix('torch.')}",
                    fix="--dtype bfloat16" if rows.isfinite().all() else "copy the base again: its weights are damaged",
                )
            yield narrow


@dataclass(frozen=True)
class MergedModel:
    """A merged model with everything that a single file needs.

    Attributes:
        name: the run's name.
        merge: the weights.
        config: the configuration, with the run's RoPE scaling.
        tokenizer: the run's tokenizer.
        template: the run's chat template, Jinja.
        end_id: the token that ends an answer.
        base: the base's name.
        licence: the base's licence, by the Hub's short name.
        licence_link: a link to its text.
    """

    name: str
    merge: Merge
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    template: str
    end_id: int
    base: str
    licence: str | None
    licence_link: str | None
