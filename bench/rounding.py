"""What rounding the operands of the frozen products to 8 bits costs, operand by operand: the error of the loss and of gradients.

    nybble demo --weights MODEL
    python -m bench.rounding MODEL DATA.jsonl [--rows 2] [--length 256] [--steps 6]

Inputs x, weights W and output gradients dY are rounded and multiplied in float32; adapters are not rounded. e4m3 has a power of
two for each row of x and dY, and one for all weights of a group. int8 has a scale for each row. "rotated" multiplies blocks of
64 numbers with a Hadamard matrix first, which leaves the product as it is and spreads outliers (Ashkboos et al. 2024, QuaRot).
A row's rounding of W is along its inputs, forward and backward.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable
from unittest import mock

import torch

from bench.fp8_error import RATE, batches, compared, gradients, load
from nybble.engine import layer
from nybble.engine.fuse import fuse
from nybble.engine.product import AugmentedProduct, SavedRanks
from nybble.kernels.scaled import E4M3, ScaledRows, quantize_rows

BLOCK = 64  # numbers that are rotated together
Rounding = Callable[[torch.Tensor], torch.Tensor]


def as_it_is(matrix: torch.Tensor) -> torch.Tensor:
    """Not rounded."""
    return matrix


def e4m3_rows(matrix: torch.Tensor) -> torch.Tensor:
    """A power of two for each row."""
    rows = ScaledRows(matrix, torch.empty(matrix.shape, dtype=E4M3), torch.empty(len(matrix), 1))
    quantize_rows(rows)
    return rows.values.float() * rows.scales


def e4m3_whole(matrix: torch.Tensor) -> torch.Tensor:
    """One power of two."""
    factor = 2.0 ** (5 - math.frexp(matrix.abs().max().item())[1])
    return (matrix * factor).to(E4M3).float() / factor


def int8_rows(matrix: torch.Tensor) -> torch.Tensor:
    """A scale for each row."""
    scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (matrix / scale).round() * scale


def int8_rotated(matrix: torch.Tensor) -> torch.Tensor:
    """The same after a rotation, which is undone here."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < BLOCK:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)], 0)
    hadamard = hadamard / BLOCK**0.5

    def rotated(numbers: torch.Tensor) -> torch.Tensor:
        return (numbers.reshape(len(numbers), -1, BLOCK) @ hadamard).reshape(numbers.shape)

    return rotated(int8_rows(rotated(matrix)))


CASES: list[tuple[str, Rounding, Rounding, Rounding]] = [
    ("x in e4m3", e4m3_rows, as_it_is, as_it_is),
    ("W in e4m3", as_it_is, e4m3_whole, as_it_is),
    ("dY in e4m3", as_it_is, as_it_is, e4m3_rows),
    ("all in e4m3", e4m3_rows, e4m3_whole, e4m3_rows),
    ("x in int8", int8_rows, as_it_is, as_it_is),
    ("W in int8", as_it_is, int8_rows, as_it_is),
    ("x in int8, rotated", int8_rotated, as_it_is, as_it_is),
    ("x and W in int8, rotated; dY in e4m3", int8_rotated, int8_rotated, e4m3_rows),
    ("all in int8, rotated", int8_rotated, int8_rotated, int8_rotated),
]


def rounded_product(x: Rounding, w: Rounding, dy: Rounding) -> type[AugmentedProduct]:
    """A product whose frozen part multiplies rounded operands."""

    class Rounded(AugmentedProduct):
        __slots__ = ()

        def forward(
            self,
            buffer: torch.Tensor,
            rows: slice,
            out_mn: torch.Tensor,
            saved: SavedRanks | None,
            add_mn: torch.Tensor | None = None,
        ) -> None:
            matrix = self._matrix()
            self._fill_ranks(buffer, rows, matrix, saved)
            inputs, ranks = buffer[:, : matrix.inputs].contiguous(), buffer[:, matrix.inputs :]
            result = x(inputs) @ w(matrix.weights).t() + ranks @ matrix.up.t()
            out_mn.copy_(result if add_mn is None else result + add_mn)

        def input_gradient(self, buffer: torch.Tensor, rows: slice, out_mk: torch.Tensor | None) -> None:
            matrix = self._matrix()
            gradient, ranks = buffer[:, : matrix.outputs].contiguous(), buffer[:, matrix.outputs :]
            torch.mm(gradient, matrix.up, out=ranks)
            if out_mk is not None:
                out_mk.copy_(dy(gradient) @ w(matrix.weights) + ranks @ matrix.down)

    return Rounded


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    device = torch.device("cpu")
    source = batches(given.model, given.data, given.rows, given.length, device)
    model = fuse(load(given.model, torch.float32, device))
    optimizer = torch.optim.AdamW(
        [part for part in model.parameters() if part.requires_grad], lr=RATE, weight_decay=0.0
    )
    for _ in range(given.steps):
        gradients(model, next(source))
        optimizer.step()
    batch = next(source)
    fuse(model, "keep-all")
    loss, exact = gradients(model, batch)
    print(f"loss {loss:.4f} nats, after {given.steps} steps; {given.rows} x {given.length} tokens", flush=True)
    print("| rounded | loss minus float32's | cosine of all gradients | lowest of one tensor | which |")
    print("| --- | --- | --- | --- | --- |")
    for name, *roundings in CASES:
        with mock.patch.object(layer, "AugmentedProduct", rounded_product(*roundings)):
            found_loss, found = gradients(model, batch)
        whole, worst, which = compared(found, exact)
        print(f"| {name} | {found_loss - loss:+.5f} | {whole:.4f} | {worst:.3f} | {which} |", flush=True)


if __name__ == "__main__":
    main()
