"""Checks of adapter_config.json, field by field: with wrong values PEFT fails, or computes something else."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft import LoraConfig

from nybble.errors import ModelError
from nybble.files.reading import read_object
from nybble.model.base.files import LOADING_FAULTS, reason

CONFIG = "adapter_config.json"
AGAIN = "copy the adapter again, or correct the field there"
MERGEABLE = frozenset(
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
"""Options under which an adapter is W + s B A, or DoRA's form of it."""
LOADABLE = MERGEABLE | {
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "bias", "lora_bias", "fan_in_fan_out"),
    *("qalora_group_size", "loftq_config", "corda_config", "lora_ga_config"),  # of variants that other fields refuse
}
"""Options of adapters that compute the same as with PEFT, and that leave the base unchanged when they are disabled."""
UNALTERED = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations of A and B that do not change the base's weights."""
ALTERING = {
    "pissa": "PiSSA",
    "loftq": "LoftQ",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}
"""Initialisations that change them, by the beginning of their names."""
LARGEST = 1_000_000  # rank or alpha: a larger one is a typing error, or an attempt to fill the memory
EMPTY: tuple[Any, ...] = (None, {}, [], False, "none", "", 0)


def read_adapter_config(path: str | pathlib.Path) -> LoraConfig:
    """PEFT's configuration of an adapter folder.

    Raises:
        ModelError: there is no adapter, it is not LoRA on an unaltered base, or a field has an impossible value.
    """
    folder = pathlib.Path(path)
    content = read_content(folder)
    file = str(folder / CONFIG)
    refuse_other_kinds(content, file, "nybble loads LoRA adapters only (also rsLoRA and DoRA)")
    _check_fields(content, file)
    refuse_altered(content, file)
    if unsupported := list(set_options(content, LOADABLE)):
        raise ModelError(
            f"the adapter sets {', '.join(unsupported)}, which nybble does not support",
            where=file,
            fix="load it with PEFT, and merge it there (merge_and_unload) if its kind allows that",
        )
    known = {
        name: value for name, value in content.items() if name in _known() - {"runtime_config"} and value is not None
    }
    try:
        with warnings.catch_warnings():  # about settings of initialisations (LoftQ, EVA), which loading does not use
            warnings.simplefilter("ignore", UserWarning)
            return LoraConfig(**known)
    except LOADING_FAULTS as error:
        raise ModelError(f"PEFT cannot read {CONFIG}: {reason(error)}", where=file, fix=AGAIN) from error


def read_content(folder: pathlib.Path) -> dict[str, Any]:
    """The content of adapter_config.json, not read by PEFT, which fails on some that are refused here (LoftQ's without scipy).

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    file = folder / CONFIG
    if not file.exists():
        inner = folder / "adapter"  # of a run
        raise ModelError(
            f"there is no adapter in {folder} (no {CONFIG})",
            fix=f"adapter={inner}" if (inner / CONFIG).is_file() else f"ls {folder}",
        )
    return read_object(file)


def refuse_other_kinds(content: Mapping[str, Any], file: str, fix: str) -> None:
    """Raise ModelError for anything but a LoRA adapter of a causal language model."""
    kind = content.get("peft_type")
    if kind is None:
        raise ModelError(f"{CONFIG} does not say which kind of adapter it is (no peft_type)", where=file, fix=AGAIN)
    if kind != "LORA":
        raise ModelError(f"the adapter is {_known_as(kind)}, not LORA (peft_type)", where=file, fix=fix)
    task = content.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"the adapter is for {_known_as(task)}, not for text generation (CAUSAL_LM)",
            where=file,
            fix="use an adapter whose task_type is CAUSAL_LM",
        )


def refuse_altered(content: Mapping[str, Any], file: str) -> None:
    """Refuse an adapter whose initialisation changed the base.

    PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ start by changing the base: their A and B belong to its residual. Added to the original
    base they give a different model. Where they are loaded on a quantised base, PEFT changes it again, or fails: with the adapter
    disabled, the model would not answer like its base.

    Raises:
        ModelError: naming the initialisation.
    """
    start = content.get("init_lora_weights", True)
    if start in UNALTERED or start is None:
        return
    known = next((name for key, name in ALTERING.items() if str(start).lower().startswith(key)), None)
    if known is None:
        raise ModelError(
            f"the adapter was initialised by {_shown(start)} (init_lora_weights), which nybble does not support: "
            "the base may have been changed",
            where=file,
            fix="convert it to plain LoRA where it was trained",
        )
    raise ModelError(
        f"the adapter was initialised by {known}, which changes the base: on the original base it would be a different model",
        where=file,
        fix="convert it to plain LoRA where it was trained: model.save_pretrained(OUT, "
        "path_initial_model_for_weight_conversion=INITIAL_ADAPTER), as PEFT's documentation describes"
        if known != "LoftQ"
        else "use the base that LoftQ saved with the adapter, and merge there with PEFT",
    )


def set_options(content: Mapping[str, Any], understood: frozenset[str]) -> Iterator[str]:
    """PEFT's options outside `understood` that differ from their defaults, as name=value."""
    plain: dict[str, Any] = LoraConfig().to_dict()
    for name, value in content.items():
        if name in _known() - understood and value != plain.get(name) and value not in EMPTY:
            yield f"{name}={value!r:.80}"
    if content.get("megatron_config"):  # PEFT then imports whichever module megatron_core names
        yield "megatron_config"


