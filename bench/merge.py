"""Merging a checkpoint of the Llama-2-7B shape: peak of anonymous memory, seconds, sizes.

    python -m bench.merge FOLDER [key=value ...]

This makes in FOLDER a random 16-bit checkpoint in shards of 5 GB, its NF4 copy with double quantisation as bitsandbytes
saves it, and a random adapter of rank 16 on all linear layers (18 GB in all; /dev/shm is fine). It merges both bases one
after the other, each in a process of its own, deletes the merged models, and prints one JSON line. key=value changes the
shape, for example num_hidden_layers=80. Peaks are RssAnon of /proc/self/status, memory without a file behind it, sampled
every 5 ms while merging. The values repeat from layer to layer; memory and time do not depend on them.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from nybble.export.merge.merge import Dequantised, Merge, Original
from nybble.export.merge.shards import Spec, write_shards
from nybble.export.merge.updates import PREFIX, read_updates
from nybble.plan.shapes import ModelShape

LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 32, "vocab_size": 32000}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 16
INTERVAL = 0.005  # seconds between samples


class PeakAnon:
    """The largest anonymous memory of this process within a `with` block, and the memory before it, in bytes."""

    def __enter__(self) -> Self:
        self.before = self.bytes = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon"))


def make_checkpoint(folder: pathlib.Path, shape: Mapping[str, int]) -> int:
    """Write FOLDER/base, FOLDER/nf4 and FOLDER/adapter; returns the bytes of the first."""
    linears = _linears(shape)
    torch.manual_seed(0)
    values = {size: torch.randn(size).mul_(0.02).bfloat16() for size in set(linears.values())}
    packed = {size: _packed(value) for size, value in values.items()}
    ends = (shape["vocab_size"], shape["hidden_size"])
    plain = {
        "model.embed_tokens.weight": torch.randn(ends).mul_(0.02).bfloat16(),
        "model.norm.weight": torch.ones(ends[1]).bfloat16(),
    }
    plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
    for number in range(shape["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{number}.{norm}.weight"] = plain["model.norm.weight"]
    _save(folder / "base", {**plain, **{f"{name}.weight": values[size] for name, size in linears.items()}}, shape)
    parts = {f"{name}.weight{end}": part for name, size in linears.items() for end, part in packed[size].items()}
    _save(folder / "nf4", {**plain, **parts}, shape)
    adapter = folder / "adapter"
    adapter.mkdir()
    LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM").save_pretrained(adapter)
    halves = {
        f"{PREFIX}{name}.lora_{half}.weight": torch.randn((RANK, columns) if half == "A" else (rows, RANK)) * 0.01
        for name, (rows, columns) in linears.items()
        for half in "AB"
    }
    save_file(halves, adapter / "adapter_model.safetensors")
    return sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))


def _linears(shape: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Each linear layer's name and (out, in)."""
    sizes = ModelShape.from_config(shape)
    return {
        f"model.layers.{n}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}": (outputs, inputs)
        for n in range(sizes.layers)
        for name, (inputs, outputs) in sizes.projections.items()
    }


def _packed(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in NF4, as bitsandbytes saves it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, state = bnb.quantize_4bit(value.to(device), quant_type="nf4", compress_statistics=True)
    return {"": data.cpu(), **{f".{name}": part.cpu() for name, part in state.as_dict(packed=True).items()}}


def _save(folder: pathlib.Path, tensors: Mapping[str, torch.Tensor], shape: Mapping[str, int]) -> None:
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **shape}
    (folder / "config.json").write_text(json.dumps(config))
    specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_shards(folder, specs, lambda name: iter([tensors[name]]), lambda done: None)


def merge_one(folder: pathlib.Path, base: str) -> dict[str, Any]:
    """Merge one base and delete the result; run in a process of its own."""
    weights = Original(folder / "base") if base == "original" else Dequantised(folder / "nf4")
    merge = Merge(weights, read_updates(folder / "adapter"), False, torch.bfloat16)
    out = folder / "merged"
    out.mkdir()
    began = time.perf_counter()
    with PeakAnon() as peak:
        write_shards(out, merge.specs(), merge.stored, lambda done: None)
    files = [file.stat().st_size for file in out.glob("*.safetensors")]
    shutil.rmtree(out)
    return {
        "base": base,
        "peak_anonymous_gb": round(peak.bytes / 1e9, 3),
        "before_gb": round(peak.before / 1e9, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "written_gb": round(sum(files) / 1e9, 2),
        "files": len(files),
        "largest_file_gb": round(max(files) / 1e9, 2),
    }


def measure(folder: pathlib.Path, shape: Mapping[str, int]) -> dict[str, Any]:
    """Make the checkpoint unless it exists, and merge it twice."""
    if not (folder / "adapter" / "adapter_model.safetensors").exists():
        make_checkpoint(folder, shape)
    rows = [_child(folder, base) for base in ("original", "dequantised")]
    read = {
        part: sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")) for part in ("base", "nf4")
    }
    return {
        "shape": dict(shape),
        "read_gb": {part: round(size / 1e9, 2) for part, size in read.items()},
        "merges": rows,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _child(folder: pathlib.Path, base: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.merge", str(folder), f"merge={base}"]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def main(arguments: list[str]) -> None:
    """Parse and print."""
    if not arguments or "=" in arguments[0]:
        sys.exit(__doc__)
    folder, options = pathlib.Path(arguments[0]), dict(_pairs(arguments[1:]))
    if base := options.pop("merge", None):
        print(json.dumps(merge_one(folder, base)))
        return
    shape = {**LLAMA2_7B, **{key: int(value) for key, value in options.items()}}
    print(json.dumps(measure(folder, shape)))


def _pairs(options: list[str]) -> Iterator[tuple[str, str]]:
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in (*LLAMA2_7B, "merge"):
            sys.exit(f"{option!r}: the options of the shape are {', '.join(LLAMA2_7B)}, as key=value")
        yield key, value


if __name__ == "__main__":
    main(sys.argv[1:])
