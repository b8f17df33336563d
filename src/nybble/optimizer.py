"""8-bit AdamW over all adapters as one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit


class FlatAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """bitsandbytes' AdamW with 8-bit state (Dettmers et al. 2022), in one launch instead of one a tensor.

    A LoRA on all linear layers of a 7B is 448 tensors. Their launches keep an H200's host busy for 30 ms a step while the
    device waits; the update itself takes 3 (docs/benchmarks.md). The parameters become views of one tensor, and so do their
    gradients when they are gathered, at the latest in each step. The state's blocks of 256 numbers do not begin anew at
    each tensor.

    Args:
        parameters: all of one device and type; they keep their places, their data moves.
        settings: bitsandbytes' own.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], **settings: Any) -> None:
        self.parts = list(parameters)
        kinds = {(part.dtype, part.device) for part in self.parts}
        assert len(kinds) == 1, f"parameters of one type and device, not {kinds}"
        whole = torch.cat([part.detach().flatten() for part in self.parts])
        place = 0
        for part in self.parts:
            part.data = whole[place : place + part.numel()].view_as(part)
            place += part.numel()
        super().__init__([torch.nn.Parameter(whole)], **settings)

    def missing(self) -> int:
        """How many parameters have no gradient."""
        return sum(part.grad is None for part in self.parts)

    @torch.no_grad()
    def gather(self) -> torch.nn.Parameter:
        """The one parameter of all, its gradient that of all: what is done to it is done to each part's."""
        whole: torch.nn.Parameter = self.param_groups[0]["params"][0]
        first = self.parts[0].grad
        if whole.grad is None or first is None or first._base is not whole.grad:  # a step may have been skipped
            assert not self.missing(), f"{self.missing()} parameters have no gradient"
            whole.grad = torch.cat([part.grad.flatten() for part in self.parts])  # type: ignore[union-attr]
            for part, own in zip(self.parts, whole.grad.split([part.numel() for part in self.parts]), strict=True):
                part.grad = own.view_as(part)
        return whole

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters."""
        whole = self.param_groups[0]["params"][0]
        places = itertools.accumulate((part.numel() for part in self.parts), initial=0)
        assert all(
            part.data_ptr() == whole.data_ptr() + place * whole.element_size()
            for part, place in zip(self.parts, places, strict=False)
        ), "a parameter's data was replaced"
        self.gather()
        result = super().step(closure)
        whole.grad = None
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.grad = None
