"""Forward and backward of a fused decoder layer.

The layer is computed in two parts around attention: [norm, q, k, v, rotary positions] and [o, residual, norm, gate, up,
SwiGLU, down, residual]. Nothing in them looks at neighbouring tokens, so they run over tiles of tokens, and what passes by
does not grow with the batch. What is kept for backward is the policy's choice (`nybble.plan.policies`); the rest is
computed again, except down_proj, whose result backward does not need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from nybble.engine import graph
from nybble.engine.host import Handle
from nybble.engine.layer import GROUPS, Call, Kept, Ranks, Shared
from nybble.engine.linear import Sums, adapter_gradients, input_gradient, ranks_forward
from nybble.plan.policies import DROP_MLP, DROP_QKV, HOST, KEEP_ALL


class LayerFunction(torch.autograd.Function):
    """x (batch, length, h) to the layer's output of the same shape and type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Call, *parameters: torch.Tensor) -> torch.Tensor:
        """See `run`; `parameters` are `call.layer.parameters()`, there so that autograd knows of them."""
        policy = call.policy if any(ctx.needs_input_grad) else None
        x_mh = x.detach().contiguous().flatten(0, 1)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # no view: a hook may change it in place
        with _alone(x, call.batch.shared):
            kept = run(call, x_mh, y.flatten(0, 1), policy)
            if policy is not None:
                kept.x_mh = call.batch.shared.store.put(x_mh) if policy == HOST and x.is_cuda else x_mh
        ctx.call, ctx.kept = call, kept
        ctx.versions = [parameter._version for parameter in parameters] if policy is not None else []
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the parameters."""
        graph.refuse_second_derivatives()
        call, kept = ctx.call, ctx.kept
        if kept is None:
            raise RuntimeError(graph.FREED.format("a fused layer"))
        if ctx.versions != [parameter._version for parameter in call.layer.parameters()]:
            raise RuntimeError(
                "an adapter's weights were changed in place between a fused layer's forward and its backward, which needs "
                "them as they were: step the optimiser after the last backward"
            )
        is_kept = graph.is_kept()
        ctx.kept = kept if is_kept else None
        to_y = gradient.contiguous().flatten(0, 1)
        with _alone(gradient, call.batch.shared):
            call.batch.shared.went_back = True
            x_mh, used = kept.x_mh, kept.for_one_backward() if is_kept else kept
            if isinstance(x_mh, Handle):
                x_mh = call.batch.shared.store.take(x_mh, again=is_kept)
            to_x, sums = run_backward(call, used, x_mh, to_y, input_needed=ctx.needs_input_grad[0])
        parts = [part for name in GROUPS for part in sums.of(call.layer.groups[name].adapters)]
        return None if to_x is None else to_x.view_as(gradient), None, *parts


def copy_rows(source: torch.Tensor, target: torch.Tensor) -> None:
    """A matrix into a view of its shape, bit for bit where they are of one type.

    Between rows that lie differently far apart a GPU copies number by number: (8,192, 4,096) of 2 bytes took 97 us on an
    H200, whose bandwidth needs 31. So the rows go as complex numbers of 16 bytes, which torch only moves.
    """
    if source.dtype == target.dtype and _is_in_sixteens(source) and _is_in_sixteens(target):
        source, target = source.view(torch.complex128), target.view(torch.complex128)
    target.copy_(source)


def _is_in_sixteens(matrix: torch.Tensor) -> bool:
    """Whether every row begins and ends at a multiple of 16 bytes, on a device that has numbers of so many."""
    between, within = matrix.stride()
    numbers = matrix.shape[1] | between | int(matrix.storage_offset())
    # Somebody's buffer may begin anywhere.
    aligned = (numbers * matrix.element_size() | matrix.data_ptr()) % 16 == 0
    return within == 1 and aligned and (matrix.is_cuda or matrix.is_cpu)


@contextlib.contextmanager
def _alone(x: torch.Tensor, shared: Shared) -> Iterator[None]:
    """No other thread meanwhile; types are chosen here and not by somebody's autocast; kernels are launched on the tensors'
    device."""
    with shared.turn(), torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        yield


def run(call: Call, x_mh: torch.Tensor, y_mh: torch.Tensor, policy: str | None) -> Kept:
    """The layer's output into `y_mh`; returns what its policy keeps beside the input, without a policy nothing."""
    call.batch.shared.workspace.forget()
    kept = Kept()
    ranks = kept.ranks if policy in (KEEP_ALL, DROP_MLP, DROP_QKV) else None
    qkv = _project(call, x_mh, ranks)
    out, saved = call.batch.attention.forward(*_heads(call, qkv), call.batch.segments)
    if policy in (KEEP_ALL, DROP_MLP):
        kept.qkv = qkv
    del qkv
    if ranks is not None:
        kept.out, kept.saved, kept.sum_mh = out, saved, torch.empty_like(x_mh)
    if policy == KEEP_ALL:
        everything = slice(0, len(x_mh))
        kept.gate_up = call.room(everything, call.layer.groups["gate_up"].outputs, call.layer.groups["gate_up"].ranks)
    for rows in call.tiles:
        sum_mh = y_mh[rows] if kept.sum_mh is None else kept.sum_mh[rows]
        normed = _after_attention(call, x_mh[rows], out[rows], sum_mh, rows, ranks)
        gate_up = _gate_up(call, normed, rows, ranks, kept.gate_up)
        del normed
        _down(call, gate_up, sum_mh, y_mh[rows], rows, ranks)
    return kept


