"""Layers of PEFT and bitsandbytes as the engine reads them: what is missing is an error, never a guess."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from nybble.couplings.coupling import TESTED
from nybble.errors import EngineError
from nybble.installed import pip

LORA_ATTRIBUTES = (
    "_disable_adapters",
    "_active_adapter",
    "merged_adapters",
    "scaling",
    "lora_variant",
    "fan_in_fan_out",
)
LORA_CHILDREN = ("base_layer", "lora_A", "lora_B", "lora_dropout")
STATE_ATTRIBUTES = ("absmax", "code", "blocksize", "nested", "state2", "offset", "shape", "quant_type", "dtype")


def check_lora(module: Any) -> None:
    """A LoRA layer says whether it is switched off, merged or varied: without that it would be computed as a plain one.

    Raises:
        EngineError: the installed PEFT stores it elsewhere.
    """
    missing = [name for name in LORA_ATTRIBUTES if name not in module.__dict__]
    missing += [name for name in LORA_CHILDREN if name not in module._modules]
    if missing:
        raise _unknown("peft", "LoRA layer", missing)


def check_quantised(layer: Any, weight: Any) -> None:
    """A 4-bit layer says in which type it computes, and its weight has a state, None before it is quantised.

    Raises:
        EngineError: the installed bitsandbytes stores them elsewhere.
    """
    missing = [name for name, own in (("compute_dtype", layer), ("quant_state", weight)) if name not in own.__dict__]
    if missing:
        raise _unknown("bitsandbytes", "4-bit layer", missing)


def check_state(state: Any) -> None:
    """A quantised weight's scales are where they are read.

    Raises:
        EngineError: the installed bitsandbytes stores them elsewhere.
    """
    missing = [name for name in STATE_ATTRIBUTES if name not in state.__dict__]
    if missing:
        raise _unknown("bitsandbytes", "quantised weight", missing)


def check_switch(layer: Any) -> None:
    """A 4-bit layer has the switch that keeps its weight from being repacked on a CPU (`on_cpu.stay_unpacked`).

    Raises:
        EngineError: the installed bitsandbytes has none of that name, so that setting it would do nothing.
    """
    if "support_avx512bf16_for_cpu" not in layer.__dict__:
        raise _unknown("bitsandbytes", "4-bit layer", ["support_avx512bf16_for_cpu"])


def _unknown(library: str, what: str, missing: list[str]) -> EngineError:
    low, high = TESTED[library]
    return EngineError(
        f"a {what} of {library} {version(library)} has no {', '.join(missing)}, so nybble cannot read it "
        f"(tested with {low} to {high})",
        fix=f"{pip()} install '{library}>={low},<={high}'",
    )
