"""A model whose train() and zero_grad() do not visit every module at every step."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@contextlib.contextmanager
def without_module_walks(model: torch.nn.Module) -> Iterator[None]:
    """Replace train() and zero_grad(), which Trainer calls at every step, by versions that do not visit every module.

    A 7B with LoRA has 2,665 modules. Visiting them takes 18 ms, in which the device is idle: a tenth of the time of a step of
    1 x 2,048 tokens on an H200.
    """
    model.train()  # once for all modules: those of from_pretrained are in evaluation mode, a new PeftModel is not
    model.nybble_modules = _Modules(  # type: ignore[assignment]
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        [module for name, module in model.named_modules() if name.count(".") <= len(["base_model", "model", "layers", "0"])],
    )  # fmt: skip
    model.train = types.MethodType(_train, model)  # type: ignore[method-assign]
    model.zero_grad = types.MethodType(_zero_grad, model)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train, model.zero_grad, model.nybble_modules


@dataclass
class _Modules:
    """The parameters and modules that the replacements visit."""

    trained: list[torch.nn.Parameter]
    upper: list[torch.nn.Module]
    """Modules down to the decoder layers: a change of mode starts at one of them."""


def _train(self: Any, mode: bool = True) -> Any:
    if any(module.training is not mode for module in self.nybble_modules.upper):
        type(self).train(self, mode)
    return self


def _zero_grad(self: Any, set_to_none: bool = True) -> None:
    for parameter in self.nybble_modules.trained:
        parameter.grad = None
