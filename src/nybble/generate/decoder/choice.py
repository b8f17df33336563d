"""Whether the decoder can answer for a model, and what it computes with."""

from __future__ import annotations

import pathlib

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from nybble.generate.decoder.decoder import RowDecoder
from nybble.generate.decoder.model import DecoderModel, read_model
from nybble.generate.decoder.plain_steps import PlainSteps
from nybble.generate.decoder.steps import Steps
from nybble.generate.request import Observer
from nybble.plan.free_memory import device_memory
from nybble.plan.ledger import kv_cache_bytes_per_token
from nybble.plan.shapes import ModelShape
from nybble.weights.watched import Ineligible

try:
    from nybble.generate.decoder.cuda_steps import CudaSteps
    from nybble.generate.decoder.step_graphs import SIZES

    MISSING = ""
except ImportError as error:  # torch for CPUs does not bring it, and does not need it
    MISSING = str(error)

SHARE = 0.6  # of the memory that is free, for keys and values
OLDEST = (8, 0)  # compute capability: bf16 tensor cores and copies beside the computation


def make_decoder(
    model: PreTrainedModel | PeftModel,
    *,
    queue: int | None = None,
    observer: Observer | None = None,
    folder: pathlib.Path | None = None,
) -> RowDecoder:
    """A decoder for a model with all of its adapters, as they are now.

    Args:
        model: in eval mode.
        queue: requests that may wait; None for any number.
        observer: of how busy it is.
        folder: where compiled kernels are kept.

    Raises:
        Ineligible: the first reason why the decoder cannot answer for it.
    """
    read = read_model(model)
    return RowDecoder(read, _choose_steps(read, model, folder), queue=queue, observer=observer)


def _choose_steps(read: DecoderModel, model: PreTrainedModel | PeftModel, folder: pathlib.Path | None) -> Steps:
    shape = ModelShape.from_config(model.config.to_dict())
    if read.device.type != "cuda":
        tokens = int(
            SHARE * device_memory(read.device).free / kv_cache_bytes_per_token(shape, read.embedding.dtype.itemsize)
        )
        return PlainSteps(read, tokens)
    if torch.cuda.get_device_capability(read.device) < OLDEST:
        raise Ineligible("the decoder's kernels need a card of compute capability 8.0 or later")
    if MISSING:
        raise Ineligible(f"{MISSING}; pip install cuda-bindings")
    tokens = int(SHARE * device_memory(read.device).free / kv_cache_bytes_per_token(shape, torch.bfloat16.itemsize))
    return CudaSteps(read, min(tokens, SIZES[-1] * read.positions), folder)
