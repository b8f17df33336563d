"""The attributes of PEFT's and bitsandbytes' layers that the engine reads: a missing one is an error, never a guess."""

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
    """Check that a LoRA layer says whether it is disabled, merged or a variant: else it would be computed as a plain one.

    Raises:
        EngineError: the installed PEFT stores it elsewhere.
    """
    missing = [name for name in LORA_ATTRIBUTES if name not in module.__dict__]
    missing += [name for name in LORA_CHILDREN if name not in module._modules]
    if missing:
        raise _unknown("peft", "LoRA layer", missing)


def check_quantised(layer: Any, weight: Any) -> None:
    """Check that a 4-bit layer has its compute type, and its weight a state, which is None before it is quantised.

    Raises:
        EngineError: the installed bitsandbytes stores them elsewhere.
    """
    missing = [
        name for name, owner in (("compute_dtype", layer), ("quant_state", weight)) if name not in owner.__dict__
    ]
    if missing:
        raise _unknown("bitsandbytes", "4-bit layer", missing)


def check_state(state: Any) -> None:
    """Check that the state of a quantised weight has the attributes that are read.

    Raises:
        EngineError: the installed bitsandbytes stores them elsewhere.
    """
    missing = [name for name in STATE_ATTRIBUTES if name not in state.__dict__]
    if missing:
        raise _unknown("bitsandbytes", "quantised weight", missing)


def check_repacking_switch(layer: Any) -> None:
    """Check that a 4-bit layer has the setting that keeps its weight from being repacked on a CPU (`on_cpu.stay_unpacked`).

    Raises:
        EngineError: the installed bitsandbytes has none of that name, so changing it would have no effect.
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
