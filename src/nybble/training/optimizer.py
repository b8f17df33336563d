"""The optimiser of a run; 8-bit AdamW with all adapters in a few flat tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from transformers.trainer_pt_utils import get_parameter_names

MAX_NUMBERS = 2**25
"""The largest flat tensor, 128 MB: gathering its gradients takes the same memory again until the originals are freed. As one
tensor, the 160 M numbers of rank 64 on a 7B took 640 MB, which a fragmented allocator had to request from the device."""
BETAS, EPSILON = (0.9, 0.999), 1e-8  # for every AdamW
MOMENTS = {"state1", "state2"}  # bitsandbytes' names
WITHOUT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of parameters without weight decay in Trainer. Checkpoints have one group with and one without, even if the second is
empty."""


def make_optimizer(
    model: torch.nn.Module, name: str, dtype: torch.dtype, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over everything that is trained.

    Args:
        model: the model, with its parameters on the device that trains them.
        name: `train.optimizer`: adamw, adamw_8bit, paged_adamw_8bit; auto is the last on CUDA and adamw elsewhere.
        dtype: the run's compute type.
        learning_rate: the peak; a scheduler changes it.
        weight_decay: the decay per step, relative to the learning rate.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "auto":
        name = "paged_adamw_8bit" if trained[0].device.type == "cuda" else "adamw"
    if name != "adamw":
        return FlatAdamW8bit(
            trained,
            lr=learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=weight_decay,
            is_paged=name.startswith("paged"),
        )
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], WITHOUT_DECAY))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]
    # In float16 a fused AdamW skips the step of an overflow itself, and Accelerate still advances the learning rate.
    fused = True if dtype != torch.float16 else None
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=fused)


def flat_gradients(optimizer: Any) -> list[torch.nn.Parameter] | None:
    """The flat tensors of all parameters and gradients; None if the optimiser has none, or a gradient is missing.

    Args:
        optimizer: the optimiser, possibly wrapped by Accelerate.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.gather() if isinstance(inner, FlatAdamW8bit) and not inner.missing() else None


class FlatAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """bitsandbytes' AdamW with 8-bit state (Dettmers et al. 2022), with one launch per MAX_NUMBERS numbers, not per tensor.

    A LoRA on all linear layers of a 7B has 448 tensors. Their launches keep an H200's host busy for 30 ms per step while the
    device waits; the update itself takes 3 (docs/benchmarks.md). The parameters become views of a few flat tensors, and so do
    their gradients when they are gathered, which each step does at the latest. The state's blocks of 256 numbers do not start
    anew at each parameter.

    Args:
        parameters: all on one device and of one type; they stay the same objects, but their data moves.
        settings: bitsandbytes' own arguments.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], **settings: Any) -> None:
        self.parts = list(parameters)
        kinds = {(part.dtype, part.device) for part in self.parts}
        assert len(kinds) == 1, f"parameters of one type and device, not {kinds}"
        self.buckets = _buckets(self.parts)
        super().__init__([_flat(bucket) for bucket in self.buckets], **settings)

    @property
    def flat_parameters(self) -> list[torch.nn.Parameter]:
        """The flat parameters, one per bucket."""
        parameters: list[torch.nn.Parameter] = self.param_groups[0]["params"]
        return parameters

    def missing(self) -> int:
        """How many parameters have no gradient."""
        return sum(part.grad is None for part in self.parts)

    @torch.no_grad()
    def gather(self) -> list[torch.nn.Parameter]:
        """The flat parameters, with all gradients in theirs: a change to them changes the gradient of each parameter."""
        for flat, bucket in zip(self.flat_parameters, self.buckets, strict=True):
            first = bucket[0].grad
            if flat.grad is None or first is None or first._base is not flat.grad:  # a step may have been skipped
                assert not self.missing(), f"{self.missing()} parameters have no gradient"
                _gather(flat, bucket)  # the originals of a bucket are freed before the next is allocated
        return self.flat_parameters

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters."""
        for flat, bucket in zip(self.flat_parameters, self.buckets, strict=True):
            offsets = itertools.accumulate((part.numel() for part in bucket), initial=0)
            assert all(
                part.data_ptr() == flat.data_ptr() + offset * flat.element_size()
                for part, offset in zip(bucket, offsets, strict=False)
            ), "a parameter's data was replaced"
        self.gather()
        result = None
        if self.initialized and not self.is_paged and closure is None:
            self._update()
        else:
            result = super().step(closure)
        for flat in self.flat_parameters:
            flat.grad = None
        return result

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a saved state into buffers such as a new optimiser has.

        A tensor that was paged still says so when it is loaded, but is a plain one. bitsandbytes 0.50 would ask CUDA to move it
        at the next step, and end the process without an exception ("invalid argument").
        """
        super().load_state_dict(state_dict, move_to_device)
        for flat in self.flat_parameters:
            state = self.state.get(flat, {})
            for name in MOMENTS & state.keys():
                loaded, state[name] = state[name], self.get_state_buffer(flat, dtype=state[name].dtype)
                state[name].copy_(loaded)

    def _update(self) -> None:
        """bitsandbytes' loop without its wait for the device after each tensor, which only paged states need."""
        for group_index, group in enumerate(self.param_groups):
            for index, flat in enumerate(group["params"]):
                self.update_step(group, flat, group_index, index)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.grad = None


def _buckets(parts: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Consecutive parameters, up to MAX_NUMBERS numbers in each bucket; a larger parameter has its own."""
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    for part in parts:
        if not buckets or size + part.numel() > MAX_NUMBERS:
            buckets.append([])
            size = 0
        buckets[-1].append(part)
        size += part.numel()
    return buckets


def _flat(bucket: Sequence[torch.nn.Parameter]) -> torch.nn.Parameter:
    """One tensor with the data of all parameters, which become views of it."""
    flat = torch.cat([part.detach().flatten() for part in bucket])
    for part, own in zip(bucket, flat.split([part.numel() for part in bucket]), strict=True):
        part.data = own.view_as(part)
    return torch.nn.Parameter(flat)


def _gather(flat: torch.nn.Parameter, bucket: Sequence[torch.nn.Parameter]) -> None:
    """One tensor with all gradients, which become views of it."""
    flat.grad = None  # free the gradients of a skipped step first
    flat.grad = torch.cat([part.grad.flatten() for part in bucket])  # type: ignore[union-attr]
    for part, own in zip(bucket, flat.grad.split([part.numel() for part in bucket]), strict=True):
        part.grad = own.view_as(part)
