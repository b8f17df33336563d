"""Compiles every kernel from Turing to Hopper, those for fp8 from Ada on, without a card: `python tests/compile_kernels.py`."""

from __future__ import annotations

import importlib

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Argument types by name where they are not 32-bit integers; "half" is the card's 16-bit type.
POINTERS = {
    "packed": "*u8", "code": "*fp32", "nested_code": "*fp32", "nested_absmax": "*fp32", "offset": "*fp32",
    **{f"{letter}{n}": "*fp32" for letter in "ab" for n in range(3)}, **{f"scaling{n}": "fp32" for n in range(3)},
    "losses": "*fp32", "targets": "*i64", "eps": "fp32",
    **dict.fromkeys(
        ("out", "to_up", "to_down", "source", "wide", "x", "update", "weight", "total", "gradient", "residual", "qkv",
         "cosine", "sine", "query", "key", "value", "gate_up", "logits"), "half"),
    "values": "*fp8e4nv", "scales": "*fp32", "factor": "fp32",
}  # fmt: skip
UNSCALED = {"SCALED": False}
NO_VALUES = {"values": "half", "scales": "half"}  # the result itself is passed
KERNELS = [
    ("dequantize", "_dequantize", {"COLUMNS": 4096, "BLOCKSIZE": 64, "NESTED": 256, "BLOCKS": 64}, {"absmax": "*u8"}),
    ("dequantize", "_dequantize", {"COLUMNS": 4096, "BLOCKSIZE": 64, "NESTED": 0, "BLOCKS": 64}, {"absmax": "*fp32"}),
    ("adapters", "_pack", {"RANK": 64, "ROWS": 32, "COLUMNS": 512, "TRACK": False}, {"largest": "half"}),
    ("rms_norm", "_forward", {"ADD": True, "BLOCK": 4096, **UNSCALED}, NO_VALUES),
    ("rms_norm", "_forward", {"ADD": False, "BLOCK": 4096, **UNSCALED}, NO_VALUES),
    ("rms_norm", "_backward", {"ADD": True, "BLOCK": 4096, **UNSCALED}, NO_VALUES),
    ("rope", "_forward", {"HEAD": 96, "HALF": 64, "HEADS": 32}, {}),
    ("rope", "_backward", {"HEAD": 96, "HALF": 64, "HEADS": 32, **UNSCALED}, NO_VALUES),
    ("swiglu", "_forward", {"BLOCK": 1024}, {}),
    ("swiglu", "_backward", {"BLOCK": 1024}, {}),
    ("cross_entropy", "_cross_entropy", {"BLOCK": 4096}, {}),
]
TRANSPOSED = {"ROWS": 128, "COLUMNS": 128}
FP8_KERNELS = [
    ("dequantize", "_dequantize", {"COLUMNS": 4096, "BLOCKSIZE": 64, "NESTED": 256, "BLOCKS": 64},
     {"absmax": "*u8", "out": "*fp8e4nv"}),
    ("dequantize", "_dequantize_transposed", {"BLOCKSIZE": 64, "NESTED": 256, "SPAN": 64, **TRANSPOSED},
     {"absmax": "*u8", "out": "*fp8e4nv"}),
    ("dequantize", "_dequantize_transposed", {"BLOCKSIZE": 4096, "NESTED": 0, "SPAN": 128, **TRANSPOSED},
     {"absmax": "*fp32", "out": "*fp8e4nv"}),
    ("scaled", "_quantize", {"BLOCK": 4096}, {}),
    ("adapters", "_pack", {"RANK": 64, "ROWS": 32, "COLUMNS": 512, "TRACK": True}, {"largest": "*i32"}),
    ("scaled", "_split", {"IS_RIGHT": False, "ROWS": 64, "COLUMNS": 64}, {"out": "*fp8e4nv", "largest": "*i32", "factor": "i32"}),
    ("scaled", "_split", {"IS_RIGHT": True, "ROWS": 64, "COLUMNS": 64},
     {"out": "*fp8e4nv", "largest": "*i32", "scales": "*i32", "factor": "i32"}),
    ("rms_norm", "_forward", {"ADD": True, "BLOCK": 4096, "SCALED": True}, {}),
    ("rms_norm", "_backward", {"ADD": True, "BLOCK": 4096, "SCALED": True}, {}),
    ("rope", "_backward", {"HEAD": 128, "HALF": 64, "HEADS": 32, "SCALED": True}, {}),
    ("swiglu", "_forward_scaled", {"BLOCK": 2048}, {}),
    ("swiglu", "_backward_scaled", {"BLOCK": 2048}, {}),
]  # fmt: skip
TARGETS = ((75, "*fp16", KERNELS), (80, "*bf16", KERNELS), (90, "*bf16", [*KERNELS, *FP8_KERNELS]),
           (89, "*bf16", FP8_KERNELS))  # fmt: skip


def main() -> None:
    """One line a kernel and card."""
    for capability, half, kernels in TARGETS:
        for file, name, constants, types in kernels:
            kernel = getattr(importlib.import_module(f"nybble.kernels.triton.{file}"), name)
            kinds = {**POINTERS, **types}
            signature = {
                word: "constexpr" if word in constants else kinds.get(word, "i32").replace("half", half)
                for word in kernel.arg_names
            }
            places = {(kernel.arg_names.index(word),): value for word, value in constants.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=places)
            done = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            print(f"sm_{capability} {file}.{name}: {len(done.asm['ptx'])} bytes of PTX")


if __name__ == "__main__":
    main()
