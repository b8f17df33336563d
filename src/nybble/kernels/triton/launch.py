"""Launching compiled kernels without Triton's own look-ups, which take too long for small batches.

`kernel[grid](...)` binds, specialises and looks up the kernel at every launch: 22 to 36 us on an H200's host, where a step of
1 x 2048 tokens makes a thousand launches and computes for 115 ms (docs/benchmarks.md). The shortcut is the last call that Triton
itself makes, which is not a public interface: with an untested version, kernels are launched in the ordinary way.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import driver

from nybble.couplings.check import is_tested

MAX_COMPILED = 4096  # entries per kernel; lengths vary, so the cache needs a limit


class Launcher:
    """Launches a kernel, and caches its compiled forms by everything that Triton specialises for.

    The key has the value of each integer, which is finer than Triton's own key, and type, device and alignment to 16 bytes of
    each tensor.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self.options = options
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch with all arguments in order, compile-time constants included, on the device of the first of them.

        Triton launches on the current device, which is another one in a script that loads its model with device_map={"": 1}: the
        kernel would read what that device cannot reach.
        """
        index = arguments[0].get_device()
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self(grid, *arguments)
            return
        key = tuple(
            [
                (each.dtype, each.get_device(), each.data_ptr() & 15) if isinstance(each, torch.Tensor) else each
                for each in arguments
            ]
        )
        cached = self._compiled.get(key)
        if cached is not None:
            run, function, metadata = cached
            device = driver.active
            stream = device.get_current_stream(device.get_current_device())
            first, second, third = (*grid, 1, 1)[:3]
            # What JITFunction.run does at the end, without hooks.
            run(first, second, third, stream, function, metadata, None, None, None, *arguments)
            return
        compiled = self.kernel[grid](*arguments, **self.options)
        if compiled is not None and is_tested("triton"):  # Triton's interpreter compiles nothing
            if len(self._compiled) >= MAX_COMPILED:
                self._compiled.clear()
            self._compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)


def blocks_of(length: int, size: int) -> int:
    """How many blocks of a size cover a length.

    Triton's own cdiv and next_power_of_2 are compile-time objects, 2.6 us per call on the host, where a step of 1 x 2048 tokens
    makes 1,700 calls.
    """
    return -(-length // size)


def power_of_two(length: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (length - 1).bit_length()
