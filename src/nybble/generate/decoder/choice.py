"""Whether the decoder can answer for a model, and what it computes with."""

from __future__ import annotations

import pathlib

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from nybble.files.paths import default_cache
from nybble.generate.constraint import Constrain
from nybble.generate.decoder.decoder import RowDecoder
from nybble.generate.decoder.model import DecoderModel, read_model
from nybble.generate.decoder.pages import PAGE
from nybble.generate.decoder.plain_steps import PlainSteps
from nybble.generate.decoder.steps import Steps
from nybble.generate.request import Observer
from nybble.plan.free_memory import allocatable_bytes, host_memory
from nybble.plan.generation_bytes import decoder_workspace_bytes, kv_cache_bytes_per_token
from nybble.plan.shapes import ModelShape
from nybble.weights.watched import Ineligible

try:
    from nybble.generate.decoder.cuda_steps import CHUNK, CudaSteps
    from nybble.generate.decoder.step_graphs import SIZES

    MISSING = ""
except ImportError as error:  # torch for CPUs does not bring it, and does not need it
    MISSING = str(error)

SHARE = 0.9  # of the memory that a GPU has left, for cache and buffers
CPU_SHARE = 0.6  # of the memory that is free, for keys and values
OLDEST = (8, 0)  # compute capability: bf16 tensor cores and copies beside the computation


def make_decoder(
    model: PreTrainedModel | PeftModel,
    *,
    queue: int | None = None,
    observer: Observer | None = None,
    tokens: int | None = None,
    longest: int = 1,
    cache: pathlib.Path | None = None,
    constrain: Constrain | None = None,
    fp8_cache: bool = False,
) -> RowDecoder:
    """A decoder for a model with all of its adapters, as they are now.

    Args:
        model: in eval mode.
        queue: requests that may wait; None for any number.
        observer: is notified of the load.
        tokens: that its cache shall hold, if they fit into its share of the free memory; None for all of that share.
        longest: tokens of a request, prompt and answer, for which there must be memory.
        cache: the cache folder, where compiled kernels are kept; None for the user's own.
        constrain: makes the constraints of requests with a grammar; None where there are none.
        fp8_cache: keys and values in e4m3, on a GPU: twice as many tokens in the same memory.

    Raises:
        Ineligible: the first reason why the decoder cannot answer for it.
    """
    read = read_model(model)
    try:
        steps = _choose_steps(read, model, tokens, longest, cache, fp8_cache)
    except torch.OutOfMemoryError:
        raise Ineligible("there is not enough memory for its cache and buffers") from None
    return RowDecoder(read, steps, queue=queue, constrain=constrain, observer=observer)


def _choose_steps(
    read: DecoderModel,
    model: PreTrainedModel | PeftModel,
    tokens: int | None,
    longest: int,
    cache: pathlib.Path | None,
    fp8_cache: bool,
) -> Steps:
    shape = ModelShape.from_config(model.config.to_dict())
    if read.device.type != "cuda":
        if fp8_cache:
            raise Ineligible("keys and values in fp8 need a GPU")
        fitting = int(CPU_SHARE * host_memory().free / kv_cache_bytes_per_token(shape, read.embedding.dtype.itemsize))
        _check_memory(fitting, longest)
        return PlainSteps(read, fitting if tokens is None else min(fitting, tokens))
    if torch.cuda.get_device_capability(read.device) < OLDEST:
        raise Ineligible("the decoder's kernels need a GPU of compute capability 8.0 or later")
    if MISSING:
        raise Ineligible(f"{MISSING}; pip install cuda-bindings")
    free = SHARE * allocatable_bytes(read.device) - decoder_workspace_bytes(shape, SIZES[-1], CHUNK)
    dtype = torch.float8_e4m3fn if fp8_cache else torch.bfloat16
    fitting = int(free / kv_cache_bytes_per_token(shape, dtype.itemsize))
    _check_memory(fitting, max(longest, PAGE))
    most = min(fitting, SIZES[-1] * read.positions)
    return CudaSteps(read, most if tokens is None else min(most, tokens), (cache or default_cache()) / "kernels", dtype)


def _check_memory(fitting: int, needed: int) -> None:
    """Whether a cache of so many tokens is large enough.

    Raises:
        Ineligible: it is not.
    """
    if fitting < needed:
        raise Ineligible(f"there is memory for {max(0, fitting):,} tokens in its cache, and {needed:,} are needed")
