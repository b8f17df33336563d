"""The kernels' arguments, as the structures of the .cu files lay them out."""

from __future__ import annotations

import ctypes

import torch

Pointer = ctypes.c_void_p


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


class Adapter(ctypes.Structure):
    """common.cuh: one adapter of one projection."""

    _fields_ = (
        ("b", Pointer), ("column", ctypes.c_int), ("rank", ctypes.c_int), ("scale", ctypes.c_float),
        ("unused", ctypes.c_int),
    )  # fmt: skip


class Parts(ctypes.Structure):
    """common.cuh: the output of a product."""

    _fields_ = (
        ("data", Pointer), ("chunks", ctypes.c_int), ("columns", ctypes.c_int), ("chunk_stride", ctypes.c_uint64),
    )  # fmt: skip


MAX_ADAPTERS = 16


def adapters_of(projections: int) -> type[ctypes.Structure]:
    """common.cuh: adapters of a group of projections, those of one adapter side by side, and each row's."""

    class Adapters(ctypes.Structure):
        _fields_ = (
            ("table", Adapter * (MAX_ADAPTERS * projections)), ("rows", Pointer), ("unused", ctypes.c_uint64),
        )  # fmt: skip

    return Adapters


class Weight(ctypes.Structure):
    """product.cu: one projection."""

    _fields_ = (
        ("codes", Pointer), ("scales", Pointer), ("scales2", Pointer), ("offset", Pointer), ("rows", ctypes.c_int),
        ("first_slab", ctypes.c_int), ("column", ctypes.c_int), ("unused", ctypes.c_int),
    )  # fmt: skip


class ProductArguments(ctypes.Structure):
    """product.cu."""

    _fields_ = (
        ("weights", Weight * 3), ("code", Pointer), ("code2", Pointer), ("below", Pointer), ("x", Pointer),
        ("squares", Pointer), ("y", Pointer), ("t", Pointer), ("chunk_stride", ctypes.c_uint64),
        ("quantised_slabs", ctypes.c_int), ("below_slabs", ctypes.c_int), ("m", ctypes.c_int), ("blocks", ctypes.c_int),
        ("chunks", ctypes.c_int), ("chunk_blocks", ctypes.c_int), ("columns", ctypes.c_int), ("square_parts", ctypes.c_int),
        ("eps", ctypes.c_float), ("unused", ctypes.c_int),
    )  # fmt: skip


class AddNormArguments(ctypes.Structure):
    """elementwise.cu."""

    _fields_ = (
        ("residual", Pointer), ("parts", Parts), ("ranks", Parts), ("weight", Pointer), ("out", Pointer),
        ("squares", Pointer), ("h", ctypes.c_int), ("m", ctypes.c_int), ("adapters", adapters_of(1)),
    )  # fmt: skip


class SwiGluArguments(ctypes.Structure):
    """elementwise.cu."""

    _fields_ = (
        ("parts", Parts), ("ranks", Parts), ("out", Pointer), ("width", ctypes.c_int), ("m", ctypes.c_int),
        ("adapters", adapters_of(2)),
    )  # fmt: skip


class AttentionArguments(ctypes.Structure):
    """attention.cu."""

    _fields_ = (
        ("parts", Parts), ("ranks", Parts), ("positions", Pointer), ("pages", Pointer), ("keys", Pointer),
        ("values", Pointer), ("cosine", Pointer), ("sine", Pointer), ("out", Pointer), ("partial", Pointer),
        ("counts", Pointer), ("max_pages", ctypes.c_int), ("kv_heads", ctypes.c_int), ("scale", ctypes.c_float),
        ("unused", ctypes.c_int), ("adapters", adapters_of(3)),
    )  # fmt: skip
