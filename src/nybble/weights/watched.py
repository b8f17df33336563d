"""The facts that a description of live modules is based on: it is made again when one of them changed, and only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

CAPTURING = "transformers.utils.output_capturing"
"""Module of hooks that stay in every attention layer once hidden states were requested. They do nothing unless attentions are
requested, and `batch_layout.py` keeps such a batch from the fused layers."""


class Ineligible(Exception):  # noqa: N818 - a reason, not an error: the layer keeps its original forward
    """Why a layer cannot be fused, in the words of the run's report."""


class Watched:
    """Reads modules and records each fact that it read.

    Everything is looked up in the modules' own dictionaries and compared by identity, 40 ns per fact: nn.Module's
    attributes and isinstance take ten times that, and a model of 32 layers has 11,000 facts per batch. Parameters are read
    past their classes: bitsandbytes' class handles every access in a Python function, 2 us, and the 448 of such a model took
    0.9 of the 1.5 ms for which the device waits before each batch.
    """

    def __init__(self) -> None:
        self._items: list[tuple[Mapping[str, Any], str, Any]] = []
        self._lists: list[tuple[Sequence[Any], tuple[Any, ...]]] = []
        self._empty: list[Mapping[Any, Any]] = []
        self._trained: list[tuple[torch.nn.Parameter, bool]] = []
        self._addresses: list[tuple[torch.nn.Parameter, int]] = []

    def item(self, owner: Mapping[str, Any], key: str) -> Any:
        """The value of a key in a dictionary, or None."""
        value = owner.get(key)
        self._items.append((owner, key, value))
        return value

    def attribute(self, module: Any, name: str) -> Any:
        """An attribute of the object itself, not of its class."""
        return self.item(module.__dict__, name)

    def module(self, parent: Any, name: str) -> Any:
        """A module's child."""
        return self.item(parent._modules, name)

    def parameter(self, module: Any, name: str) -> Any:
        """A module's own parameter."""
        return self.item(module._parameters, name)

    def sequence(self, sequence: Sequence[Any]) -> tuple[Any, ...]:
        """A list that may change in place."""
        items = tuple(sequence)
        self._lists.append((sequence, items))
        return items

    def is_trained(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter requires a gradient."""
        is_trained = parameter.requires_grad
        self._trained.append((parameter, is_trained))
        return is_trained

    def address(self, parameter: torch.nn.Parameter) -> int:
        """The address of the parameter's data; it changes when PEFT merges, or the model moves to another device."""
        address = parameter.data_ptr()
        self._addresses.append((parameter, address))
        return address

    def is_hooked(self, module: Any) -> bool:
        """Whether the module has hooks, which are called when it runs."""
        attributes = module.__dict__
        hooks = [
            attributes[name]
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ]
        if not any(hooks):
            self._empty += hooks
            return False
        self._lists += [(hook, tuple(hook)) for hook in hooks]
        return any(getattr(each, "__module__", None) != CAPTURING for hook in hooks for each in hook.values())

    def is_unchanged(self) -> bool:
        """Whether every recorded fact still holds."""
        for owner, key, value in self._items:
            if owner.get(key) is not value:
                return False
        if any(self._empty):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            for parameter, is_trained in self._trained:
                if parameter.requires_grad is not is_trained:
                    return False
        for sequence, items in self._lists:
            if tuple(sequence) != items:
                return False
        return self.are_weights_in_place()

    def are_weights_in_place(self) -> bool:
        """Whether the data of every parameter whose address was read is still there."""
        with torch._C.DisableTorchFunctionSubclass():
            return all(parameter.data_ptr() == address for parameter, address in self._addresses)


def check_unhooked(watched: Watched, name: str, module: Any) -> None:
    """Refuse hooks of a module inside a fused layer: it is not called, so neither are they.

    Raises:
        Ineligible: it has hooks.
    """
    if watched.is_hooked(module):
        raise Ineligible(f"{name} has other hooks")


def only_requires_gradients(module: torch.nn.Module) -> bool:
    """Whether its only hooks are those of Transformers' gradient checkpointing, which change no number."""
    hooks = module._forward_hooks.values()
    before = module._forward_pre_hooks
    return not before and all(getattr(hook, "__name__", "") == "make_inputs_require_grads" for hook in hooks)