def unknown_options(content: Mapping[str, Any]) -> list[str]:
    """Fields that are set but that this PEFT does not know, which it ignores: they are from a later version."""
    return sorted(name for name, value in content.items() if name not in _known() and value not in EMPTY)


def _known() -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(LoraConfig))


Test = Callable[[Any], bool]


def _check_fields(content: Mapping[str, Any], file: str) -> None:
    """Raise ModelError for the first field whose value cannot be right."""
    for name, (is_right, wanted) in FIELDS.items():
        if name in content and not is_right(content[name]):
            raise ModelError(f"{name} is {_shown(content[name])}; it must be {wanted}", where=file, fix=AGAIN)
    patterns = {name: content.get(name) for name in ("target_modules", "exclude_modules")}
    found = [(name, text) for name, text in patterns.items() if isinstance(text, str)]
    found += [(name, key) for name in ("rank_pattern", "alpha_pattern") for key in content.get(name) or {}]
    layers = content.get("layers_pattern") or []
    found += [("layers_pattern", text) for text in ([layers] if isinstance(layers, str) else layers)]
    for name, pattern in found:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ModelError(
                f"{name} contains an invalid regular expression: {_shown(pattern)} ({error})", where=file, fix=AGAIN
            ) from error


def _known_as(value: object) -> str:
    """A kind by its name in PEFT, anything else as it is in the file."""
    return value if isinstance(value, str) and value.isidentifier() else _shown(value)


def _shown(value: object) -> str:
    """A value as it is in the file, shortened if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_whole(least: int, most: float = math.inf) -> Test:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST  # not NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _dict_of(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def _one_of(*tests: Test) -> Test:
    return lambda value: any(test(value) for test in tests)


_NAMES = (_or_none(_one_of(_list_of(_is_text), _is_text)), "a list of names, or a regular expression as text")
_TRUTH = (_is_truth, "true or false")
FIELDS: Mapping[str, tuple[Test, str]] = {
    "r": (_is_whole(1, LARGEST), "a whole number from 1 to 1,000,000"),
    "lora_alpha": (_is_number, "a number between -1,000,000 and 1,000,000"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), _TRUTH),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "target_modules": (lambda value: value not in ([], "") and _NAMES[0](value), f"{_NAMES[1]}, and not empty"),
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "modules_to_save": (_or_none(_list_of(_is_text)), "a list of names"),
    "layers_to_transform": (_or_none(_one_of(_is_whole(0), _list_of(_is_whole(0)))), "a layer's number, or a list of them"),
    "rank_pattern": (_or_none(_dict_of(_is_whole(1, LARGEST))), "an object of whole numbers from 1"),
    "alpha_pattern": (_or_none(_dict_of(_is_number)), "an object of numbers"),
    "trainable_token_indices": (
        _or_none(_one_of(_list_of(_is_whole(0)), _dict_of(_list_of(_is_whole(0))))),
        "a list of token ids, or an object of such lists",
    ),
    "base_model_name_or_path": (_or_none(_is_text), "a name or a path"),
}  # fmt: skip
"""The values allowed in fields that decide what an adapter does, and how a message describes them."""
