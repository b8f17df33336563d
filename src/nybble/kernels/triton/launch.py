"""Launching compiled kernels without Triton's own look-ups, which cost more than small batches leave time for.

`kernel[grid](...)` binds, specialises and looks up anew at every launch: 22 to 36 us on an H200's host, where a step of
1 x 2048 tokens makes a thousand launches and computes for 115 ms (docs/benchmarks.md). The shortcut is Triton's own last call,
which it does not promise: with a version that was not tested, kernels are launched in Triton's way.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import driver

from nybble.couplings.check import is_tested

REMEMBERED = 4096  # plans a kernel; lengths vary, so they are not without end


class Launcher:
    """A kernel, and its compiled forms by everything that Triton specialises for.

    Integers count by value, which is finer than Triton's own key; tensors by type, device and alignment to 16 bytes.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self.options = options
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch with all arguments in order, compile-time constants included."""
        key = tuple(
            [
                (each.dtype, each.get_device(), each.data_ptr() & 15) if isinstance(each, torch.Tensor) else each
                for each in arguments
            ]
        )
        known = self._compiled.get(key)
        if known is not None:
            run, function, metadata = known
            device = driver.active
            stream = device.get_current_stream(device.get_current_device())
            first, second, third = (*grid, 1, 1)[:3]
            # What JITFunction.run does at its end, without hooks.
            run(first, second, third, stream, function, metadata, None, None, None, *arguments)
            return
        compiled = self.kernel[grid](*arguments, **self.options)
        if compiled is not None and is_tested("triton"):  # Triton's interpreter compiles nothing
            if len(self._compiled) >= REMEMBERED:
                self._compiled.clear()
            self._compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)


def blocks_of(length: int, size: int) -> int:
    """How many blocks of a size cover a length. Triton's own cdiv and next_power_of_2 are compile-time objects, 2.6 us a call
    on the host, where a step of 1 x 2048 tokens makes 1,700."""
    return -(-length // size)


def power_of_two(length: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (length - 1).bit_length()
