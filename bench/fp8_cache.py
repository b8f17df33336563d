"""What keys and values in e4m3 cost: nats per token of real text under SmolLM2-135M-Instruct, on a CPU.

    python -m bench.fp8_cache CHATS.jsonl [60]

Each text is computed in one pass, with keys and values as they are and rounded as the decoder's fp8 cache rounds them. One JSON
line: mean negative log-likelihood of both, and of the difference with its standard error over texts.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.demo.embedded import unpack
from nybble.files.paths import default_cache
from nybble.generate.decoder.layers import PlainLayers, attend_to
from nybble.generate.decoder.model import read_model

TOKENS = 768  # of a text, at most


def nats(layers: PlainLayers, ids: torch.Tensor, *, fp8: bool) -> torch.Tensor:
    """Negative log-likelihood of every token but the first, (tokens - 1,)."""

    def rounded(states: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(torch.float8_e4m3fn).max
        return states.clamp(-largest, largest).to(torch.float8_e4m3fn).to(states.dtype) if fp8 else states

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_to(q, rounded(k).transpose(0, 1), rounded(v).transpose(0, 1))

    residual = layers.run(ids, layers.rotary(slice(0, len(ids))), {None: slice(None)}, attend)
    return torch.nn.functional.cross_entropy(layers.logits(residual[:-1]), ids[1:], reduction="none")


def main(arguments: list[str]) -> None:
    """Measure."""
    if not arguments:
        sys.exit(__doc__)
    folder = unpack(default_cache() / "embedded" / "smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers = PlainLayers(read_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()))
    lines = pathlib.Path(arguments[0]).read_text().splitlines()[: int(arguments[1]) if arguments[1:] else 60]
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode():
        for line in lines:
            ids = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)[:TOKENS]
            tokens = torch.tensor(ids)
            rows.append((nats(layers, tokens, fp8=False), nats(layers, tokens, fp8=True)))
    plain, fp8 = (torch.cat([row[which] for row in rows]).mean().item() for which in (0, 1))
    costs = [float((after - before).mean()) for before, after in rows]
    print(json.dumps({
        "texts": len(rows), "tokens": sum(len(row[0]) for row in rows), "nats": round(plain, 4), "nats_fp8": round(fp8, 4),
        "cost": round(fp8 - plain, 5), "standard_error": round(statistics.stdev(costs) / len(costs) ** 0.5, 5),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
