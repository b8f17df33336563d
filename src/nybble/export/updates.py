"""What an adapter adds to each weight, read from PEFT's files; adapters that cannot be merged so are refused by name."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from nybble.errors import ModelError
from nybble.export.shards import Tensors
from nybble.model.adapter import read_adapter_config

PREFIX = "base_model.model."  # what PEFT puts before a module's name
UNDERSTOOD = frozenset(
    {
        *("peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version", "runtime_config"),
        *("base_model_name_or_path", "revision", "megatron_config", "megatron_core", "ensure_weight_tying"),
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

    def onto(self, weight: torch.Tensor, part: slice) -> torch.Tensor:
        """The merged rows (rows, in), float32, of the base's rows `part`."""
        merged = torch.addmm(weight.float(), self.b[part], self.a, alpha=self.scaling)
        if self.magnitude is not None:
            merged *= (self.magnitude[part] / merged.norm(dim=1))[:, None]
        return merged


def read_updates(folder: pathlib.Path) -> dict[str, Update]:
    """The update of each weight, by the name of its tensor in the base.

    Raises:
        ModelError: no adapter, a file that is cut off, an adapter of another kind, or one whose base was altered.
    """
    config = read_adapter_config(folder)
    _refuse(config, folder)
    files = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).exists()]
    if not files:
        raise ModelError(f"there are no adapter weights in {folder} (no adapter_model.safetensors)", fix=f"ls {folder}")
    tensors = Tensors([folder / files[0]])
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    odd = [name for name in tensors if not name.startswith(PREFIX) or not name.endswith(ends)]
    if odd:
        raise ModelError(
            f"the adapter holds {odd[0]}, which is no part of LoRA on a linear layer",
            where=str(folder / files[0]),
            fix="merge it with PEFT's own merge_and_unload on the 16-bit base",
        )
    modules = list(dict.fromkeys(name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors))
    updates = {f"{module}.weight": _update(tensors, config, module) for module in modules}
    if not any(update.b.any() for update in updates.values()):
        raise ModelError("every B of the adapter is zero: it holds nothing that was learnt", where=str(folder))
    return updates


def _update(tensors: Tensors, config: LoraConfig, module: str) -> Update:
    names = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ModelError(f"the adapter has one half of {module} only: there is no {missing[0]}")
    a, b = (tensors[name].float() for name in names)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
    rank = math.sqrt(len(a)) if config.use_rslora else len(a)
    magnitude = f"{PREFIX}{module}.lora_magnitude_vector"
    return Update(a, b, alpha / rank, tensors[magnitude].float() if magnitude in tensors else None)


def _refuse(config: PeftConfig, folder: pathlib.Path) -> None:
    """Raise for every kind of adapter that is not W + s B A on the base as it was.

    PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ start from a base that they alter: their A and B belong to its residual, and added to
    the base itself they give another model.
    """
    where = str(folder / "adapter_config.json")
    if not isinstance(config, LoraConfig):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ModelError(f"the adapter is {kind}, and LoRA is what is merged here", where=where)
    start = config.init_lora_weights
    if start not in UNALTERED:
        raise ModelError(
            f"the adapter began as {_known_as(str(start))}, which alters the base: on the base itself it would be another model",
            where=where,
            fix="convert it to plain LoRA where it was trained: model.save_pretrained(OUT, "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER), as PEFT's documentation has it"
            if str(start).lower() != "loftq"
            else "take the base that LoftQ wrote beside the adapter, and merge there with PEFT",
        )
    unknown = list(_set_options(config))
    if unknown:
        raise ModelError(
            f"the adapter sets {', '.join(unknown)}, which is not merged here",
            where=where,
            fix="merge it with PEFT's own merge_and_unload on the 16-bit base",
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


def _set_options(config: LoraConfig) -> Iterator[str]:
    """Options beyond those understood that differ from their defaults."""
    plain: dict[str, Any] = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        if name not in UNDERSTOOD and value != plain.get(name) and value not in (None, {}, [], False, "none"):
            yield f"{name}={value!r}"
