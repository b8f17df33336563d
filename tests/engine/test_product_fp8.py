"""The fp8 product against plain float32: how far it is off, and that nothing but the sizes of numbers decides that."""

from __future__ import annotations

import gc
import itertools
import math

import bitsandbytes.functional as bitsandbytes
import pytest
import torch

from nybble.engine.low_rank import AdapterGradients
from nybble.engine.product import AugmentedProduct
from nybble.engine.product_fp8 import Fp8Product, Peaks, Scaled
from nybble.engine.workspace import Workspace
from nybble.kernels.operations import choose
from nybble.kernels.reference import Nested
from nybble.kernels.scaled import ScaledRows
from nybble.weights.frozen import FrozenWeight
from nybble.weights.projections import ALIGNMENT, ActiveAdapter, ProjectionGroup
from nybble.weights.store import ResidentStore
from tests.engine.test_product import DEVICE, INDEX, SEED, numbers, plainly

OUTPUTS, INPUTS = (64, 32, 32), 192
ADAPTERS = {"none": {}, "one of three": {1: (5, 0.0)}, "all": {0: (8, 0.0), 1: (8, 0.0), 2: (8, 0.0)},
            "dropout": {0: (4, 0.3), 2: (3, 0.0)}}  # fmt: skip
ERROR = 0.05  # relative to the root mean square: e4m3 twice, 2.6 and 2.5%, makes 3.6; measured here: at most 3.9
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def group_of(kind, quantised=True, spread=1.0, size=1.0):
    """Weights of one group; `spread` makes its first block of numbers so much larger."""
    frozen, adapters, rank = [], [], 0
    starts = [0, *itertools.accumulate(OUTPUTS)]
    for index, outputs in enumerate(OUTPUTS):
        weight = numbers(outputs, INPUTS, seed=index, dtype=DTYPE) * size / INPUTS**0.5
        weight[:1, :64] *= spread
        if quantised:
            packed, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
            frozen.append(FrozenWeight(outputs, packed, state.absmax, state.code, state.blocksize, nested))
        else:
            frozen.append(FrozenWeight(outputs, weight, weight, None, 0, None))
        if index in ADAPTERS[kind]:
            r, share = ADAPTERS[kind][index]
            a = torch.nn.Parameter(numbers(r, INPUTS, seed=10 + index) / INPUTS**0.5)
            b = torch.nn.Parameter(numbers(outputs, r, seed=20 + index) * 0.05 * size)
            places = slice(starts[index], starts[index + 1]), slice(rank, rank + r)
            adapters.append(ActiveAdapter(a, b, 2.0, share, *places))
            rank += r
    ranks = -(-rank // ALIGNMENT) * ALIGNMENT
    has_dropout = any(each.dropout for each in adapters)
    return ProjectionGroup(tuple(frozen), tuple(adapters), INPUTS, sum(OUTPUTS), ranks, has_dropout, None)


def resident_peaks():
    return Peaks(ResidentStore(choose(DEVICE).operations))


def product_of(group, fast=(True, False)):
    operations, peaks = choose(DEVICE).operations, resident_peaks()
    workspace = Workspace(ResidentStore(operations), operations, DEVICE)
    start, size = Scaled(DTYPE, True, peaks).place(group)
    workspace.reserve("all", start + size)
    return Fp8Product(group, workspace, operations, "all", DTYPE, INDEX, SEED, peaks=peaks, fast=fast)


def dequantised(group):
    """The same group with the weights that the codes stand for, in float32, as `plainly` reads them."""
    workspace = Workspace(ResidentStore(choose(DEVICE).operations), choose(DEVICE).operations, DEVICE)
    frozen = []
    for weight in group.frozen:
        plain = torch.empty(weight.outputs, INPUTS, dtype=torch.float32, device=DEVICE)
        one = ProjectionGroup((weight,), (), INPUTS, weight.outputs, 0, False, None)
        workspace._store.write(one, plain)
        frozen.append(FrozenWeight(weight.outputs, plain, plain, None, 0, None))
    return ProjectionGroup(tuple(frozen), group.adapters, INPUTS, group.outputs, group.ranks, group.has_dropout, None)


def by_product(product, x, to_y, tiles, saved, added=None):
    group, operations = product.group, choose(DEVICE).operations
    y = torch.empty(len(x), group.outputs, dtype=DTYPE if added is None else added.dtype, device=DEVICE)
    gradient, to_x = product.gradient_buffer(len(x)), torch.empty_like(x)
    sums = AdapterGradients(operations)

    def fill(target, rows):
        target.wide.copy_(rows)
        operations.quantize_rows(target)

    for rows in tiles:
        operand = product.input_buffer(rows.stop - rows.start)
        fill(product.input_target(operand), x[rows])
        product.forward(operand, rows, y[rows], saved, None if added is None else added[rows])
    for rows in tiles:
        operand = gradient[rows]
        fill(product.gradient_target(operand), to_y[rows])
        product.input_gradient(operand, rows, to_x[rows])
        product.adapter_gradients(operand, rows, x[rows], {} if saved is None else saved, sums)
    return y, to_x, *sums.of(group.adapters)


def in_16_bits(group, x, to_y):
    """Output and input's gradient by the product that fp8's takes the place of; in float32 on a CPU."""
    rows = slice(0, len(x))
    wide = AugmentedProduct(group, product_of(group)._workspace, "all", DTYPE, INDEX, SEED)
    y, to_x, gradient = torch.empty_like(to_y), torch.empty_like(x), wide.gradient_buffer(len(x))
    wide.forward(wide.input_from(x), rows, y, {})
    wide.gradient_view(gradient).copy_(to_y)
    wide.input_gradient(gradient, rows, to_x)
    return y, to_x


def errors(found, expected):
    return [
        ((ours.double() - theirs.double()).pow(2).mean().sqrt() / theirs.double().pow(2).mean().sqrt()).item()
        for ours, theirs in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_forward_and_every_gradient(kind, quantised):
    group = group_of(kind, quantised)
    x, to_y = numbers(123, INPUTS, seed=30, dtype=DTYPE), numbers(123, group.outputs, seed=31, dtype=DTYPE)
    for tiles in ([slice(0, 123)], [slice(0, 61), slice(61, 123)]):
        expected, saved = plainly(dequantised(group), x, to_y, tiles), {}
        found = by_product(product_of(group), x, to_y, tiles, saved)
        assert not saved, "what was saved for backward is used up"
        again = by_product(product_of(group), x, to_y, tiles, None)  # T is computed again
        assert all(map(torch.equal, found, again))
        y, to_x, *adapters = errors(found, expected)
        print(kind, quantised, y, to_x, adapters)
        assert 0.005 < y < ERROR, "an error below what e4m3 has means that nothing was computed in it"
        assert 0.005 < to_x < ERROR
        assert all(error < 1e-5 if torch.float32 == DTYPE else error < 0.01 for error in adapters), (
            "they are not in fp8"
        )


@pytest.mark.parametrize("largest", [0.25, 2.5, 9.0])
@pytest.mark.parametrize(("size", "bound"), [(0.1, 0.003), (1e-3, 0.003), (1e-4, 0.007), (1e-5, 0.025), (0.0, 0.0)])
def test_adapters_are_precise_from_their_first_step_on(largest, size, bound):
    """With a base of one number that meets zeros, what is left of the product is the adapter. In plain e4m3 it would be 3% off,
    and where s B is small beside the largest weight it would be nothing at all. On a GPU what bfloat16 is off
    comes on top."""
    group = group_of("all", quantised=False)
    nothing = [torch.zeros_like(weight.stored) for weight in group.frozen]
    nothing[0][0, 0] = largest
    frozen = tuple(FrozenWeight(len(each), each, each, None, 0, None) for each in nothing)
    for adapter in group.adapters:
        adapter.b.data *= size / (0.05 * adapter.scaling)
    group = ProjectionGroup(frozen, group.adapters, INPUTS, group.outputs, group.ranks, False, None)
    x, to_y = numbers(42, INPUTS, seed=30, dtype=DTYPE), numbers(42, group.outputs, seed=31, dtype=DTYPE)
    x[:, 0] = to_y[:, 0] = 0
    found, expected = (
        by_product(product_of(group), x, to_y, [slice(0, 42)], {}),
        plainly(group, x, to_y, [slice(0, 42)]),
    )
    if size == 0:
        assert (found[0] == 0).all()
        assert (found[1] == 0).all()
        return
    y, to_x, *_ = errors(found, expected)
    own = max(errors(in_16_bits(group, x, to_y), expected[:2]))
    print(largest, size, y, to_x, own)
    assert max(y, to_x) < math.hypot(bound, own)


def test_an_adapter_as_large_as_the_weights_does_not_saturate():
    group = group_of("all", quantised=False)
    largest = max(weight.largest().item() for weight in group.frozen)
    for adapter in group.adapters:
        adapter.b.data *= largest / (adapter.scaling * adapter.b.abs().max())
    x, to_y = numbers(42, INPUTS, seed=30, dtype=DTYPE), numbers(42, group.outputs, seed=31, dtype=DTYPE)
    found = by_product(product_of(group), x, to_y, [slice(0, 42)], {})
    assert max(errors(found, plainly(group, x, to_y, [slice(0, 42)]))[:2]) < ERROR


@pytest.mark.parametrize("rows, weights", [(1e-20, 1.0), (1e20, 1.0), (1.0, 1e-6), (1.0, 1e6)])
def test_the_size_of_numbers_does_not_matter(rows, weights):
    group = group_of("none", size=weights)
    x, to_y = numbers(42, INPUTS, seed=30, dtype=DTYPE) * rows, numbers(42, group.outputs, seed=31, dtype=DTYPE) * rows
    expected = plainly(dequantised(group), x.double(), to_y.double(), [slice(0, 42)])
    assert max(errors(by_product(product_of(group), x, to_y, [slice(0, 42)], {}), expected)) < ERROR


def test_a_block_of_weights_a_hundred_times_as_large_as_others_spoils_only_itself():
    group = group_of("none", spread=100.0)
    x, to_y = numbers(42, INPUTS, seed=30, dtype=DTYPE), numbers(42, group.outputs, seed=31, dtype=DTYPE)
    expected = plainly(dequantised(group), x, to_y, [slice(0, 42)])
    found = by_product(product_of(group), x, to_y, [slice(0, 42)], {})
    others = [index for index in range(group.outputs) if index not in (0, 64, 96)]
    assert errors([found[0][:, others]], [expected[0][:, others]])[0] < ERROR


def test_rows_of_zeros_and_rows_that_are_not_finite():
    """B is zero at the start, and padding has no gradient; what is not finite must reach the loss, from its own row only."""
    group = group_of("all")
    x, to_y = numbers(42, INPUTS, seed=30, dtype=DTYPE), numbers(42, group.outputs, seed=31, dtype=DTYPE)
    x[3], to_y[3] = 0, 0
    x[5, 7], x[6, 9] = float("nan"), float("inf")
    to_y[7, 1] = float("inf")
    y, to_x, *_ = by_product(product_of(group), x, to_y, [slice(0, 42)], {})
    assert (y[3] == 0).all()
    assert (to_x[3] == 0).all()
    assert y[[5, 6]].isnan().all()
    assert to_x[7].isnan().all()
    assert y[[row for row in range(42) if row not in (5, 6)]].isfinite().all()
    assert to_x[[row for row in range(42) if row != 7]].isfinite().all()


def test_the_residual_is_added_in_its_own_type_and_an_existing_input_is_left_alone():
    group, rows = group_of("all"), slice(0, 42)
    x, added = numbers(42, INPUTS, seed=30, dtype=DTYPE), numbers(42, group.outputs, seed=32)
    product, before = product_of(group), x.clone()
    plain, sums = torch.empty(42, group.outputs, dtype=DTYPE, device=DEVICE), torch.empty_like(added)
    product.forward(product.input_from(x), rows, plain, None)
    product.forward(product.input_from(x), rows, sums, None, added)
    assert torch.equal(sums, added + plain)
    assert torch.equal(x, before)
    assert product.input_view(product.input_from(x)) is x


def test_the_adapters_have_gradients_where_nothing_before_the_layer_is_trained():
    group, rows = group_of("dropout"), slice(0, 42)
    x, to_y = numbers(42, INPUTS, seed=30, dtype=DTYPE), numbers(42, group.outputs, seed=31, dtype=DTYPE)
    product, sums = product_of(group), AdapterGradients(choose(DEVICE).operations)
    operand = product.gradient_from(to_y)
    product.input_gradient(operand, rows, None)
    product.adapter_gradients(operand, rows, x, {}, sums)
    _, _, *expected = plainly(dequantised(group), x, to_y, [rows])
    assert max(errors(sums.of(group.adapters), expected)) < 0.01


@pytest.mark.parametrize("fast", list(itertools.product([True, False], repeat=2)))
def test_each_direction_sums_as_it_was_told(fast, monkeypatch):
    group, seen = group_of("none"), []
    operations = choose(DEVICE).operations
    original = operations.scaled_product
    monkeypatch.setattr(operations, "scaled_product", lambda *args: seen.append(args[4]) or original(*args))
    x, to_y = numbers(42, INPUTS, seed=30, dtype=DTYPE), numbers(42, group.outputs, seed=31, dtype=DTYPE)
    by_product(product_of(group, fast), x, to_y, [slice(0, 42)], {})
    assert tuple(seen) == fast


def test_both_forms_and_a_16_bit_matrix_share_a_slot():
    """Forward's and backward's lie side by side, so neither is written twice; a 16-bit one takes the place of both."""
    group, written = group_of("all"), []
    product, rows = product_of(group), slice(0, 42)
    workspace = product._workspace
    original = workspace._store.write_e4m3
    workspace._store.write_e4m3 = lambda *args: written.append(args[2]) or original(*args)
    x, to_y = numbers(42, INPUTS, seed=30, dtype=DTYPE), numbers(42, group.outputs, seed=31, dtype=DTYPE)
    first = by_product(product, x, to_y, [rows], {})
    second = by_product(product, x, to_y, [rows], {})
    assert written == [False, True]
    wide = AugmentedProduct(group, workspace, "all", DTYPE, INDEX, SEED)
    out = torch.empty(42, group.outputs, dtype=DTYPE, device=DEVICE)
    wide.forward(wide.input_from(x), rows, out, None)
    third = by_product(product, x, to_y, [rows], {})
    assert written == [False, True, False, True]
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
    workspace.begin_layer(0, "forward")
    by_product(product, x, to_y, [rows], {})
    assert len(written) == 6, "another layer's weights were there"


def test_a_scale_is_read_once_and_again_when_weights_were_written_into(monkeypatch):
    group, peaks, read = group_of("none", quantised=False), resident_peaks(), []
    original = FrozenWeight.largest
    monkeypatch.setattr(FrozenWeight, "largest", lambda weight: read.append(1) or original(weight))
    before = peaks.exponent(group)
    assert peaks.exponent(group) == before
    assert len(read) == 3
    group.frozen[0].stored.mul_(1000)
    assert peaks.exponent(group) == before - 10
    assert len(read) == 6


def test_scales_of_groups_that_are_gone_are_forgotten():
    peaks = resident_peaks()
    for _ in range(5):
        peaks.exponent(group_of("none", quantised=False))
    gc.collect()
    peaks.exponent(group_of("none", quantised=False))
    assert len(peaks._known) <= 2


@pytest.mark.parametrize("largest", [0.0, float("inf"), float("nan")])
def test_weights_of_zeros_are_fine_and_what_is_not_finite_shows(largest):
    weights = [torch.zeros(16, INPUTS, device=DEVICE) for _ in range(2)]
    weights[1][0, 0] = largest  # not in the first of the group
    frozen = tuple(FrozenWeight(16, weight, weight, None, 0, None) for weight in weights)
    group = ProjectionGroup(frozen, (), INPUTS, 32, 0, False, None)
    x = numbers(4, INPUTS, seed=1, dtype=DTYPE)
    product, out = product_of(group), torch.empty(4, 32, dtype=DTYPE, device=DEVICE)
    product.forward(product.input_from(x), slice(0, 4), out, None)
    assert (out == 0).all() if largest == 0 else out.isnan().all()


def test_rows_are_in_e4m3_only_while_they_are_needed():
    product = product_of(group_of("all"))
    kept = product.gradient_buffer(42)
    assert kept.scaled is None
    part = kept[0:20]
    assert isinstance(product.gradient_target(part), ScaledRows)
    part.wide.zero_()
    choose(DEVICE).operations.quantize_rows(part.scaled)
    product.input_gradient(part, slice(0, 20), torch.empty(20, INPUTS, dtype=DTYPE, device=DEVICE))
    assert part.scaled is None
