"""The kernels that write e4m3 against their reference, to the bit: in Triton's interpreter on a CPU, or on the GPU."""

from __future__ import annotations

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.kernels import reference
from nybble.kernels import triton as kernels
from nybble.kernels.reference import LowRank, Nested
from nybble.kernels.scaled import E4M3, Balance, ScaledRows, rank_exponent
from tests.kernels.test_kernels import DEVICE, DTYPES, numbers

ROOMS = (kernels, reference)
NAN = 0x7F  # in e4m3
LAST_PLACE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""How far numbers may be apart, over the largest one."""


@pytest.fixture(autouse=True, scope="module")
def rounding():
    """Triton's interpreter does not carry where rounding to e4m3 reaches the next power of two, and cuts subnormals off
    (triton 3.7, runtime/interpreter.py _convert_float), so here it rounds as torch does. A GPU rounds itself."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def rounded(numbers, from_type, to_type, mode):
        if str(to_type) != "fp8e4nv":
            return original(numbers, from_type, to_type, mode)
        plain = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))
        return plain.to(E4M3).view(torch.uint8).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


def empty_rows(rows, width, dtype=torch.float32, room=16):
    """Nothing is written yet: everything is NaN."""
    values = torch.full((rows, width + room), NAN, dtype=torch.uint8, device=DEVICE).view(E4M3)
    wide = torch.full((rows, width + 8), float("nan"), dtype=dtype, device=DEVICE)[:, :width]
    return ScaledRows(wide, values, torch.full((rows, 1), float("nan"), device=DEVICE))


def assert_same(ours, theirs):
    """Bit for bit, not-a-number included."""
    assert torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))
    assert torch.equal(ours.scales.view(torch.int32), theirs.scales.view(torch.int32))


def assert_close_rows(ours, theirs):
    """Rows whose wide numbers may differ in their last place: e4m3 then differs by at most one step, in few numbers."""
    error = (ours.wide.float() - theirs.wide.float()).abs().max() / theirs.wide.float().abs().max()
    assert error < LAST_PLACE[ours.wide.dtype]
    width = ours.wide.shape[1]
    found, expected = (each.values[:, :width].float() * each.scales for each in (ours, theirs))
    assert (found != expected).float().mean() < 0.01
    assert ((found - expected).abs() <= expected.abs() / 8 + theirs.scales * 2**-9).all()
    assert (ours.values[:, width:].view(torch.uint8) == NAN).all(), "written beyond the row"


def odd_rows(rows, width):
    """Rows of all sizes, with one of zeros, one with NaN and one with infinity."""
    wide = numbers(rows, width) * torch.logspace(-30, 30, rows, device=DEVICE)[:, None]
    wide[3], wide[5, width // 2], wide[6, 0] = 0.0, float("nan"), float("-inf")
    return wide


@pytest.mark.parametrize("rows, width", [(7, 6), (42, 123), (31, 431), (9, 4096)])
def test_rows_are_quantised_alike(rows, width):
    pair = []
    for room in ROOMS:
        target = empty_rows(rows, width)
        target.wide.copy_(odd_rows(rows, width))
        room.quantize_rows(target)
        pair.append(target)
    assert_same(*pair)


def test_a_scale_brings_the_largest_number_between_128_and_256():
    target = empty_rows(42, 123)
    target.wide.copy_(odd_rows(42, 123))
    reference.quantize_rows(target)
    whole = [row for row in range(42) if row not in (3, 5, 6)]
    values = target.values[whole, :123].float()
    assert ((values.abs().amax(dim=1) >= 128) & (values.abs().amax(dim=1) <= 256)).all()
    assert (target.scales[whole].log2() % 1 == 0).all()
    error = (values * target.scales[whole] - target.wide[whole]).abs()
    assert (error <= target.wide[whole].abs() / 16 + target.scales[whole] * 2**-10).all()


def test_zeros_stay_zeros_and_what_is_not_finite_shows_in_its_row_alone():
    target = empty_rows(12, 64)
    target.wide.copy_(odd_rows(12, 64))
    reference.quantize_rows(target)
    back = target.values[:, :64].float() * target.scales
    assert (back[3] == 0).all()
    assert back[[5, 6]].isnan().all()
    assert back[[0, 1, 2, 3, 4, 7, 8, 9, 10, 11]].isfinite().all()


@given(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False))
def test_any_number_is_within_a_sixteenth(number):
    target = empty_rows(1, 1)
    target.wide.fill_(number)
    reference.quantize_rows(target)
    back = (target.values[:, :1].float() * target.scales).item()
    assert abs(back - number) <= abs(number) / 16 + 2.0**-107


