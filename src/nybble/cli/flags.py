"""Sorts command-line arguments: MODEL and DATA, key=value, and the `--key value` of other programs."""

from __future__ import annotations

import difflib
import os
import pathlib
import re
from collections import deque
from collections.abc import Sequence

from nybble.errors import RecipeError
from nybble.recipe import option_names
from nybble.recipe.loading import nearest_option
from nybble.recipe.values import example, kinds_of

KEY = re.compile(r"[\w-]+(\.[\w-]+)*=")
BOOLEANS = ("true", "false", "yes", "no", "on", "off")
ALIASES = {
    # names of the same option in Transformers, PEFT and other trainers
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "lr_scheduler_type": "train.scheduler",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "eval_steps": "train.evaluate_every",
    "save_steps": "train.save_every",
    "max_seq_length": "data.max_length",
    "rank": "lora.r",
    "target_modules": "lora.targets",
    "model": "model.path",
    "model_name_or_path": "model.path",
    "data": "data.path",
    "dataset": "data.path",
    "output_dir": "out",
}


def sort_arguments(
    arguments: Sequence[str], targets: tuple[str, str], command_options: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Positional arguments by the option that each sets, and the other arguments as `key=value`.

    Args:
        arguments: as typed.
        targets: the options that the first two positional arguments set.
        command_options: options of the command itself, such as --config.

    Raises:
        RecipeError: an argument is wrong; the fix is what to type.
    """
    positional: list[str] = []
    options: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        if argument.startswith("-") and len(argument) > 1:
            options.append(_flag(argument, rest, command_options))
        elif KEY.match(argument) and not _is_path(argument):
            key, _, value = argument.partition("=")
            if not value and rest and not KEY.match(rest[0]) and not rest[0].startswith("-"):
                _refuse_spaces(key, rest[0])
            options.append(f"{(_options_of(key) or [key])[0]}={_with_brackets_closed(value, rest)}")
        elif argument in option_names() and not os.path.exists(argument):
            _refuse_spaces(argument, next((text.removeprefix("=") for text in rest if text != "="), ""))
        else:
            positional.append(argument)
    names = " and ".join(target.split(".")[0].upper() for target in targets)
    if len(positional) > 2:
        raise RecipeError(
            f"unexpected {positional[2]!r}: expected at most {names}, then key=value",
            fix="options are written key=value: train.epochs=2",
        )
    texts = dict(zip(targets, positional, strict=False))
    for key, text in texts.items():
        if repeated := next((argument for argument in options if argument.startswith(key + "=")), None):
            raise RecipeError(
                f"{key.split('.')[0].upper()} was given twice: {text} and {repeated}", fix="keep one of them"
            )
    return texts, options


def _is_path(argument: str) -> bool:
    """Whether an argument with an equals sign is a file, folder or pattern and not the name of an option."""
    if kinds_of(argument.partition("=")[0]) is not None:
        return False
    return os.path.exists(argument) or any(True for _ in pathlib.Path().glob(argument) if set(argument) & set("*?["))


def _flag(argument: str, rest: deque[str], command_options: Sequence[str]) -> str:
    """`--key value` or `--key=value` as key=value; its value may be the first argument in `rest`, which is then removed."""
    name, equals, value = argument.lstrip("-").partition("=")
    name = name.replace("-", "_")
    matches, negated = _options_of(name), _options_of(name.removeprefix("no_"))
    if not matches and _is_boolean(negated):
        return f"{negated[0]}=false"
    if len(matches) != 1:
        raise _unknown_option(argument.partition("=")[0], value or (rest[0] if rest else ""), matches, command_options)
    (key,) = matches
    if not equals:
        if _is_boolean(matches) and (not rest or rest[0].lower() not in BOOLEANS):
            return f"{key}=true"
        if not rest or KEY.match(rest[0]) or rest[0].startswith("--"):
            raise RecipeError(f"{argument}: the value is missing", fix=example(key))
        value = rest.popleft()
    return f"{key}={_with_brackets_closed(value, rest)}"


def _options_of(name: str) -> list[str]:
    """The options that a name may mean: a full name, another program's name, the last part, or the parts joined with `_`."""
    known = list(option_names())
    if name in known or kinds_of(name) is not None:
        return [name]
    if name in ALIASES:
        return [ALIASES[name]]
    leaves = [option for option in known if option.rsplit(".", 1)[-1] == name]
    return leaves or [option for option in known if option.replace(".", "_") == name]


def _is_boolean(options: Sequence[str]) -> bool:
    return len(options) == 1 and bool in (kinds_of(options[0]) or ())


def _with_brackets_closed(value: str, rest: deque[str]) -> str:
    """A value; one in brackets that the shell split at its spaces is joined with what follows, up to the closing bracket."""
    if value.startswith(("[", "{")):
        while rest and _depth(value) > 0:
            value += f" {rest.popleft()}"
    return value


def _depth(text: str) -> int:
    return sum((letter in "[{") - (letter in "]}") for letter in text)


def _refuse_spaces(key: str, value: str) -> None:
    names = _options_of(key) or [key]
    line = f"{names[0]}={value}" if value else example(names[0]) if kinds_of(names[0]) else "train.epochs=2"
    raise RecipeError(f"{key}: options are written key=value, without spaces", fix=line)


def _unknown_option(flag: str, value: str, matches: Sequence[str], command_options: Sequence[str]) -> RecipeError:
    """The fault of a flag that matches none of the recipe's options, or several."""
    if matches:
        return RecipeError(
            f"{flag} is ambiguous: it may be {' or '.join(matches)}",
            fix=" or ".join(f"{key}={value}" for key in matches),
        )
    similar = difflib.get_close_matches(flag, command_options, n=1, cutoff=0.75)
    option = nearest_option(flag.lstrip("-").replace("-", "_"))
    line = f"{option}={value}" if option and value else example(option) if option else None
    return RecipeError(
        f"there is no option {flag}", fix=similar[0] if similar else line or "every option: nybble train --print-config"
    )
