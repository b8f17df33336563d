"""Every kernel against reference.py on shapes that do not divide: in Triton's interpreter on a CPU, or on the GPU."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.kernels import operations as ops
from nybble.kernels import reference
from nybble.kernels import triton as kernels
from nybble.kernels.reference import LowRank, Nested
from tests.conftest import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates where a GPU rounds to bfloat16 (triton 3.9, runtime/interpreter.py cast_impl).
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# Both round once from float32, so they may differ in the last place where float32 sums run in another order:
# one unit in the last place of the largest number compared.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.isfinite().all(), "not every element was written"
    bound = TOLERANCE[ours.dtype] * theirs.float().abs().max().item()
    difference = (ours.float() - theirs.float()).abs()
    worst = difference.max().item()
    assert worst <= bound, f"{worst} > {bound} at {(difference == worst).nonzero()[0].tolist()}"


def numbers(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def poisoned(rows, columns, dtype, room=8):
    """A view with gaps between its rows; what was not written is not a number."""
    return torch.full((rows, columns + room), float("nan"), device=DEVICE, dtype=dtype)[:, :columns]


def test_kernels_and_reference_offer_the_same_operations():
    operations = {name: member for name, member in vars(ops.Operations).items() if not name.startswith("_")}
    assert sorted(kernels.__all__) == sorted(operations)
    for name, member in operations.items():
        ours, theirs = (inspect.signature(getattr(implementation, name)) for implementation in (kernels, reference))
        _, *parameters = inspect.signature(member).parameters.values()  # without self
        assert list(ours.parameters.values()) == list(theirs.parameters.values()) == parameters, name
        assert ours.return_annotation == theirs.return_annotation == inspect.signature(member).return_annotation, name
        assert f"`reference.{name}`" in member.__doc__, name


def test_the_choice_says_what_and_why(monkeypatch):
    on_cpu = ops.choose(torch.device("cpu"))
    assert on_cpu.operations is reference
    assert str(on_cpu) == "plain torch: Triton's kernels do not run on cpu"
    on_cuda = ops.choose(torch.device("cuda"))
    assert (on_cuda.operations, str(on_cuda)) == (kernels, "Triton kernels")
    monkeypatch.setattr(ops, "TRITON_MISSING", "No module named 'triton'")
    assert ops.choose(torch.device("cuda")).operations is reference
    assert str(ops.choose(torch.device("cuda"))) == "plain torch: No module named 'triton'; pip install triton"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("rows, columns", [(6, 64), (42, 128), (123, 192), (31, 576)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantise_is_bitsandbytes_to_the_bit(rows, columns, kind, double, dtype):
    weight = numbers(rows, columns, dtype=dtype) * 0.02
    packed, state = bitsandbytes.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    expected = bitsandbytes.dequantize_4bit(packed, state)
    nested = None
    if state.nested:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    for room in (kernels, reference):
        out = poisoned(rows, columns, dtype)
        room.dequantize(packed, state.absmax, state.code, state.blocksize, nested, out)
        assert torch.equal(out, expected), room.__name__


@pytest.mark.parametrize("ranks, outputs", [([3], [42]), ([16, 16, 16], [42, 6, 6]), ([8, 2], [31, 31]), ([4], [0])])
def test_adapters_are_written_around_the_weights(ranks, outputs):
    inputs, total = 123, sum(outputs) + 5
    adapters, output, rank = [], 0, 0
    for r, n in zip(ranks, outputs, strict=True):
        adapters.append(LowRank(numbers(r, inputs), numbers(n, r), 0.5, output, rank))
        output, rank = output + n, rank + r
    padded = -(-rank // 8) * 8
    matrices = []
    for room in (kernels, reference):
        matrix = torch.zeros(total + padded, inputs + padded, device=DEVICE, dtype=DTYPES[-1])
        matrix[:total, inputs:] = matrix[total:, :inputs] = float("nan")
        room.pack_adapters(adapters, matrix[:total, inputs:], matrix[total:, :inputs])
        matrices.append(matrix)
    assert torch.equal(*matrices)
    assert matrices[0].isfinite().all()


@pytest.mark.parametrize("rows, hidden", [(1, 6), (42, 123), (7, 431), (3, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_forward_and_backward(rows, hidden, dtype):
    x, update, weight = numbers(rows, hidden, dtype=dtype), numbers(rows, hidden, dtype=dtype, seed=1), numbers(hidden)
    ours, theirs = poisoned(rows, hidden, dtype), poisoned(rows, hidden, dtype)
    kernels.rms_norm(x, weight, 1e-5, ours)
    reference.rms_norm(x, weight, 1e-5, theirs)
    assert_close(ours, theirs)
    sums = [poisoned(rows, hidden, dtype), poisoned(rows, hidden, dtype)]
    kernels.add_rms_norm(x, update, weight, 1e-5, sums[0], ours)
    reference.add_rms_norm(x, update, weight, 1e-5, sums[1], theirs)
    assert torch.equal(*sums)
    assert_close(ours, theirs)
    for residual in (x, None):
        kernels.rms_norm_backward(update, x, weight, 1e-5, residual, ours)
        reference.rms_norm_backward(update, x, weight, 1e-5, residual, theirs)
        assert_close(ours, theirs)


def test_norm_backward_is_its_gradient():
    x, weight, change = numbers(6, 42).double(), numbers(42).double(), numbers(6, 42, seed=3)
    x.requires_grad_(True)
    normed = torch.nn.functional.rms_norm(x, (42,), weight, 1e-5)
    normed.backward(change.double())
    ours = poisoned(6, 42, torch.float32)
    reference.rms_norm_backward(change, x.detach().float(), weight.float(), 1e-5, None, ours)
    assert_close(ours, x.grad)


@pytest.mark.parametrize("query, key, size", [(3, 1, 6), (9, 3, 64), (5, 5, 42), (2, 1, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_positions_forward_and_backward(query, key, size, dtype):
    rows, positions, first = 31, 12, 5
    width = (query + 2 * key) * size
    angles = numbers(positions, size)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    start = numbers(rows, width, dtype=dtype)
    outs = []
    for room in (kernels, reference):
        out = poisoned(rows, width, dtype)
        out.copy_(start)
        room.rope(out, cosine, sine, query + key, size, first)
        outs.append(out)
    assert_close(*outs)
    assert torch.equal(outs[0][:, (query + key) * size :], start[:, (query + key) * size :]), "a value was rotated"
    gradients = tuple(numbers(rows, heads * size, dtype=dtype, seed=heads) for heads in (query, key, key))
    backs = []
    for room in (kernels, reference):
        out = poisoned(rows, width, dtype)
        room.rope_backward(gradients, cosine, sine, size, first, out)
        backs.append(out)
    assert_close(*backs)


def test_rotary_positions_are_transformers_and_backward_is_their_transpose():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, size, rows = 3, 42, 12
    angles = numbers(rows, size // 2).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    start, change = numbers(rows, 3 * heads * size), numbers(rows, 3 * heads * size, seed=1)
    theirs, _ = apply_rotary_pos_emb(
        *[start[:, : heads * size].view(1, rows, heads, size)] * 2, cosine[None], sine[None], 2
    )
    ours = start.clone()
    reference.rope(ours, cosine, sine, 2 * heads, size, 0)
    assert_close(ours[:, : heads * size], theirs.reshape(rows, -1))
    back = torch.empty_like(start)
    reference.rope_backward(change.split(heads * size, dim=1), cosine, sine, size, 0, back)
    torch.testing.assert_close((ours * change).sum(), (start * back).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, width", [(1, 6), (42, 123), (6, 1431)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_forward_and_backward(rows, width, dtype):
    gate_up = poisoned(rows, 2 * width, dtype).copy_(3 * numbers(rows, 2 * width, dtype=dtype))
    ours, theirs = poisoned(rows, width, dtype), poisoned(rows, width, dtype)
    kernels.swiglu(gate_up, ours)
    reference.swiglu(gate_up, theirs)
    assert_close(ours, theirs)
    change = numbers(rows, width, dtype=dtype, seed=2)
    pairs = []
    for room in (kernels, reference):
        gradient, inputs = change.clone(), gate_up.clone()
        room.swiglu_backward(gradient, inputs)
        pairs.append((gradient, inputs))
    assert_close(pairs[0][0], pairs[1][0])
    assert_close(pairs[0][1], pairs[1][1])
    assert_close(pairs[0][0], theirs)


def test_swiglu_backward_is_its_gradient():
    leaf = numbers(6, 2 * 42).double().requires_grad_(True)
    gate, up = leaf.chunk(2, dim=-1)
    change = numbers(6, 42, seed=5)
    (torch.nn.functional.silu(gate) * up).backward(change.double())
    ours = leaf.detach().float()
    reference.swiglu_backward(change.clone(), ours)
    assert_close(ours, leaf.grad)


@pytest.mark.parametrize("rows, vocabulary", [(1, 6), (42, 431), (6, 9001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_and_its_gradient(rows, vocabulary, dtype):
    logits = 4 * numbers(rows, vocabulary, dtype=dtype)
    targets = torch.arange(rows, device=DEVICE) * 7 % vocabulary
    targets[::3] = -100
    leaf = logits.double().requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(leaf, targets, ignore_index=-100, reduction="none")
    expected.sum().backward()
    for room in (kernels, reference):
        gradients = logits.clone()
        losses = torch.full((rows,), float("nan"), device=DEVICE)
        room.cross_entropy(gradients, targets, losses)
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        assert (gradients[::3] == 0).all()
        bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert (gradients.double() - leaf.grad).abs().max() <= bound  # gradients lie between -1 and 1


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from(DTYPES))
def test_norm_of_any_shape(rows, hidden, dtype):
    x, weight = numbers(rows, hidden, dtype=dtype), numbers(hidden)
    ours, theirs = poisoned(rows, hidden, dtype), poisoned(rows, hidden, dtype)
    kernels.rms_norm(x, weight, 1e-5, ours)
    reference.rms_norm(x, weight, 1e-5, theirs)
    assert_close(ours, theirs)


def test_every_kernel_compiles_for_turing_ampere_and_hopper_and_those_for_fp8_for_ada():
    """The interpreter takes what the compiler refuses; the compiler needs no card."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("bytes of PTX") == 57
