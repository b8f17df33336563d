"""Models of known shapes in NF4 with double quantisation and random weights, made in host memory, layer by layer.

A 7B takes seconds and a 70B half a minute, and the GPU never has more than one weight of it.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nybble.plan.shapes import ModelShape

POSITIONS = 200_000  # so that rows of any length can be measured


def config_of(shape: ModelShape) -> LlamaConfig:
    """The configuration of a shape."""
    return LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, head_dim=shape.head_size,
        vocab_size=shape.vocabulary, max_position_embeddings=POSITIONS, rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tied, dtype=torch.bfloat16,
    )  # fmt: skip


def random_llama(shape: ModelShape, storage: torch.dtype = torch.uint8) -> LlamaForCausalLM:
    """A frozen model on the host; a GPU, if there is one, makes and quantises one weight at a time.

    Args:
        shape: of the model.
        storage: the type that the 4-bit bytes are stored as.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config_of(shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, _quantised(child.out_features, child.in_features, device, storage))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                is_norm = parameter.dim() == 1
                whole = torch.ones(parameter.shape) if is_norm else random(*parameter.shape, device=device)
                setattr(module, name, torch.nn.Parameter(whole.to("cpu", torch.bfloat16)))
    model.tie_weights()
    model.config.use_cache = False
    return model.requires_grad_(False)


def random(*sizes: int, device: str) -> torch.Tensor:
    """Normal with Llama's initial deviation, in bf16."""
    return torch.empty(*sizes, dtype=torch.bfloat16, device=device).normal_(std=0.02)


def _quantised(outputs: int, inputs: int, device: str, storage: torch.dtype) -> Linear4bit:
    codes, state = quantize_4bit(
        random(outputs, inputs, device=device), compress_statistics=True, quant_type="nf4", quant_storage=storage
    )
    new = Linear4bit(
        inputs,
        outputs,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=storage,
        device="meta",
    )
    stats = {part: tensor.cpu() for part, tensor in state.as_dict(packed=True).items()}
    new.weight = Params4bit.from_prequantized(codes.cpu(), stats, requires_grad=False, device="cpu", module=new)
    return new
