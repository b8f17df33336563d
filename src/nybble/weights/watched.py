"""What a description of live modules rests on, so that it is made anew when something of it changed, and only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

CAPTURING = "transformers.utils.output_capturing"
"""Whose hooks stay in every attention once hidden states were asked for, and do nothing unless attentions are: `batch_layout.py`
keeps such a batch from the fused layers."""


class Ineligible(Exception):  # noqa: N818 - a reason, not an error: the layer keeps its original forward
    """Why a layer cannot be fused, as the run's report says it."""


class Watched:
    """Reads modules and remembers each fact that it read.

    Everything is looked up in the modules' own dictionaries and compared by identity, 40 ns a fact: nn.Module's
    attributes and isinstance take ten times that, and a model of 32 layers has 11,000 facts a batch. What is asked of
    parameters is asked past their classes: bitsandbytes' sees every access through a Python function, 2 us, and the 448
    of such a model took 0.9 of the 1.5 ms in which the device waits before each batch.
    """

    def __init__(self) -> None:
        self._items: list[tuple[Mapping[str, Any], str, Any]] = []
        self._lists: list[tuple[Sequence[Any], tuple[Any, ...]]] = []
        self._empty: list[Mapping[Any, Any]] = []
        self._trained: list[tuple[torch.nn.Parameter, bool]] = []
        self._addresses: list[tuple[torch.nn.Parameter, int]] = []

    def item(self, owner: Mapping[str, Any], key: str) -> Any:
        """What a dictionary holds, or None."""
        value = owner.get(key)
        self._items.append((owner, key, value))
        return value

    def attribute(self, module: Any, name: str) -> Any:
        """What an object itself, not its class, holds under a name."""
        return self.item(module.__dict__, name)

    def module(self, parent: Any, name: str) -> Any:
        """A module's child."""
        return self.item(parent._modules, name)

    def parameter(self, module: Any, name: str) -> Any:
        """A module's own parameter."""
        return self.item(module._parameters, name)

    def sequence(self, sequence: Sequence[Any]) -> tuple[Any, ...]:
        """A list that may change in place."""
        found = tuple(sequence)
        self._lists.append((sequence, found))
        return found

    def is_trained(self, parameter: torch.nn.Parameter) -> bool:
        """Whether it wants a gradient."""
        found = parameter.requires_grad
        self._trained.append((parameter, found))
        return found

    def address(self, parameter: torch.nn.Parameter) -> int:
        """Where its data is in memory; it moves when PEFT merges, or the model to another device."""
        found = parameter.data_ptr()
        self._addresses.append((parameter, found))
        return found

    def is_hooked(self, module: Any) -> bool:
        """Whether somebody wants to be called when the module runs."""
        own = module.__dict__
        hooks = [
            own[name] for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ]
        if not any(hooks):
            self._empty += hooks
            return False
        self._lists += [(hook, tuple(hook)) for hook in hooks]
        return any(getattr(each, "__module__", None) != CAPTURING for hook in hooks for each in hook.values())

    def is_unchanged(self) -> bool:
        """Whether everything read is still so."""
        for owner, key, value in self._items:
            if owner.get(key) is not value:
                return False
        if any(self._empty):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            for parameter, found in self._trained:
                if parameter.requires_grad is not found:
                    return False
        for sequence, items in self._lists:
            if tuple(sequence) != items:
                return False
        return self.are_weights_in_place()

    def are_weights_in_place(self) -> bool:
        """Whether the data of the parameters whose address was asked for has not moved."""
        with torch._C.DisableTorchFunctionSubclass():
            return all(parameter.data_ptr() == found for parameter, found in self._addresses)


def check_unhooked(watched: Watched, name: str, module: Any) -> None:
    """A module inside a fused layer is not called, so nobody may wait for that.

    Raises:
        Ineligible: somebody does.
    """
    if watched.is_hooked(module):
        raise Ineligible(f"{name} has other hooks")
