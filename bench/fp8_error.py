"""How far fp8's gradients are from float32's, part by part: which projections and layers lose most.

    nybble demo --weights MODEL
    python -m bench.fp8_error MODEL DATA.jsonl [--rows 8] [--length 512] [--steps 30] [--json FILE]

The adapter is trained for some steps first: at the start B is zero, and A has no gradient. Then a batch of other rows
is computed by the same NF4 base and adapter in float32, in the compute type, and in fp8 with parts in 16 bits. On a CPU fp8 is
computed by its reference, whose rows are exact in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer

from nybble.engine.compute import Fp8, Fp8Choice
from nybble.engine.fuse import attach, fuse
from nybble.model.adapter.lora import attach_adapter
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.recipe import LoraOptions, ModelOptions

RATE = 3e-3


def parts(layers: int) -> dict[str, Fp8 | None]:
    """What is compared, by name."""
    ends = ("layers.0", f"layers.{layers - 1}")
    return {
        "the compute type": None,
        "fp8": Fp8(),
        "fp8, fast sums in backward too": Fp8((), (True, True)),
        "fp8, slow sums": Fp8((), (False, False)),
        "fp8 but down_proj": Fp8(("down_proj",)),
        "fp8 but gate_proj, up_proj": Fp8(("gate_proj",)),
        "fp8 but q_proj, k_proj, v_proj": Fp8(("q_proj",)),
        "fp8 but o_proj": Fp8(("o_proj",)),
        "fp8 but the first layer": Fp8(ends[:1]),
        "fp8 but the last layer": Fp8(ends[1:]),
        "fp8 but first and last layer": Fp8(ends),
    }


def load(folder: pathlib.Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The base in NF4 with an adapter of rank 16 on all linear layers."""
    with tempfile.TemporaryDirectory() as cache:
        checkpoint = find_checkpoint(str(folder))
        base = load_base(checkpoint, ModelOptions(path=str(folder)), dtype, device, pathlib.Path(cache)).model
    torch.manual_seed(0)
    return attach_adapter(base, LoraOptions(r=16, alpha=32)).train()


def batches(folder: pathlib.Path, data: pathlib.Path, rows: int, length: int, device: torch.device) -> Any:
    """Batches of blocks of one length from real text, without end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["\n".join(str(value) for value in json.loads(line).values()) for line in data.open()]
    ids = list(itertools.chain.from_iterable(tokenizer(texts[:4000])["input_ids"]))
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    for start in itertools.count():
        chosen = torch.arange(start * rows, (start + 1) * rows) % len(blocks)
        yield {"input_ids": blocks[chosen].to(device), "labels": blocks[chosen].to(device)}


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss in nats, and the gradient of every adapter tensor in float32."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def compared(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[float, float, str]:
    """Cosine of all gradients together, the lowest of one tensor, and its name."""
    whole = [torch.cat([side[name].flatten() for name in exact]).double() for side in (found, exact)]
    single = {
        name: torch.cosine_similarity(found[name].flatten().double(), exact[name].flatten().double(), dim=0).item()
        for name in exact
    }
    worst = min(single, key=single.__getitem__)
    name = ".".join(part for part in worst.split(".") if part not in ("base_model", "model", "default", "weight"))
    return torch.cosine_similarity(*whole, dim=0).item(), single[worst], name


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = batches(given.model, given.data, given.rows, given.length, device)
    model = fuse(load(given.model, dtype, device))
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    for _ in range(given.steps):
        gradients(model, next(source))
        optimizer.step()
    batch = next(source)
    exact_model = load(given.model, torch.float32, device)
    exact_model.load_state_dict(
        {name: part for name, part in model.state_dict().items() if "lora_" in name}, strict=False
    )
    loss, exact = gradients(fuse(exact_model), batch)
    del exact_model
    print(
        f"loss {loss:.4f} nats in float32, after {given.steps} steps; {given.rows} x {given.length} tokens on {device.type}"
    )
    print("| computed in | loss minus float32's | cosine of all gradients | lowest of one tensor | which |")
    print("| --- | --- | --- | --- | --- |")
    results = []
    for name, fp8 in parts(model.config.num_hidden_layers).items():
        attach(model, "auto", "device", None, Fp8Choice(fp8))
        found_loss, found = gradients(model, batch)
        whole, worst, which = compared(found, exact)
        results.append({"name": name, "loss": found_loss - loss, "cosine": whole, "worst": worst, "which": which})
        print(f"| {name} | {found_loss - loss:+.5f} | {whole:.5f} | {worst:.5f} | {which} |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