def run_backward(
    call: Call, kept: Kept, x_mh: torch.Tensor, to_y: torch.Tensor, *, input_needed: bool
) -> tuple[torch.Tensor | None, Sums]:
    """Gradients of the layer's input x, (m, h), and of its adapters; what is kept is used up."""
    layer, sums = call.layer, Sums()
    call.batch.shared.workspace.forget()
    if kept.qkv is None:
        kept.qkv = _project(call, x_mh, kept.ranks)
    if kept.out is None:
        kept.out, kept.saved = call.batch.attention.forward(*_heads(call, kept.qkv), call.batch.segments)
    everything = slice(0, len(x_mh))
    to_sum = call.room(everything, layer.sizes.hidden, call.layer.groups["o"].ranks)
    to_out: torch.Tensor | None = None
    for rows in call.tiles:
        _mlp_backward(call, kept, x_mh[rows], to_y[rows], to_sum[rows], rows, sums)
        if to_out is None:  # not before the first tile's MLP is over: that is the peak of a batch of one tile
            to_out = call.room(everything, layer.groups["o"].inputs)
        _o_backward(call, kept, to_sum[rows], to_out[rows], rows, sums)
    assert to_out is not None
    kept.gate_up = kept.sum_mh = None
    to_heads = call.batch.attention.backward(
        to_out.view(kept.out.shape), *_heads(call, kept.qkv), kept.out, kept.saved, call.batch.segments
    )
    del to_out
    kept.qkv, kept.out, kept.saved = None, None, ()
    to_x = torch.empty_like(x_mh) if input_needed else None
    for rows in call.tiles:
        query, key, value = (part[rows].flatten(1) for part in to_heads)
        of_tile = (query, key, value)
        _qkv_backward(call, kept, x_mh[rows], of_tile, to_sum[rows], None if to_x is None else to_x[rows], rows, sums)
    return to_x, sums


