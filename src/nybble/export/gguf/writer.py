"""A merged model as GGUF, llama.cpp's format, for the Llama architecture. The only module that imports the gguf package."""

from __future__ import annotations

import math
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nybble.errors import ExportError
from nybble.export.gguf.modelfile import between
from nybble.export.gguf.quants import K_QUANTS, QUANTIZER
from nybble.export.gguf.vocabulary import Vocabulary, read_vocabulary
from nybble.export.merge.merge import MergedModel
from nybble.model.base.soundness import EMBEDDING, HEAD
from nybble.plan.shapes import ModelShape, head_size

FILE_TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
BLOCK = 32  # numbers with one scale, in Q8_0 and Q4_0; a row whose length is not a multiple of it stays F16
SCALINGS = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
"""The parameters of YaRN (Peng et al. 2023) that llama.cpp uses by default."""


class Converter:
    """Writes GGUF files; the command line creates it if the gguf package is installed."""

    def check(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that could not be written, before any work is done.

        Raises:
            ModelError: llama.cpp has no name for the tokenizer.
            ExportError: llama.cpp does not support the RoPE scaling.
        """
        read_vocabulary(tokenizer, config.vocab_size)
        _check_rope(config)

    def write(self, file: pathlib.Path, model: MergedModel, quant: str, done: Callable[[int], None]) -> None:
        """Write one file.

        Args:
            file: a file that does not exist yet.
            model: the model.
            quant: F16, Q8_0, Q4_0, or one of the K-quants, which llama-quantize makes from an F16 that is deleted afterwards.
            done: called with the number of parameters written so far.

        Raises:
            ExportError: llama-quantize fails.
        """
        if quant not in K_QUANTS:
            _write(file, model, quant, done)
            return
        whole = file.with_suffix(".f16.gguf")
        try:
            _write(whole, model, "F16", done)
            _quantize(whole, file, quant)
        finally:
            whole.unlink(missing_ok=True)


def _quantize(whole: pathlib.Path, file: pathlib.Path, quant: str) -> None:
    program = shutil.which(QUANTIZER)
    assert program is not None, "checked before any work"
    result = subprocess.run([program, str(whole), str(file), quant], capture_output=True, text=True, check=False)
    if result.returncode:
        output = (result.stderr or result.stdout).strip().splitlines()
        reason = output[-1] if output else "no output"
        raise ExportError(f"{QUANTIZER} ended with status {result.returncode}: {reason}")


def _write(file: pathlib.Path, model: MergedModel, quant: str, done: Callable[[int], None]) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, model, quant)
    _describe_tokens(writer, read_vocabulary(model.tokenizer, model.config.vocab_size), model)
    plan = list(_plan(model, quant))
    for name, shape, kind, _ in plan:
        size = _bytes(shape, kind)
        writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (stream,) = writer.fout
    written = 0
    try:
        for name, shape, kind, rows in plan:
            writer.write_padding(stream, stream.tell())
            before = stream.tell()
            for part in rows():
                data = gguf.quants.quantize(part, kind)
                if kind == Type.F16 and not numpy.isfinite(data).all():
                    raise ExportError(f"{name} contains a number that is not finite in float16", fix="--quant Q8_0")
                stream.write(numpy.ascontiguousarray(data).data)
                written += part.size
                done(written)
            size = _bytes(shape, kind)
            assert stream.tell() - before == size, name
            writer.write_padding(stream, size)
    finally:
        writer.close()


Rows = Callable[[], Iterator[numpy.ndarray]]


def _plan(model: MergedModel, quant: str) -> Iterator[tuple[str, tuple[int, ...], Type, Rows]]:
    """For each tensor: its name in GGUF, its shape, its storage type, and a function that returns its rows."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    factors = rope_factors(model.config)
    if factors is not None:
        yield "rope_freqs.weight", tuple(factors.shape), Type.F32, lambda: iter([factors.numpy()])
    for spec in model.merge.specs():
        name = names.get_name(spec.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"GGUF's Llama format has no tensor {spec.name}", fix="--to merged")
        yield name, spec.shape, _type_of(spec.name, spec.shape, quant), _rows(model, spec.name)


def _rows(model: MergedModel, name: str) -> Rows:
    """A tensor's rows in float32; those of q and k in llama.cpp's order."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    count = next((number for part, number in heads.items() if f".{part}." in name), None)

    def plain() -> Iterator[numpy.ndarray]:
        return (rows.numpy() for rows in model.merge.slices(name))

    def permuted() -> Iterator[numpy.ndarray]:
        assert count is not None
        yield interleave(torch.cat(list(model.merge.slices(name))), count).numpy()

    return plain if count is None else permuted


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in GGUF's order for RoPE: the two halves of a head, which Transformers rotates together, alternate.

    Args:
        weight: (heads * head_dim, in), or a bias (heads * head_dim,).
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _type_of(name: str, shape: tuple[int, ...], quant: str) -> Type:
    """The storage type: norms stay float32; in Q4_0, embedding and head are Q8_0, since 4 bits cost most there."""
    if len(shape) == 1:
        return Type.F32
    if quant == "F16" or shape[-1] % BLOCK:
        return Type.F16
    return Type.Q8_0 if quant == "Q8_0" or name in (EMBEDDING, HEAD) else Type.Q4_0


def _bytes(shape: tuple[int, ...], kind: Type) -> int:
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(numbers) * int(size)


def _describe(writer: gguf.GGUFWriter, model: MergedModel, quant: str) -> None:
    config = model.config
    writer.add_type("model")
    writer.add_name(model.name)
    if model.licence is not None:
        writer.add_license(model.licence)
    if model.licence_link is not None:
        writer.add_license_link(model.licence_link)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, model.base)
    shape = ModelShape.from_config(config.to_dict())
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    if shape.head_size * shape.heads != shape.hidden:
        writer.add_key_length(shape.head_size)
        writer.add_value_length(shape.head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_rope_dimension_count(shape.head_size)
    _describe_rope(writer, config.rope_parameters)


def _describe_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    scaling = SCALINGS.get(rope["rope_type"])
    if scaling is None:
        return
    writer.add_rope_scaling_type(scaling)
    writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _check_rope(config: PretrainedConfig) -> None:
    kind = config.rope_parameters["rope_type"]
    if kind not in ("default", "llama3", *SCALINGS):
        raise ExportError(
            f"llama.cpp does not support RoPE scaling of type {kind}", fix="--to merged, which keeps it unchanged"
        )
    odd = [f"{name}={value}" for name, value in config.rope_parameters.items() if value != YARN.get(name, value)]
    if kind == "yarn" and odd:
        raise ExportError(
            f"GGUF export supports YaRN only with its paper's values, not with {', '.join(odd)}",
            fix="--to merged, which keeps it unchanged",
        )


def rope_factors(config: PretrainedConfig) -> torch.Tensor | None:
    """Llama 3's scaling as the divisor of each frequency, (head size / 2,) float32; None for other kinds."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config.to_dict())
    steps = torch.arange(0, size, 2, dtype=torch.float32) / size
    factors: torch.Tensor = 1.0 / config.rope_parameters["rope_theta"] ** steps / scaled
    return factors.float()


def _describe_tokens(writer: gguf.GGUFWriter, vocabulary: Vocabulary, model: MergedModel) -> None:
    tokenizer = model.tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    named = (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, model.end_id if model.end_id != tokenizer.eos_token_id else None),
    )
    for add, number in named:
        if number is not None:
            add(number)
    # Servers put BOS before a prompt if the file says so. A template without BOS was trained without it.
    begins = between(tokenizer, model.template, ["user"])
    writer.add_add_bos_token(vocabulary.add_bos and (begins is None or begins[0].startswith(tokenizer.bos_token)))
    writer.add_add_eos_token(False)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_chat_template(model.template)
