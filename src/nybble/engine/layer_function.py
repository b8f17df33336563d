"""Forward and backward of a fused decoder layer.

The layer is computed in two parts around attention: [norm, q, k, v, rotary positions] and [o, residual, norm, gate, up,
SwiGLU, down, residual]. Nothing in them looks at neighbouring tokens, so they run over tiles of tokens, and temporary
buffers do not grow with the batch. The policy decides what is saved for backward (`nybble.plan.policies`); the rest is
recomputed, except down_proj, whose result backward does not need. This file orders the operations; `nybble.engine.product`
computes the products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from nybble.engine import graph
from nybble.engine.layer import GROUPS, LayerCall, SavedActivations, Shared
from nybble.engine.low_rank import AdapterGradients
from nybble.engine.offload import OffloadedTensor
from nybble.engine.product import SavedRanks
from nybble.plan.policies import DROP_MLP, DROP_QKV, HOST, KEEP_ALL


class LayerFunction(torch.autograd.Function):
    """x (batch, length, h) to the layer's output of the same shape and type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: LayerCall, *parameters: torch.Tensor) -> torch.Tensor:
        """See `run`; `parameters` are `call.layer.parameters()`, passed so that autograd tracks them."""
        policy = call.policy if any(ctx.needs_input_grad) else None
        x_mh = x.detach().contiguous().flatten(0, 1)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # not a view: a hook may change it in place
        with _exclusive(x, call.batch.shared):
            saved = run(call, x_mh, y.flatten(0, 1), policy)
            if policy is not None:
                saved.x_mh = call.batch.shared.offload.put(x_mh) if policy == HOST and x.is_cuda else x_mh
        ctx.call, ctx.saved = call, saved
        ctx.versions = [parameter._version for parameter in parameters] if policy is not None else []
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the parameters."""
        graph.refuse_second_derivatives()
        call, saved = ctx.call, ctx.saved
        if saved is None:
            raise RuntimeError(graph.FREED_MESSAGE.format("a fused layer"))
        if ctx.versions != [parameter._version for parameter in call.layer.parameters()]:
            raise RuntimeError(
                "an adapter's weights were changed in place between a fused layer's forward and its backward, which needs "
                "them as they were: step the optimiser after the last backward"
            )
        is_retained = graph.is_retained()
        ctx.saved = saved if is_retained else None
        to_y = gradient.contiguous().flatten(0, 1)
        with _exclusive(gradient, call.batch.shared):
            call.batch.shared.has_seen_backward = True
            x_mh, used = saved.x_mh, saved.for_one_backward() if is_retained else saved
            if isinstance(x_mh, OffloadedTensor):
                x_mh = call.batch.shared.offload.take(x_mh, again=is_retained)
            to_x, sums = run_backward(call, used, x_mh, to_y, input_needed=ctx.needs_input_grad[0])
        parts = [part for name in GROUPS for part in sums.of(call.layer.groups[name].adapters)]
        return None if to_x is None else to_x.view_as(gradient), None, *parts


@contextlib.contextmanager
def _exclusive(x: torch.Tensor, shared: Shared) -> Iterator[None]:
    """One thread at a time, without the caller's autocast, which would change types, and on the tensors' device."""
    with shared.exclusive(), torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        yield


def run(call: LayerCall, x_mh: torch.Tensor, y_mh: torch.Tensor, policy: str | None) -> SavedActivations:
    """Write the layer's output into `y_mh`; returns what its policy keeps beside the input, or nothing without a policy."""
    call.batch.shared.workspace.begin_layer(call.number, "inference" if policy is None else "forward")
    saved = SavedActivations()
    ranks = saved.ranks if policy in (KEEP_ALL, DROP_MLP, DROP_QKV) else None
    qkv = _project(call, x_mh, ranks)
    attended, state = call.batch.attention.forward(*_heads(call, qkv), call.batch.segments)
    if policy in (KEEP_ALL, DROP_MLP):
        saved.qkv = qkv
    del qkv
    if ranks is not None:
        saved.attended, saved.attention_state, saved.sum_mh = attended, state, torch.empty_like(x_mh)
    if policy == KEEP_ALL:
        saved.gate_up = call.products["gate_up"].gradient_buffer(len(x_mh))
    for rows in call.tiles:
        sum_mh = y_mh[rows] if saved.sum_mh is None else saved.sum_mh[rows]
        normed = _after_attention(call, x_mh[rows], attended[rows], sum_mh, rows, ranks)
        gate_up = _gate_up(call, normed, rows, ranks, saved.gate_up)
        del normed
        _down(call, gate_up, sum_mh, y_mh[rows], rows, ranks)
    return saved


def run_backward(
    call: LayerCall, saved: SavedActivations, x_mh: torch.Tensor, to_y: torch.Tensor, *, input_needed: bool
) -> tuple[torch.Tensor | None, AdapterGradients]:
    """Gradients of the layer's input x, (m, h), and of its adapters; consumes the saved activations."""
    layer, sums = call.layer, AdapterGradients(call.operations)
    call.batch.shared.workspace.begin_layer(call.number, "backward")
    if saved.qkv is None:
        saved.qkv = _project(call, x_mh, saved.ranks)
    if saved.attended is None:
        saved.attended, saved.attention_state = call.batch.attention.forward(
            *_heads(call, saved.qkv), call.batch.segments
        )
    to_sum = call.products["o"].gradient_buffer(len(x_mh))
    to_attended: torch.Tensor | None = None
    for rows in call.tiles:
        to_sum_rows = to_sum[rows]
        _mlp_backward(call, saved, x_mh[rows], to_y[rows], to_sum_rows, rows, sums)
        if to_attended is None:  # only after the first tile's MLP, the peak of a batch of one tile
            to_attended = call.empty(slice(0, len(x_mh)), layer.groups["o"].inputs)
        _o_backward(call, saved, to_sum_rows, to_attended[rows], rows, sums)
        del to_sum_rows
    assert to_attended is not None
    saved.gate_up = saved.sum_mh = None
    to_heads = call.batch.attention.backward(
        to_attended.view(saved.attended.shape), *_heads(call, saved.qkv), saved.attended, saved.attention_state,
        call.batch.segments,
    )  # fmt: skip
    del to_attended
    saved.qkv, saved.attended, saved.attention_state = None, None, ()
    to_x = torch.empty_like(x_mh) if input_needed else None
    for rows in call.tiles:
        query, key, value = (part[rows].flatten(1) for part in to_heads)
        to_x_rows = None if to_x is None else to_x[rows]
        _qkv_backward(call, saved, x_mh[rows], (query, key, value), to_sum[rows], to_x_rows, rows, sums)
    return to_x, sums


def _project(call: LayerCall, x_mh: torch.Tensor, ranks: SavedRanks | None) -> torch.Tensor:
    """Norm, q, k and v, rotated: (m, q + k + v)."""
    layer, sizes, product = call.layer, call.layer.sizes, call.products["qkv"]
    qkv = call.empty(slice(0, len(x_mh)), product.group.outputs)
    for rows in call.tiles:
        normed = product.input_buffer(rows.stop - rows.start)
        call.operations.rms_norm(x_mh[rows], layer.norms[0], sizes.eps[0], product.input_target(normed))
        product.forward(normed, rows, qkv[rows], ranks)
        rotated = sizes.heads + sizes.key_heads
        call.operations.rope(qkv[rows], call.batch.cosine, call.batch.sine, rotated, sizes.head_size, rows.start)
    return qkv


