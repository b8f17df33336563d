"""Small quantised Llamas with adapters on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Of a model; `layers` and `vocabulary` do not matter to the kernels."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    layers: int = 2
    vocabulary: int = 512


def quantised_llama(shape: Shape, *, nested: bool = True, seed: int = 0, quantised: bool = True) -> LlamaForCausalLM:
    """A random model in NF4, its embedding, norms and head in bf16; all of it in bf16 where it is not quantised."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary, max_position_embeddings=4096, rms_norm_eps=1e-5, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.uniform_(0.5, 1.5)
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if quantised and isinstance(child, torch.nn.Linear):
                    setattr(parent, name, _quantised(child, nested))
    return model.requires_grad_(False)


def _quantised(layer: torch.nn.Linear, nested: bool) -> bitsandbytes.nn.Linear4bit:
    new = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    new.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data.cpu(), requires_grad=False, compress_statistics=nested, quant_type="nf4", module=new
    ).to("cuda")
    return new


def with_adapters(model: LlamaForCausalLM, adapters: dict[str, tuple[int, list[str]]]) -> PeftModel:
    """Adapters by name, of a rank and of these projections, with B that is not zero."""
    tuned = None
    for name, (rank, targets) in adapters.items():
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0)
        if tuned is None:
            tuned = get_peft_model(model, config, adapter_name=name)
        else:
            tuned.add_adapter(name, config)
    assert tuned is not None
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return tuned.eval()


def prefix_cache(model: PeftModel | LlamaForCausalLM, ids: torch.Tensor) -> DynamicCache:
    """Keys and values of a prompt, (1, tokens)."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache
