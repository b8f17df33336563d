"""What an adapter adds to each weight, read from PEFT's files; adapters that cannot be merged this way are refused."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from nybble.errors import ModelError
from nybble.model.adapter.config import (
    CONFIG,
    MERGEABLE,
    read_adapter_config,
    read_content,
    refuse_altered,
    refuse_other_kinds,
    set_options,
    unknown_options,
)
from nybble.model.adapter.patterns import check_patterns
from nybble.model.adapter.tensors import read_tensors

BY_PEFT = "merge it with PEFT's own merge_and_unload on the 16-bit base"
PREFIX = "base_model.model."  # what PEFT puts before a module's name


@dataclass(frozen=True)
class Update:
    """The update of one weight W (out, in): W + scaling B A, and with DoRA each row scaled to a learnt length.

    Attributes:
        a: (r, in) float32.
        b: (out, r) float32.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023).
        magnitude: (out,) float32, the rows' lengths (DoRA, Liu et al. 2024, equation 5); None without DoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def onto(self, weight: torch.Tensor, part: slice) -> torch.Tensor:
        """The merged rows (rows, in), float32, of the base's rows `part`, on their device."""
        a, b = self.a.to(weight.device), self.b[part].to(weight.device)
        merged = torch.addmm(weight.float(), b, a, alpha=self.scaling)
        if self.magnitude is not None:
            merged *= (self.magnitude[part].to(weight.device) / merged.norm(dim=1))[:, None]
        return merged


def read_updates(folder: pathlib.Path) -> dict[str, Update]:
    """The update of each weight, by the name of its tensor in the base.

    Raises:
        ModelError: there is no adapter, it is damaged, of another kind, or its base was altered.
    """
    content, file_name = read_content(folder), str(folder / CONFIG)
    refuse_other_kinds(content, file_name, f"only LoRA can be merged here: {BY_PEFT}")
    refuse_altered(content, file_name)
    if unknown := [*set_options(content, MERGEABLE), *unknown_options(content)]:
        raise ModelError(
            f"the adapter sets {', '.join(unknown)}, which cannot be merged here", where=file_name, fix=BY_PEFT
        )
    config = read_adapter_config(folder)
    file, tensors = read_tensors(folder)
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    # PEFT also saves a copy of a head that has an adapter.
    names = [name for name in tensors if not name.endswith(".base_layer.weight")]
    odd = [name for name in names if not name.startswith(PREFIX) or not name.endswith(ends)]
    if odd:
        raise ModelError(
            f"the adapter contains {odd[0]}, which is not part of LoRA on a linear layer", where=str(file), fix=BY_PEFT
        )
    modules = list(dict.fromkeys(name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in names))
    check_patterns(config, modules, str(folder))
    updates = {f"{module}.weight": _update(tensors, config, module, file) for module in modules}
    if not any(update.scaling and update.a.any() and update.b.any() for update in updates.values()):
        raise ModelError("every B A of the adapter is zero, or its alpha is: it has learnt nothing", where=str(folder))
    return updates


def _update(tensors: Mapping[str, torch.Tensor], config: LoraConfig, module: str, file: pathlib.Path) -> Update:
    names = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ModelError(
            f"the adapter has only one half of {module}: there is no {missing[0]}",
            where=str(file),
            fix="copy it again",
        )
    a, b = (tensors[name].float() for name in names)
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    rank = math.sqrt(len(a)) if config.use_rslora else len(a)
    magnitude = f"{PREFIX}{module}.lora_magnitude_vector"
    return Update(a, b, alpha / rank, tensors[magnitude].float() if magnitude in tensors else None)
