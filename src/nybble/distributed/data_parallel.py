"""What torch's DistributedDataParallel is told about a model of which only adapters are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def leave_frozen_out(model: torch.nn.Module) -> None:
    """Let DDP see only what is trained now, before it wraps the model.

    Every process has read the same frozen weights. DDP would send them all from the first process to the others when it starts,
    and the buffers before every forward, and would refuse those that are on the host.
    """
    leave_out(model, [parameter for parameter in model.parameters() if not parameter.requires_grad])


def leave_out(model: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let DDP leave these parameters and all buffers alone, before it wraps the model; what is left out is never averaged."""
    ignored = set(map(id, parameters))
    names = [name for name, parameter in model.named_parameters() if id(parameter) in ignored]
    buffers = [name for name, _ in model.named_buffers()]
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*names, *buffers])
