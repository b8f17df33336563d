"""The product seam against plain torch: forward and every gradient, with and without adapters, tile by tile."""

from __future__ import annotations

import ast
import itertools
import pathlib

import pytest
import torch

import nybble.engine
from nybble.engine.low_rank import AdapterGradients, dropout
from nybble.engine.product import AugmentedProduct
from nybble.engine.workspace import Workspace
from nybble.kernels.operations import choose
from nybble.weights.frozen import FrozenWeight
from nybble.weights.projections import ALIGNMENT, ActiveAdapter, ProjectionGroup
from nybble.weights.store import ResidentStore

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED, INDEX = 1234, 2
OUTPUTS = (31, 12, 42)  # of the projections that share an input
ADAPTERS = {  # rank, scaling and dropout of each projection that has one
    "none": {},
    "one of three": {1: (5, 0.5, 0.0)},
    "all": {0: (4, 2.0, 0.0), 1: (3, 1.0, 0.0), 2: (6, 0.25, 0.0)},
    "dropout": {0: (4, 2.0, 0.3), 2: (3, 1.0, 0.0)},
}
# Error over the largest number; measured on a CPU: 2.6e-7, 6.1e-3 (inputs, T and results rounded to 2^-9), 9.4e-4 (to 2^-12).
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def group_of(kind, inputs, dtype):
    frozen, adapters, rank = [], [], 0
    starts = [0, *itertools.accumulate(OUTPUTS)]
    for index, outputs in enumerate(OUTPUTS):
        weight = numbers(outputs, inputs, seed=index, dtype=dtype) / inputs**0.5
        frozen.append(FrozenWeight(outputs, weight, weight, None, 0, None))
        if index in ADAPTERS[kind]:
            r, scaling, share = ADAPTERS[kind][index]
            a = torch.nn.Parameter(numbers(r, inputs, seed=10 + index) / inputs**0.5)
            b = torch.nn.Parameter(numbers(outputs, r, seed=20 + index))
            places = slice(starts[index], starts[index + 1]), slice(rank, rank + r)
            adapters.append(ActiveAdapter(a, b, scaling, share, *places))
            rank += r
    ranks = -(-rank // ALIGNMENT) * ALIGNMENT
    return ProjectionGroup(
        tuple(frozen), tuple(adapters), inputs, sum(OUTPUTS), ranks, any(each.dropout for each in adapters), None
    )


def product_of(group, dtype):
    operations = choose(DEVICE).operations
    workspace = Workspace(ResidentStore(operations), operations, DEVICE)
    workspace.reserve("all", (group.outputs + group.ranks) * (group.inputs + group.ranks) * dtype.itemsize)
    return AugmentedProduct(group, workspace, "all", dtype, INDEX, SEED)


def masks(group, x, rows):
    """What dropout multiplies each adapter's input by: the product's own draw."""
    seed = SEED + 4 * INDEX + 16 * rows.start
    return [dropout(torch.ones_like(x), adapter, seed + index) for index, adapter in enumerate(group.adapters)]


def plainly(group, x, to_y, tiles, added=None):
    """y, dX and the adapters' gradients by autograd in float32."""
    drawn_in, x = x, x.float().clone().requires_grad_()
    parts = []
    for rows in tiles:
        y = x[rows] @ torch.cat([weight.stored.float() for weight in group.frozen]).t()
        for adapter, mask in zip(group.adapters, masks(group, drawn_in[rows], rows), strict=True):
            update = torch.zeros_like(y)
            update[:, adapter.outputs] = ((x[rows] * mask.float()) @ adapter.a.t()) @ adapter.b.t() * adapter.scaling
            y = y + update
        parts.append(y)
    y = torch.cat(parts)
    wanted = [x, *(part for adapter in group.adapters for part in (adapter.a, adapter.b))]
    gradients = torch.autograd.grad(y, wanted, to_y.float())
    return y.detach() if added is None else y.detach() + added.float(), *gradients


def by_product(product, x, to_y, tiles, saved, added=None):
    """The same through the seam, as a layer goes through it: buffers of all rows, cut into tiles."""
    group = product.group
    y = torch.empty(len(x), group.outputs, dtype=x.dtype if added is None else added.dtype, device=DEVICE)
    gradient = product.gradient_buffer(len(x))
    to_x = torch.empty_like(x)
    sums = AdapterGradients(choose(DEVICE).operations)
    for rows in tiles:
        operand = product.input_buffer(rows.stop - rows.start)
        product.input_target(operand).copy_(x[rows])
        product.forward(operand, rows, y[rows], saved, None if added is None else added[rows])
    for rows in tiles:
        product.gradient_target(gradient[rows]).copy_(to_y[rows])
        product.input_gradient(gradient[rows], rows, to_x[rows])
        product.adapter_gradients(gradient[rows], rows, x[rows], {} if saved is None else saved, sums)
    return y, to_x, *sums.of(group.adapters)


def assert_close(found, expected, dtype):
    assert len(found) == len(expected)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == theirs.shape
        error = ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()
        assert error < TOLERANCES[dtype], f"{index}: {error}"


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("rows, inputs", [(6, 42), (42, 123), (123, 64), (431, 6)])
def test_forward_and_every_gradient(rows, inputs, kind, dtype):
    group = group_of(kind, inputs, dtype)
    x, to_y = numbers(rows, inputs, seed=30, dtype=dtype), numbers(rows, group.outputs, seed=31, dtype=dtype)
    for tiles in ([slice(0, rows)], [slice(0, rows // 2), slice(rows // 2, rows)]):
        expected, saved = plainly(group, x, to_y, tiles), {}
        assert_close(by_product(product_of(group, dtype), x, to_y, tiles, saved), expected, dtype)
        assert not saved, "what was saved for backward is used up"
        assert_close(by_product(product_of(group, dtype), x, to_y, tiles, None), expected, dtype)  # T is computed again


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
def test_the_residual_is_added_in_its_own_type(kind, residual):
    group = group_of(kind, 64, torch.bfloat16)
    x, to_y = (numbers(42, width, seed=30, dtype=torch.bfloat16) for width in (64, group.outputs))
    added, tiles = numbers(42, group.outputs, seed=32, dtype=residual), [slice(0, 42)]
    found = by_product(product_of(group, torch.bfloat16), x, to_y, tiles, {}, added)
    assert found[0].dtype == residual
    assert_close(found, plainly(group, x, to_y, tiles, added), torch.bfloat16)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_input_that_exists_already_is_left_alone(kind):
    group = group_of(kind, 64, torch.float32)
    product, rows = product_of(group, torch.float32), slice(0, 42)
    x, to_y = numbers(42, 64, seed=30), numbers(42, group.outputs, seed=31)
    before, y, to_x = (x.clone(), to_y.clone()), torch.empty_like(to_y), torch.empty_like(x)
    product.forward(product.input_from(x), rows, y, None)
    operand = product.gradient_from(to_y)
    product.input_gradient(operand, rows, to_x)
    sums = AdapterGradients(choose(DEVICE).operations)
    product.adapter_gradients(operand, rows, x, {}, sums)
    assert_close((y, to_x, *sums.of(group.adapters)), plainly(group, x, to_y, [rows]), torch.float32)
    assert torch.equal(x, before[0])
    assert torch.equal(to_y, before[1])
    assert (operand is to_y) == (not group.adapters), "copied only where something belongs beside it"


def test_adapters_have_gradients_where_nothing_before_the_layer_is_trained():
    group = group_of("dropout", 64, torch.float32)
    product, rows = product_of(group, torch.float32), slice(0, 42)
    x, to_y = numbers(42, 64, seed=30), numbers(42, group.outputs, seed=31)
    operand, sums = product.gradient_from(to_y), AdapterGradients(choose(DEVICE).operations)
    product.input_gradient(operand, rows, None)
    product.adapter_gradients(operand, rows, x, {}, sums)
    _, _, *expected = plainly(group, x, to_y, [rows])
    assert_close(sums.of(group.adapters), expected, torch.float32)


def test_dropout_masks_have_the_rate_and_differ_between_projections_and_tiles():
    group = group_of("dropout", 64, torch.float32)
    x = torch.empty(431, 64, device=DEVICE)
    first, undropped = masks(group, x, slice(0, 431))
    later, _ = masks(group, x, slice(431, 862))
    assert (first == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert first.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(undropped, torch.ones_like(x))
    assert not torch.equal(first, later)
    other = dropout(torch.ones_like(x), group.adapters[0], SEED + 4 * INDEX + 1)
    assert not torch.equal(first, other)


PRODUCTS = {"mm", "addmm", "matmul", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "einsum", "linear", "_scaled_mm"}


def multiplications(source):
    """Lines with a matrix product."""
    for node in ast.walk(ast.parse(source)):
        called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        if called in PRODUCTS or isinstance(getattr(node, "op", None), ast.MatMult):
            yield node.lineno


@pytest.mark.parametrize("name", ["layer.py", "layer_function.py", "layer_forward.py"])
def test_the_layer_function_never_multiplies(name):
    assert sorted(multiplications("y = x @ w\ntorch.mm(x, w, out=y)\nx.matmul(w)\ny @= w\n")) == [1, 2, 3, 4]
    source = pathlib.Path(nybble.engine.__file__).with_name(name).read_text()
    assert not list(multiplications(source)), f"{name} multiplies"