def _heads(call: LayerCall, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as (m, heads, head size), without a copy."""
    sizes = call.layer.sizes
    heads = qkv.view(qkv.shape[0], -1, sizes.head_size)
    query, key, value = heads.split([sizes.heads, sizes.key_heads, sizes.key_heads], dim=1)
    return query, key, value


def _after_attention(
    call: LayerCall,
    x_mh: torch.Tensor,
    attended: torch.Tensor,
    sum_mh: torch.Tensor,
    rows: slice,
    ranks: SavedRanks | None,
) -> Any:
    """Write o plus the residual into `sum_mh`; returns its norm in an input buffer of gate and up."""
    layer, product, following = call.layer, call.products["o"], call.products["gate_up"]
    operand = product.input_from(attended.flatten(1))
    update = call.empty(rows, layer.sizes.hidden)
    product.forward(operand, rows, update, ranks)
    del operand
    normed = following.input_buffer(rows.stop - rows.start)
    target = following.input_target(normed)
    call.operations.add_rms_norm(x_mh, update, layer.norms[1], layer.sizes.eps[1], sum_mh, target)
    return normed


def _gate_up(call: LayerCall, normed: Any, rows: slice, ranks: SavedRanks | None, saved: Any) -> Any:
    """gate and up side by side, (m, 2 i), in their gradient buffer: the saved one of all rows, or a new one for these rows."""
    product = call.products["gate_up"]
    result = product.gradient_buffer(rows.stop - rows.start) if saved is None else saved[rows]
    product.forward(normed, rows, product.gradient_view(result), ranks)
    return result


def _down(
    call: LayerCall, gate_up: Any, sum_mh: torch.Tensor, y_mh: torch.Tensor, rows: slice, ranks: SavedRanks | None
) -> None:
    """Write SwiGLU, down and the residual into `y_mh`."""
    product = call.products["down"]
    active = product.input_buffer(rows.stop - rows.start)
    call.operations.swiglu(call.products["gate_up"].gradient_view(gate_up), product.input_target(active))
    product.forward(active, rows, y_mh, ranks, add_mn=sum_mh)


def _mlp_backward(
    call: LayerCall,
    saved: SavedActivations,
    x_mh: torch.Tensor,
    to_y: torch.Tensor,
    to_sum: Any,
    rows: slice,
    sums: AdapterGradients,
) -> None:
    """From the gradient of a tile of the layer's output to that of the residual stream after attention, written into `to_sum`."""
    norm, eps, sizes = call.layer.norms[1], call.layer.sizes.eps[1], call.layer.sizes
    product, down = call.products["gate_up"], call.products["down"]
    assert saved.attended is not None
    if saved.gate_up is not None and saved.sum_mh is not None:
        gate_up, sum_mh, normed = saved.gate_up[rows], saved.sum_mh[rows], call.empty(rows, sizes.hidden)
        call.operations.rms_norm(sum_mh, norm, eps, normed)
    else:
        gate_up, sum_mh, normed = _gate_up_again(call, saved, x_mh, rows)

    operand = down.gradient_from(to_y)
    active = call.empty(rows, sizes.intermediate)
    down.input_gradient(operand, rows, active)
    call.operations.swiglu_backward(active, product.gradient_target(gate_up))  # now the activation itself
    down.adapter_gradients(operand, rows, active, saved.ranks, sums)
    del operand, active

    to_normed = call.empty(rows, sizes.hidden)
    product.input_gradient(gate_up, rows, to_normed)
    product.adapter_gradients(gate_up, rows, normed, saved.ranks, sums)
    call.operations.rms_norm_backward(to_normed, sum_mh, norm, eps, to_y, call.products["o"].gradient_target(to_sum))


def _gate_up_again(
    call: LayerCall, saved: SavedActivations, x_mh: torch.Tensor, rows: slice
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Recompute gate and up of a tile, in their gradient buffer, with the residual stream after attention and its norm."""
    norm, eps, product = call.layer.norms[1], call.layer.sizes.eps[1], call.products["gate_up"]
    if saved.sum_mh is None:
        assert saved.attended is not None
        sum_mh = torch.empty_like(x_mh)
        normed = _after_attention(call, x_mh, saved.attended[rows], sum_mh, rows, saved.ranks)
    else:
        sum_mh = saved.sum_mh[rows]
        normed = product.input_buffer(rows.stop - rows.start)
        call.operations.rms_norm(sum_mh, norm, eps, product.input_target(normed))
    return _gate_up(call, normed, rows, saved.ranks, None), sum_mh, product.input_view(normed)


def _o_backward(
    call: LayerCall,
    saved: SavedActivations,
    to_sum: Any,
    to_attended: torch.Tensor,
    rows: slice,
    sums: AdapterGradients,
) -> None:
    """From the gradient of the residual stream after attention to that of the attention output."""
    assert saved.attended is not None
    product = call.products["o"]
    product.input_gradient(to_sum, rows, to_attended)
    product.adapter_gradients(to_sum, rows, saved.attended[rows].flatten(1), saved.ranks, sums)


def _qkv_backward(
    call: LayerCall,
    saved: SavedActivations,
    x_mh: torch.Tensor,
    to_heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    to_sum: Any,
    to_x: torch.Tensor | None,
    rows: slice,
    sums: AdapterGradients,
) -> None:
    """From the gradients of a tile's rotated query, key and value to that of the layer's input, written into `to_x`."""
    norm, eps, sizes = call.layer.norms[0], call.layer.sizes.eps[0], call.layer.sizes
    product = call.products["qkv"]
    to_qkv = product.gradient_buffer(rows.stop - rows.start)
    call.operations.rope_backward(
        to_heads, call.batch.cosine, call.batch.sine, sizes.head_size, rows.start, product.gradient_target(to_qkv)
    )
    to_normed = None if to_x is None else call.empty(rows, sizes.hidden)
    product.input_gradient(to_qkv, rows, to_normed)
    if product.group.adapters:
        normed = call.empty(rows, sizes.hidden)
        call.operations.rms_norm(x_mh, norm, eps, normed)
        product.adapter_gradients(to_qkv, rows, normed, saved.ranks, sums)
    if to_x is not None and to_normed is not None:
        residual = call.products["o"].gradient_view(to_sum)
        call.operations.rms_norm_backward(to_normed, x_mh, norm, eps, residual, to_x)
