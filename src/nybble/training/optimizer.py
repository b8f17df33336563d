"""The optimiser of a run; 8-bit AdamW over all adapters as a few tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from transformers.trainer_pt_utils import get_parameter_names

LARGEST = 2**25
"""Numbers of a flat tensor, 128 MB: gathering their gradients takes as much again until their own are freed. As one tensor the
160 M of rank 64 on a 7B took 640 MB, which a fragmented allocator had to ask the device for."""
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of every AdamW here
UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Parameters that Trainer gives no weight decay, by name. Checkpoints hold one group with and one without, even where the
second is empty."""


def make_optimizer(
    model: torch.nn.Module, name: str, dtype: torch.dtype, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over everything that is trained.

    Args:
        model: with its parameters on the device that trains them.
        name: `train.optimizer`: adamw, adamw_8bit, paged_adamw_8bit; auto is the last on CUDA and adamw elsewhere.
        dtype: of the run's computation.
        learning_rate: at the peak; a scheduler moves it.
        weight_decay: of every step, relative to the learning rate.
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
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], UNDECAYED))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]
    # In float16 a fused one leaves out the step of an overflow by itself, and Accelerate moves the rate on.
    fused = True if dtype != torch.float16 else None
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=fused)


def flat_gradients(optimizer: Any) -> list[torch.nn.Parameter] | None:
    """The few tensors that hold all parameters and gradients; None where the optimiser has none, or a gradient is missing.

    Args:
        optimizer: perhaps wrapped by Accelerate.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.gather() if isinstance(inner, FlatAdamW8bit) and not inner.missing() else None


class FlatAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """bitsandbytes' AdamW with 8-bit state (Dettmers et al. 2022), in a launch for LARGEST numbers instead of one a tensor.

    A LoRA on all linear layers of a 7B is 448 tensors. Their launches keep an H200's host busy for 30 ms a step while the
    device waits; the update itself takes 3 (docs/benchmarks.md). The parameters become views of a few tensors, and so do
    their gradients when they are gathered, at the latest in each step. The state's blocks of 256 numbers do not begin anew
    at each parameter.

    Args:
        parameters: all of one device and type; they stay the same objects, their data moves.
        settings: bitsandbytes' own.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], **settings: Any) -> None:
        self.parts = list(parameters)
        kinds = {(part.dtype, part.device) for part in self.parts}
        assert len(kinds) == 1, f"parameters of one type and device, not {kinds}"
        self.shares = _shares(self.parts)
        super().__init__([_flat(share) for share in self.shares], **settings)

    @property
    def flat_parameters(self) -> list[torch.nn.Parameter]:
        """The flat parameters, one a share."""
        found: list[torch.nn.Parameter] = self.param_groups[0]["params"]
        return found

    def missing(self) -> int:
        """How many parameters have no gradient."""
        return sum(part.grad is None for part in self.parts)

    @torch.no_grad()
    def gather(self) -> list[torch.nn.Parameter]:
        """The flat parameters, their gradients those of all: what is done to them is done to each part's."""
        for flat, share in zip(self.flat_parameters, self.shares, strict=True):
            first = share[0].grad
            if flat.grad is None or first is None or first._base is not flat.grad:  # a step may have been skipped
                assert not self.missing(), f"{self.missing()} parameters have no gradient"
                _gather(flat, share)  # the share's own are freed before the next takes memory
        return self.flat_parameters

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters."""
        for flat, share in zip(self.flat_parameters, self.shares, strict=True):
            offsets = itertools.accumulate((part.numel() for part in share), initial=0)
            assert all(
                part.data_ptr() == flat.data_ptr() + offset * flat.element_size()
                for part, offset in zip(share, offsets, strict=False)
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

    def _update(self) -> None:
        """bitsandbytes' loop, which waits for the device after each tensor, without the waiting: only paged states need it."""
        for group_index, group in enumerate(self.param_groups):
            for index, flat in enumerate(group["params"]):
                self.update_step(group, flat, group_index, index)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.grad = None


def _shares(parts: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Neighbours, as many as make LARGEST numbers; what is larger stays whole."""
    shares: list[list[torch.nn.Parameter]] = []
    taken = 0
    for part in parts:
        if not shares or taken + part.numel() > LARGEST:
            shares.append([])
            taken = 0
        shares[-1].append(part)
        taken += part.numel()
    return shares


def _flat(share: Sequence[torch.nn.Parameter]) -> torch.nn.Parameter:
    """One tensor of all data, which the parameters become views of."""
    flat = torch.cat([part.detach().flatten() for part in share])
    for part, own in zip(share, flat.split([part.numel() for part in share]), strict=True):
        part.data = own.view_as(part)
    return torch.nn.Parameter(flat)


def _gather(flat: torch.nn.Parameter, share: Sequence[torch.nn.Parameter]) -> None:
    """One tensor of all gradients, which the parameters' become views of."""
    flat.grad = None  # of a step that was skipped: its memory first
    flat.grad = torch.cat([part.grad.flatten() for part in share])  # type: ignore[union-attr]
    for part, own in zip(share, flat.grad.split([part.numel() for part in share]), strict=True):
        part.grad = own.view_as(part)