def _project(call: Call, x_mh: torch.Tensor, ranks: Ranks | None) -> torch.Tensor:
    """Norm, q, k and v, rotated: (m, q + k + v)."""
    layer, sizes = call.layer, call.layer.sizes
    matrix = call.matrix("qkv")
    qkv = call.room(slice(0, len(x_mh)), matrix.outputs)
    for rows in call.tiles:
        normed = call.room(rows, matrix.inputs, matrix.ranks)
        call.operations.rms_norm(x_mh[rows], layer.norms[0], sizes.eps[0], normed[:, : matrix.inputs])
        call.fill_ranks("qkv", normed, rows, ranks)
        torch.mm(normed, matrix.forward, out=qkv[rows])
        rotated = sizes.heads + sizes.key_heads
        call.operations.rope(qkv[rows], call.batch.cosine, call.batch.sine, rotated, sizes.head_size, rows.start)
    return qkv


def _heads(call: Call, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as (m, heads, head size), without a copy."""
    sizes = call.layer.sizes
    heads = qkv.view(qkv.shape[0], -1, sizes.head_size)
    query, key, value = heads.split([sizes.heads, sizes.key_heads, sizes.key_heads], dim=1)
    return query, key, value


def _after_attention(
    call: Call, x_mh: torch.Tensor, out: torch.Tensor, sum_mh: torch.Tensor, rows: slice, ranks: Ranks | None
) -> torch.Tensor:
    """o and the residual, into `sum_mh`, and its norm with room for the next ranks, (m, h + R)."""
    layer, matrix = call.layer, call.matrix("o")
    wide = out.flatten(1)
    if matrix.ranks:
        wide = call.room(rows, matrix.inputs, matrix.ranks)
        copy_rows(out.flatten(1), wide[:, : matrix.inputs])
        call.fill_ranks("o", wide, rows, ranks)
    update = wide @ matrix.forward
    del wide
    hidden = layer.sizes.hidden
    normed = call.room(rows, hidden, call.layer.groups["gate_up"].ranks)
    call.operations.add_rms_norm(x_mh, update, layer.norms[1], layer.sizes.eps[1], sum_mh, normed[:, :hidden])
    return normed


def _gate_up(
    call: Call, normed: torch.Tensor, rows: slice, ranks: Ranks | None, kept: torch.Tensor | None
) -> torch.Tensor:
    """gate and up side by side, (m, 2 i + R) of which the last R columns are room for their gradient."""
    matrix = call.matrix("gate_up")
    call.fill_ranks("gate_up", normed, rows, ranks)
    result = call.room(rows, matrix.outputs, matrix.ranks) if kept is None else kept[rows]
    torch.mm(normed, matrix.forward, out=result[:, : matrix.outputs])
    return result


def _down(
    call: Call, gate_up: torch.Tensor, sum_mh: torch.Tensor, y_mh: torch.Tensor, rows: slice, ranks: Ranks | None
) -> None:
    """SwiGLU, down and the residual, into `y_mh`."""
    matrix = call.matrix("down")
    active = call.room(rows, matrix.inputs, matrix.ranks)
    call.operations.swiglu(gate_up[:, : 2 * matrix.inputs], active[:, : matrix.inputs])
    call.fill_ranks("down", active, rows, ranks)
    if y_mh.dtype == call.batch.dtype:
        torch.addmm(sum_mh, active, matrix.forward, out=y_mh)
    else:  # a float32 residual stream
        torch.add(sum_mh, active @ matrix.forward, out=y_mh)


def _mlp_backward(
    call: Call,
    kept: Kept,
    x_mh: torch.Tensor,
    to_y: torch.Tensor,
    to_sum: torch.Tensor,
    rows: slice,
    sums: Sums,
) -> None:
    """From the gradient of a tile of the layer's output to that of the residual stream after attention, in `to_sum`."""
    layer, hidden = call.layer, call.layer.sizes.hidden
    assert kept.out is not None
    if kept.sum_mh is None:
        sum_mh = torch.empty_like(x_mh)
        normed = _after_attention(call, x_mh, kept.out[rows], sum_mh, rows, kept.ranks)
    else:
        sum_mh = kept.sum_mh[rows]
        normed = call.room(rows, hidden, call.layer.groups["gate_up"].ranks)
        call.operations.rms_norm(sum_mh, layer.norms[1], layer.sizes.eps[1], normed[:, :hidden])
    gate_up = _gate_up(call, normed, rows, kept.ranks, None) if kept.gate_up is None else kept.gate_up[rows]

    wide = call.room(rows, hidden, call.layer.groups["down"].ranks)
    copy_rows(to_y, wide[:, :hidden])
    active = call.room(rows, layer.sizes.intermediate)
    _input_gradient(call, "down", wide, rows, active)
    call.operations.swiglu_backward(active, gate_up[:, : 2 * layer.sizes.intermediate])  # now the activation itself
    _adapter_gradients(call, "down", wide, active, kept.ranks, rows, sums)
    del wide, active

    to_normed = call.room(rows, hidden)
    _input_gradient(call, "gate_up", gate_up, rows, to_normed)
    _adapter_gradients(call, "gate_up", gate_up, normed[:, :hidden], kept.ranks, rows, sums)
    call.operations.rms_norm_backward(to_normed, sum_mh, layer.norms[1], layer.sizes.eps[1], to_y, to_sum[:, :hidden])


def _o_backward(call: Call, kept: Kept, to_sum: torch.Tensor, to_out: torch.Tensor, rows: slice, sums: Sums) -> None:
    """From the gradient of the residual stream after attention, (m, h + R), to that of attention's result."""
    assert kept.out is not None
    _input_gradient(call, "o", to_sum, rows, to_out)
    _adapter_gradients(call, "o", to_sum, kept.out[rows].flatten(1), kept.ranks, rows, sums)


def _qkv_backward(
    call: Call,
    kept: Kept,
    x_mh: torch.Tensor,
    to_heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    to_sum: torch.Tensor,
    to_x: torch.Tensor | None,
    rows: slice,
    sums: Sums,
) -> None:
    """From the gradients of a tile's rotated query, key and value to that of the layer's input, in `to_x`."""
    layer, sizes, group = call.layer, call.layer.sizes, call.layer.groups["qkv"]
    to_qkv = call.room(rows, group.outputs, call.layer.groups["qkv"].ranks)
    call.operations.rope_backward(
        to_heads, call.batch.cosine, call.batch.sine, sizes.head_size, rows.start, to_qkv[:, : group.outputs]
    )
    to_normed = None if to_x is None else call.room(rows, sizes.hidden)
    _input_gradient(call, "qkv", to_qkv, rows, to_normed)
    if call.layer.groups["qkv"].adapters:
        normed = call.room(rows, sizes.hidden)
        call.operations.rms_norm(x_mh, layer.norms[0], sizes.eps[0], normed)
        _adapter_gradients(call, "qkv", to_qkv, normed, kept.ranks, rows, sums)
    if to_x is not None:
        residual = to_sum[:, : sizes.hidden]
        call.operations.rms_norm_backward(to_normed, x_mh, layer.norms[0], sizes.eps[0], residual, to_x)


def _input_gradient(call: Call, name: str, gradient: torch.Tensor, rows: slice, out: torch.Tensor | None) -> None:
    input_gradient(gradient, call.matrix(name), call.layer.groups[name], call.ranks_seed(name, rows), out)


def _adapter_gradients(
    call: Call, name: str, gradient: torch.Tensor, x_mk: torch.Tensor, kept: Ranks, rows: slice, sums: Sums
) -> None:
    """`linear.adapter_gradients` with the ranks as kept, or computed again: the workspace still holds the group."""
    group, seed = call.layer.groups[name], call.ranks_seed(name, rows)
    if not group.adapters:
        return
    ranks = kept.pop((name, rows.start), None)
    if ranks is None:
        ranks = call.room(rows, 0, group.ranks)
        ranks_forward(x_mk, call.matrix(name), group, seed, ranks)
    adapter_gradients(call.operations, gradient, x_mk, ranks, group, seed, sums)
