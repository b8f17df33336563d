"""A model between host and device: some modules stay where they are while the others move."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def stay(module: torch.nn.Module) -> None:
    """Leave a module's parameters where they are when a model that it belongs to moves."""
    module._apply = types.MethodType(_unmoved, module)  # type: ignore[method-assign]


def stays(module: torch.nn.Module) -> bool:
    """Whether a module stays where it is."""
    return "_apply" in module.__dict__


def stop_staying(module: torch.nn.Module) -> None:
    """End `stay`."""
    del module._apply


def move_all_but(model: torch.nn.Module, modules: Iterable[torch.nn.Module], device: torch.device) -> None:
    """Move a model to a device, except for some of its modules.

    Args:
        model: the model; what Accelerate knows of its place is brought up to date.
        modules: without children; they stay where they are.
        device: where the others go.
    """
    with _staying(modules):
        model.to(device)
    for module in model.modules():
        if "hf_device_map" in module.__dict__:  # Accelerate refuses to train a quantised model of another device
            module.hf_device_map = {"": device}  # type: ignore[assignment]


@contextlib.contextmanager
def _staying(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    held = [module for module in modules if not stays(module)]
    for module in held:
        stay(module)
    try:
        yield
    finally:
        for module in held:
            stop_staying(module)


def _unmoved(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    return self
