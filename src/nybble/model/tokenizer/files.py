"""Checks of a tokenizer's files before a library reads them; the library's own errors become one sentence."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nybble.errors import ModelError, is_panic
from nybble.files.reading import read_object, read_text
from nybble.model.base.files import LOADING_FAULTS, reason
from nybble.model.tokenizer.expressions import try_expressions

OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "tokenizer.json")
OTHERS = ("tokenizer.model", "merges.txt")
FILES = (*OBJECTS, *OTHERS, "chat_template.jinja")
AGAIN = "copy or download the tokenizer again; its files belong together"
LARGEST = 64 << 20  # bytes of tokenizer.model; Llama 2's has 500 thousand
TEMPLATE = 1 << 20  # bytes of a chat template
IDS = 10_000_000  # the largest vocabularies have 256 thousand tokens
ID = f"a whole number from 0 to {IDS - 1:,}"
CONTENT = 1000  # characters of an added token
GROWTH = 16  # how many times as long a text may become before it is cut into tokens; Llama's does not make it longer
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SHOWN = 60  # characters of a value in a message


def check_files(folder: pathlib.Path) -> None:
    """Refuse a folder whose tokenizer is invalid, or would take endless memory or time.

    Files that do not exist are ignored.

    Raises:
        ModelError: naming the file, and the field if one is wrong.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            f"{folder} has no tokenizer (no tokenizer.json)",
            fix="put tokenizer.json and tokenizer_config.json next to the weights",
        )
    objects = {name: read_object(folder / name, ModelError, AGAIN) for name in OBJECTS if (folder / name).exists()}
    for name in OTHERS:
        file = folder / name
        if file.exists() and (size := file.stat().st_size) > LARGEST:
            raise ModelError(f"{name} has {size:,} bytes; the limit is {LARGEST:,}", where=str(file), fix=AGAIN)
    for file in (folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        if file.exists():
            read_text(file, ModelError, AGAIN, TEMPLATE)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _check_fields(objects.get(name, {}), folder / name)
    for token, number in objects.get("added_tokens.json", {}).items():
        _check_id(token, number, folder / "added_tokens.json")
    if "tokenizer.json" in objects:
        _check_tokenizer(objects["tokenizer.json"], folder / "tokenizer.json")


@contextlib.contextmanager
def explained(folder: pathlib.Path) -> Iterator[None]:
    """Turn errors of Transformers or tokenizers about a tokenizer into a ModelError.

    tokenizers raises bare Exceptions, and a panic of its Rust code is a BaseException.
    """
    try:
        yield
    except BaseException as error:
        panic = is_panic(error)
        if not panic and type(error) is not Exception and not isinstance(error, LOADING_FAULTS):
            raise
        what = f"tokenizers fails on it: {reason(error)}" if panic else reason(error)  # type: ignore[arg-type]
        fix = "put tokenizer.json and tokenizer_config.json next to the weights"
        if "trust_remote_code" in str(error):
            what = "it comes with its own code, and nybble runs no code from a model"
            fix = 'delete "auto_map" in tokenizer_config.json and set "tokenizer_class" to "PreTrainedTokenizerFast" there, if '
            fix += "tokenizer.json is all of it"
        raise ModelError(
            f"no tokenizer can be loaded from {folder}: {what[:300]}",
            where=str(folder / "tokenizer.json") if " at line " in what else None,
            fix=fix,
        ) from error


def _check_fields(config: Mapping[str, Any], file: pathlib.Path) -> None:
    for name, (is_right, wanted) in FIELDS.items():
        value = config.get(name)
        if value is not None and not is_right(value):
            raise _odd(file, name, value, wanted)
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if not re.fullmatch(r"\d{1,9}", key):
            raise _odd(file, "added_tokens_decoder", key, "an object of tokens by their ids")
        _check_id(_content(token), int(key), file)


def _check_tokenizer(described: Mapping[str, Any], file: pathlib.Path) -> None:
    model, added = described.get("model"), described.get("added_tokens", [])
    if not isinstance(model, dict):
        raise _odd(file, "model", model, "an object")
    if not isinstance(added, list) or not all(isinstance(token, dict) and _is_token(token) for token in added):
        raise _odd(file, "added_tokens", added, "a list of tokens with their ids")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise _odd(file, "model.vocab", vocabulary, "all tokens with their ids")
    if len(vocabulary) + len(added) > IDS:
        raise ModelError(
            f"{file.name} has {len(vocabulary) + len(added):,} tokens; nybble accepts up to {IDS:,}",
            where=str(file),
            fix=AGAIN,
        )
    if isinstance(vocabulary, dict):
        names: dict[int, str] = {}
        for token, number in vocabulary.items():
            _check_id(token, number, file)
            if names.setdefault(number, token) != token:
                raise ModelError(
                    f"two tokens of {file.name} share the id {number}: {names[number]!r:.{SHOWN}} and {token!r:.{SHOWN}}",
                    where=str(file),
                    fix=AGAIN,
                )
    for token in added:
        _check_id(token["content"], token.get("id"), file)
    if model.get("dropout"):
        raise ModelError(
            f"model.dropout in {file.name} is {model['dropout']!r:.{SHOWN}}: the same text would give different ids each time",
            where=str(file),
            fix="set it to null there",
        )
    _check_processor(described.get("post_processor"), file)
    for name in ("normalizer", "decoder"):
        if (growth := _growth(described.get(name))) > GROWTH:
            raise ModelError(
                f"the {name} in {file.name} makes a text up to {min(growth, 1e9):,.0f} times as long",
                where=str(file),
                fix=AGAIN,
            )
    try_expressions(described, file, AGAIN)


def _check_processor(processor: Any, file: pathlib.Path) -> None:
    """Check what is added to every text: it may be only a few tokens."""
    for part in _parts(processor):
        for name in ("single", "pair", "tokens", "ids"):
            if isinstance(part.get(name), list) and len(part[name]) > 100:
                raise ModelError(
                    f"the post_processor in {file.name} adds {len(part[name]):,} tokens to every text",
                    where=str(file),
                    fix=AGAIN,
                )
        for number in part["ids"] if isinstance(part.get("ids"), list) else ():
            if not _is_id(number):
                raise _odd(file, "an id in post_processor", number, ID)


def _growth(part: Any) -> float:
    """How many times as long a text may become, roughly."""
    growth = 1.0
    for inner in _parts(part):
        content, pattern = inner.get("content"), inner.get("pattern")
        if isinstance(content, str) and isinstance(pattern, dict):
            plain = pattern.get("String")
            growth *= max(1.0, len(content) / max(1, len(plain)) if isinstance(plain, str) else 1 + len(content))
        if isinstance(inner.get("prepend"), str) and len(inner["prepend"]) > CONTENT:
            growth *= len(inner["prepend"])
    return growth


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a description, the outer ones first; it is not nested deeply, or it could not have been read."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(inner)


def _check_id(token: Any, number: Any, file: pathlib.Path) -> None:
    if not isinstance(token, str) or len(token) > CONTENT * 10:
        raise _odd(file, "a token", token, f"text of at most {CONTENT * 10:,} characters")
    if not _is_id(number):
        raise _odd(file, f"the id of token {token!r:.{SHOWN}}", number, ID)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < IDS


def _odd(file: pathlib.Path, name: str, value: Any, wanted: str) -> ModelError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"
    return ModelError(f"{name} in {file.name} is {shown}; it must be {wanted}", where=str(file), fix=AGAIN)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _is_token(value: Any) -> bool:
    return isinstance(_content(value), str)


def _is_tokens(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and all(map(_is_token, values))


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(item, dict) and {*map(type, map(item.get, ("name", "template")))} == {str} for item in value
        )
    return isinstance(value, str) or (isinstance(value, dict) and all(isinstance(text, str) for text in value.values()))


_TOKEN = (_is_token, "a token's text, or an object with its content")
_TOKENS = (_is_tokens, "a list of tokens, or an object of them")
_TRUTH = (lambda value: isinstance(value, bool), "true or false")
_SIDE = (lambda value: value in ("left", "right"), "left or right")
FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(NAMED, _TOKEN),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _TOKENS),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "add_prefix_space", "legacy"), _TRUTH),
    **dict.fromkeys(("padding_side", "truncation_side"), _SIDE),
    "added_tokens_decoder": (lambda value: isinstance(value, dict) and _is_tokens(value), "an object of tokens by their ids"),
    "chat_template": (_is_template, "a template's text, or several with a name and a template each"),
    "model_max_length": (
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value) and value > 0,
        "a number above 0",
    ),
    "tokenizer_class": (lambda value: isinstance(value, str), "the name of a class"),
}  # fmt: skip
"""The values allowed in fields that Transformers relies on, and how a message describes them; null counts as absent."""
