"""What an adapter adds to each weight, read from PEFT's files; adapters that cannot be merged so are refused by name."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from nybble.errors import ModelError
from nybble.export.shards import Tensors
from nybble.run import read_object

BY_PEFT = "merge it with PEFT's own merge_and_unload on the 16-bit base"
PREFIX = "base_model.model."  # what PEFT puts before a module's name
UNDERSTOOD = frozenset(
    {
        *("peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version", "runtime_config"),
        *("base_model_name_or_path", "revision", "megatron_config", "megatron_core", "eva_config"),
        *(
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "rank_pattern",
            "alpha_pattern",
        ),
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
    }
)
"""Options under which an adapter is W + s B A (or DoRA's form of it); any other that is set is refused."""
UNALTERED = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to start A and B that leave the base's weights as they were."""


@dataclass(frozen=True)
class Update:
    """The update of one weight W (out, in): W + scaling B A, and with DoRA its rows scaled to lengths of their own.

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

    def is_finite(self) -> bool:
        """Whether every number of it is one."""
        parts = (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)
        return all(bool(part.isfinite().all()) for part in parts)

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
        ModelError: no adapter, a file that is cut off, an adapter of another kind, or one whose base was altered.
    """
    refuse_altered(folder)
    config = _read_config(folder)
    _refuse(config, str(folder / "adapter_config.json"))
    files = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).exists()]
    if not files:
        raise ModelError(f"there are no adapter weights in {folder} (no adapter_model.safetensors)", fix=f"ls {folder}")
    tensors = Tensors([folder / files[0]])
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    names = [
        name for name in tensors if not name.endswith(".base_layer.weight")
    ]  # PEFT copies a head that has an adapter
    odd = [name for name in names if not name.startswith(PREFIX) or not name.endswith(ends)]
    if odd:
        raise ModelError(
            f"the adapter holds {odd[0]}, which is not part of LoRA on a linear layer",
            where=str(folder / files[0]),
            fix=BY_PEFT,
        )
    modules = list(dict.fromkeys(name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in names))
    updates = {f"{module}.weight": _update(tensors, config, module) for module in modules}
    broken = [name for name, update in updates.items() if not update.is_finite()]
    if broken:
        raise ModelError(
            f"the adapter's update of {broken[0]} holds a number that is not finite: its training diverged",
            where=str(folder / files[0]),
            fix="train again with a lower learning rate, or copy the adapter again",
        )
    if not any(update.b.any() for update in updates.values()):
        raise ModelError("every B of the adapter is zero: it has learnt nothing", where=str(folder))
    return updates


def refuse_altered(folder: pathlib.Path) -> None:
    """Raise for an adapter that is not one on the base as it was.

    PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ start from a base that they alter: their A and B belong to its residual. Added to the
    base itself they give another model, and PEFT alters the base anew, or fails, wherever they are loaded on a quantised one.

    Raises:
        ModelError: by the start's name.
    """
    start = _read_config(folder).get("init_lora_weights", True)
    if start not in UNALTERED:
        raise ModelError(
            f"the adapter was initialised by {_known_as(str(start))}, which changes the base: "
            "on the original base it would be another model",
            where=str(folder / "adapter_config.json"),
            fix="convert it to plain LoRA where it was trained: model.save_pretrained(OUT, "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER), as PEFT's documentation has it"
            if str(start).lower() != "loftq"
            else "use the base that LoftQ saved with the adapter, and merge there with PEFT",
        )


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    """adapter_config.json as it stands: PEFT itself fails on some of those that are refused here, LoftQ's without scipy."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ModelError(f"there is no adapter in {folder} (no adapter_config.json)", fix=f"ls {folder}")
    return read_object(file)


def _update(tensors: Tensors, config: Mapping[str, Any], module: str) -> Update:
    names = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ModelError(f"the adapter has one half of {module} only: there is no {missing[0]}", fix="copy it again")
    a, b = (tensors[name].float() for name in names)
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    rank = math.sqrt(len(a)) if config.get("use_rslora") else len(a)
    magnitude = f"{PREFIX}{module}.lora_magnitude_vector"
    return Update(a, b, alpha / rank, tensors[magnitude].float() if magnitude in tensors else None)


def _refuse(config: Mapping[str, Any], where: str) -> None:
    """Raise for every kind of adapter that is not W + s B A."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"the adapter is {config.get('peft_type')}; only LoRA can be merged", where=where, fix=BY_PEFT)
    unknown = list(_set_options(config))
    if unknown:
        raise ModelError(
            f"the adapter sets {', '.join(unknown)}, which cannot be merged here", where=where, fix=BY_PEFT
        )


def _known_as(start: str) -> str:
    known: Mapping[str, str] = {
        "pissa": "PiSSA",
        "loftq": "LoftQ",
        "olora": "OLoRA",
        "corda": "CorDA",
        "lora_ga": "LoRA-GA",
    }
    return next((name for key, name in known.items() if start.lower().startswith(key)), start)


def _set_options(config: Mapping[str, Any]) -> Iterator[str]:
    """Options beyond those understood that differ from their defaults."""
    plain: dict[str, Any] = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in UNDERSTOOD and value != plain.get(name) and value not in (None, {}, [], False, "none"):
            yield f"{name}={value!r}"
