"""Load each tensor of an adapter's file into its parameter in the model, with none left over on either side."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict

from nybble.errors import ModelError
from nybble.model.adapter.config import CONFIG
from nybble.model.base.files import shape_text
from nybble.terminal import first_of

# Copies of the base's own weights, which PEFT saves with an adapter.
COPY = re.compile(r"(embed_tokens|lm_head)(\.base_layer)?\.weight$")
RANK_AXES = {"A": 0, "B": 1, "embedding_A": 0, "embedding_B": 1}
ADDED_TOKENS = (
    "its base must have these tokens too: resize it as before that training (tokenizer of the adapter, "
    "model.resize_token_embeddings(len(tokenizer))), save it, and name it with --base PATH"
)


def load_tensors(model: PeftModel, name: str, file: pathlib.Path, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Load each of an adapter's tensors into its parameter; none may be left over on either side.

    Returns:
        The base's embeddings and heads of which the file contains copies with other values.

    Raises:
        ModelError: naming tensors that are missing, have no parameter, or are of another shape.
    """
    live = model.state_dict()
    parameters = get_peft_model_state_dict(model, live, name, save_embedding_layers=False)
    copies = {key: live[key] for key in live if key in tensors and key not in parameters and COPY.search(key)}
    _check_fit(tensors, parameters, copies, model.peft_config[name], file)
    names = {id(tensor): key for key, tensor in live.items()}  # PEFT leaves out the adapter's name in a file
    built = {}
    for key, parameter in parameters.items():
        if parameter.is_meta:  # always a copy, since mapped pages change with the file
            built[names[id(parameter)]] = tensors[key].to(model.device, parameter.dtype, copy=True)
        else:  # what PEFT copied from the base, and may have tied
            parameter.copy_(tensors[key])
    model.load_state_dict(built, strict=False, assign=True)
    left = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, left
    changed = [key for key, base in copies.items() if not torch.equal(tensors[key].to(base), base)]
    for key in changed:
        copies[key].copy_(tensors[key])
    return [_plain(key) for key in changed]


def _check_fit(
    tensors: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    copies: Mapping[str, torch.Tensor],
    config: LoraConfig,
    file: pathlib.Path,
) -> None:
    biases = [key for key in tensors if key in parameters and key.endswith(".bias") and ".lora_B." not in key]
    if biases:
        raise ModelError(
            f"the adapter changes {_plain(biases[0])} of the base itself (bias={config.bias}): switched off, it would not "
            "leave the base as it was",
            where=str(file),
            fix="merge it with PEFT, and use the merged model as a base",
        )
    sizes = {
        key: (tuple(tensors[key].shape), tuple(parameter.shape))
        for key, parameter in {**parameters, **copies}.items()
        if key in tensors and parameter.shape != tensors[key].shape
    }
    if sizes:
        raise _shape_error(config, file, sizes)
    missing = [_plain(key) for key in parameters if key not in tensors]
    foreign = [_plain(key) for key in tensors if key not in parameters and key not in copies]
    if not missing and not foreign:
        return
    faults = [f"is missing {first_of(missing)}"] if missing else []
    faults += [f"contains {first_of(foreign)}, for which this base with this {CONFIG} has no place"] if foreign else []
    raise ModelError(
        f"{file.name} {', and '.join(faults)}",
        where=str(file),
        fix=f"copy both files of the adapter again; if the base is another one: {base_hint(config)}",
    )


def base_hint(config: LoraConfig) -> str:
    """How to give the base of an adapter that does not fit this one."""
    named = config.base_model_name_or_path
    return f"it was trained on {named}; give it with --base PATH" if named else "give its base with --base PATH"


def _shape_error(
    config: LoraConfig, file: pathlib.Path, sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> ModelError:
    """Why an adapter does not fit, with the sizes."""
    ranks = [
        f"{_plain(key)} has rank {own[axis]}, but {CONFIG} says {wanted[axis]}"
        for key, (own, wanted) in sizes.items()
        if (axis := RANK_AXES.get(key.rpartition(".lora_")[2].removesuffix(".weight"))) is not None
        and len(own) == 2
        and own[1 - axis] == wanted[1 - axis]
    ]
    if len(ranks) == len(sizes):
        return ModelError(first_of(ranks), where=str(file), fix="copy both files of the adapter again")
    misfits = [
        f"{_plain(key)} is {shape_text(own)} in the adapter, but {shape_text(wanted)} in the base"
        for key, (own, wanted) in sizes.items()
    ]
    # Only the size of the vocabulary differs: tokens were added.
    added = all(
        re.search(r"embed_tokens|lm_head", key) and own[1:] == wanted[1:] for key, (own, wanted) in sizes.items()
    )
    return ModelError(
        f"the adapter does not fit this base: {first_of(misfits)}",
        where=str(file),
        fix=ADDED_TOKENS if added else base_hint(config),
    )


def _plain(name: str) -> str:
    """A tensor's name in the base, without PEFT's prefix."""
    return name.removeprefix("base_model.model.")