def bits(*numbers_):
    """As `pack_adapters` gives the largest magnitudes."""
    return torch.tensor(numbers_, device=DEVICE).view(torch.int32)


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("rows, ranks, width", [(42, 8, 32), (123, 24, 80), (6, 40, 128)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_operands_are_split_alike_and_their_product_is_precise(rows, ranks, width, own, size):
    """Left and right operand of T (s B)^T, with the scales of rows and of weights taken out again."""
    factor, typical = 3, 12  # the left one's numbers, over their rows' scale, are about 2^typical / 64
    left, right = numbers(ranks, rows).t() * 3, numbers(rows, ranks) * size
    scales = torch.full((rows, 1), 0.03125, device=DEVICE)
    largest = (right.abs().max().item(), 1 / 64)
    balance = Balance(bits(*(largest if own == 0 else largest[::-1])), own, factor, typical)
    pairs = []
    for room in ROOMS:
        outs = [
            torch.full((rows, width + 8), NAN, dtype=torch.uint8, device=DEVICE).view(E4M3)[:, :width] for _ in range(2)
        ]
        room.split(left, balance, scales, outs[0])
        room.split(right, balance, None, outs[1])
        pairs.append(outs)
    for ours, theirs in zip(*pairs, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert (ours.view(torch.uint8)[:, 3 * ranks :] == 0).all()
    found = (pairs[0][0].float() @ pairs[0][1].float().t()) * scales * 2.0**-factor
    expected = left @ right.t()
    assert (found - expected).norm() / expected.norm() < (0.005 if size >= 1e-3 else 0.3)


@given(
    st.floats(2.0**-30, 2.0**20, width=32),
    st.floats(2.0**-30, 2.0**20, width=32),
    st.integers(-20, 30),
    st.integers(0, 12),
)
def test_the_right_operand_never_saturates(own, other, factor, typical):
    exponent = rank_exponent(Balance(bits(own, other), 0, factor, typical)).item()
    assert own * 2.0 ** (factor - exponent) <= 448 or exponent == 40


def test_what_is_too_large_on_the_left_saturates_and_what_is_not_a_number_shows():
    source = torch.tensor([[1e9, -1e9, float("nan"), 1.0, 0, 0, 0, 0]], device=DEVICE)
    for room in ROOMS:
        out = torch.zeros((1, 32), dtype=E4M3, device=DEVICE)
        room.split(source, Balance(bits(1.0, 1.0), 0, 0, 0), torch.ones(1, 1, device=DEVICE), out)
        assert out[0, :2].float().tolist() == [448, -448]
        assert out[0, 2].isnan()
        assert out[0, 3] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_tell_their_largest_numbers(dtype):
    for size in (1.0, 0.0):
        adapters = [
            LowRank(numbers(4, 123), numbers(42, 4) * size, 0.5, 0, 0),
            LowRank(numbers(3, 123), numbers(6, 3) * size, 2.0, 42, 4),
        ]
        for room in ROOMS:
            up, down = (torch.empty(shape, dtype=dtype, device=DEVICE) for shape in ((48, 8), (8, 123)))
            largest = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
            room.pack_adapters(adapters, up, down, largest)
            assert largest.view(torch.float32).tolist() == [
                up.float().abs().max().item(),
                down.float().abs().max().item(),
            ]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("kind, double", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("rows, columns, block", [(6, 64, 64), (42, 192, 64), (130, 576, 64), (31, 512, 256)])
def test_dequantised_to_e4m3(rows, columns, block, kind, double, transposed):
    packed, state = bitsandbytes.quantize_4bit(
        numbers(rows, columns) * 0.02, quant_type=kind, compress_statistics=double, blocksize=block
    )
    plain = bitsandbytes.dequantize_4bit(packed, state)
    nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize) if double else None
    expected = (plain * 256).to(E4M3)
    expected = expected.t() if transposed else expected
    for room in ROOMS:
        out = torch.full((len(expected), expected.shape[1] + 16), NAN, dtype=torch.uint8, device=DEVICE).view(E4M3)
        view = out[:, : expected.shape[1]]
        room.dequantize_e4m3(packed, state.absmax, state.code, state.blocksize, nested, 256.0, transposed, view)
        # As numbers: bitsandbytes' kernel makes fp4's code 8 a zero with the other sign than its own table has.
        assert torch.equal(view.float(), expected.float()), room.__name__
        assert (out.view(torch.uint8)[:, expected.shape[1] :] == NAN).all()


@pytest.mark.parametrize("rows, hidden", [(6, 42), (42, 123), (3, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(rows, hidden, dtype):
    x, update, weight = numbers(rows, hidden, dtype=dtype), numbers(rows, hidden, dtype=dtype, seed=1), numbers(hidden)
    work = {
        "rms_norm": lambda room, out: room.rms_norm(x, weight, 1e-5, out),
        "add_rms_norm": lambda room, out: room.add_rms_norm(x, update, weight, 1e-5, torch.empty_like(x), out),
        "backward": lambda room, out: room.rms_norm_backward(update, x, weight, 1e-5, x, out),
        "backward alone": lambda room, out: room.rms_norm_backward(update, x, weight, 1e-5, None, out),
    }
    for call in work.values():
        pair = [empty_rows(rows, hidden, dtype) for _ in ROOMS]
        for room, out in zip(ROOMS, pair, strict=True):
            call(room, out)
        assert_close_rows(*pair)
        plain = torch.empty_like(x)
        call(kernels, plain)
        # A compiler lays the row out otherwise beside a target in e4m3, and then adds its squares up in another order.
        error = (plain.float() - pair[0].wide.float()).abs().max() / plain.float().abs().max()
        assert error <= (LAST_PLACE[dtype] if DEVICE == "cuda" else 0), (
            "the wide numbers are those of an ordinary target"
        )


@pytest.mark.parametrize("rows, width", [(6, 42), (42, 123), (5, 4431)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(rows, width, dtype):
    gate_up, change = 3 * numbers(rows, 2 * width, dtype=dtype), numbers(rows, width, dtype=dtype, seed=2)
    forward = [empty_rows(rows, width, dtype) for _ in ROOMS]
    backward, actives = [empty_rows(rows, 2 * width, dtype) for _ in ROOMS], []
    for room, out, back in zip(ROOMS, forward, backward, strict=True):
        room.swiglu(gate_up, out)
        back.wide.copy_(gate_up)
        active = change.clone()
        room.swiglu_backward(active, back)
        actives.append(active)
    assert_close_rows(*forward)
    assert_close_rows(*backward)
    assert torch.equal(actives[0], forward[0].wide)
    gradient, in_place = change.clone(), gate_up.clone()
    kernels.swiglu_backward(gradient, in_place)
    assert torch.equal(in_place, backward[0].wide)


@pytest.mark.parametrize("query, key, size", [(3, 1, 6), (9, 3, 64), (2, 1, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_backward(query, key, size, dtype):
    rows = 31
    angles = numbers(12, size)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    gradients = tuple(numbers(rows, heads * size, dtype=dtype, seed=heads) for heads in (query, key, key))
    width = (query + 2 * key) * size
    pair = [empty_rows(rows, width, dtype) for _ in ROOMS]
    for room, out in zip(ROOMS, pair, strict=True):
        room.rope_backward(gradients, cosine, sine, size, 5, out)
    assert_close_rows(*pair)
    plain = torch.empty(rows, width, dtype=dtype, device=DEVICE)
    kernels.rope_backward(gradients, cosine, sine, size, 5, plain)
    assert torch.equal(plain, pair[0].wide)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("rows, inputs, outputs", [(6, 64, 48), (123, 192, 176)])
def test_scaled_products(rows, inputs, outputs, fast):
    left, right = ((numbers(n, inputs) * 30).clamp(-448, 448).to(E4M3) for n in (rows, outputs))
    scales = torch.logspace(-3, 3, rows, base=2, device=DEVICE).exp2()[:, None].contiguous()
    out = [torch.empty(rows, outputs, dtype=torch.bfloat16, device=DEVICE) for _ in ROOMS]
    for room, target in zip(ROOMS, out, strict=True):
        room.scaled_product(left, scales, right, torch.full((1, outputs), 0.5, device=DEVICE), fast, target)
    error = (out[0].float() - out[1].float()).abs().amax() / out[1].float().abs().amax()
    assert error < (2**-6 if fast else 2**-8)  # Hopper's fast sums have 14 bits
