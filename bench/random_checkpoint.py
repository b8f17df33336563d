"""Checkpoints of known shapes in NF4 with double quantisation and random weights, written layer by layer.

    python -m bench.random_checkpoint DIR TOKENIZER llama-2-7b [llama-2-70b ...]

Memory and speed do not depend on the values. Positions go to 200,000, so that rows of any length can be measured. Nothing but one
layer is ever in memory; a 70B takes 36 GB of the folder's disk.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from collections.abc import Iterator

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file

from bench.random_model import config_of, random
from nybble.plan.known_models import KNOWN
from nybble.plan.shapes import ModelShape

PARENTS = {
    "q": "self_attn",
    "k": "self_attn",
    "v": "self_attn",
    "o": "self_attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}
STORAGE = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write(folder: pathlib.Path, shape: ModelShape, tokenizer: pathlib.Path) -> None:
    """Write a checkpoint, unless it exists."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards(shape, device)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    copy_tokenizer(tokenizer, folder)
    config = config_of(shape)
    config.architectures, config.quantization_config = ["LlamaForCausalLM"], STORAGE
    config.save_pretrained(folder)  # last: it marks the checkpoint as whole


def shards(shape: ModelShape, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors by name: embedding and head, then each layer's."""
    first = {"model.embed_tokens.weight": random(shape.vocabulary, shape.hidden, device=device).cpu()}
    first["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    if not shape.tied:
        first["lm_head.weight"] = random(shape.vocabulary, shape.hidden, device=device).cpu()
    yield first
    for number in range(shape.layers):
        start = f"model.layers.{number}."
        tensors = {
            f"{start}{norm}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, projection in shape.projections.items():
            parent = PARENTS[name.removesuffix("_proj")]
            weight = random(projection.outputs, projection.inputs, device=device)
            codes, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            tensors[f"{start}{parent}.{name}.weight"] = codes.cpu()
            for part, tensor in state.as_dict(packed=True).items():
                tensors[f"{start}{parent}.{name}.weight.{part}"] = tensor.cpu()
        yield tensors


def copy_tokenizer(tokenizer: pathlib.Path, folder: pathlib.Path) -> None:
    """Copy the tokenizer's files, with a chat template that adds nothing."""
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}, indent=1))


if __name__ == "__main__":
    if len(sys.argv) < 4 or not set(sys.argv[3:]) <= set(KNOWN):
        sys.exit(__doc__)
    for model in sys.argv[3:]:
        write(pathlib.Path(sys.argv[1]) / model, KNOWN[model].shape, pathlib.Path(sys.argv[2]))
