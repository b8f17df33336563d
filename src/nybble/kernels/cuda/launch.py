"""Loading compiled kernels and launching them on torch's streams, through CUDA's driver API."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from cuda.bindings import driver

DEPENDENT_FROM = 90  # compute capability times ten: programmatic dependent launch


class CudaKernel:
    """One kernel on the current device.

    Args:
        code: machine code that holds it.
        name: of the kernel.
        shared_bytes: dynamic shared memory of a block.
        dependent: whether it may start while the kernel before it still runs; its code waits where it must.
    """

    def __init__(self, code: bytes, name: str, *, shared_bytes: int = 0, dependent: bool) -> None:
        self._library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = _checked(driver.cuLibraryGetKernel(self._library, name.encode()))
        if shared_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = _checked(driver.cuDeviceGet(torch.cuda.current_device()))
            _checked(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, device))
        self._function = driver.CUfunction(int(kernel))
        self._shared_bytes = shared_bytes
        self._attributes: list[Any] = []
        if dependent:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            value = driver.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attribute.value = value
            self._attributes.append(attribute)

    def __call__(self, grid: tuple[int, int, int], threads: int, argument: ctypes.Structure) -> None:
        """Launch on torch's current stream.

        Args:
            grid: blocks.
            threads: of a block.
            argument: the kernel's one argument; tensors that it points to live as long as the stream needs them.
        """
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        config.attrs, config.numAttrs = self._attributes, len(self._attributes)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(_checked(driver.cuDeviceGetAttribute(attribute, _checked(driver.cuDeviceGet(index)))))


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA failed: {status.name}")
    return values[0] if values else None
