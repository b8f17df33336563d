"""The order in which layers are used, which of them are streamed, and what the two buffers have."""

from __future__ import annotations

import itertools

import pytest
import torch

from nybble.weights.copier import LARGEST_BLOCK, blocks_of
from nybble.weights.packed import PackedLayer, packed_bytes
from nybble.weights.staging import Staging, order_of_use
from nybble.weights.streamed import streamed_numbers
from tests.engine.streaming import SynchronousCopier


@pytest.mark.parametrize(
    "layer, passing, expected",
    [
        (0, "forward", [0, 1, 2, 3, 3, 2, 1, 0]),
        (2, "forward", [2, 3, 3, 2, 1, 0]),
        (2, "inference", [2, 3, 0, 1, 2, 3]),
        (2, "backward", [2, 1, 0, 0, 1, 2, 3]),
        (0, "backward", [0, 0, 1, 2, 3]),
    ],
)
def test_the_order_of_use_turns_at_both_ends(layer, passing, expected):
    assert list(order_of_use(layer, 4, passing)) == expected


def test_resident_layers_are_spread_evenly():
    assert streamed_numbers(8, 0) == list(range(8))
    assert streamed_numbers(8, 8) == []
    assert streamed_numbers(8, 4) == [0, 2, 4, 6]
    for count, resident in itertools.product((1, 5, 32, 80), range(33)):
        if resident <= count:
            numbers = streamed_numbers(count, resident)
            assert len(set(numbers)) == count - resident
            assert set(numbers) <= set(range(count))
            gaps = [after - before for before, after in itertools.pairwise(numbers)]
            assert not gaps or max(gaps) - min(gaps) <= 1
    with pytest.raises(AssertionError, match="9 of 8 layers"):
        streamed_numbers(8, 9)


class Recorder(SynchronousCopier):
    """Records which layer is copied into which buffer, by the first byte and the address."""

    def __init__(self):
        super().__init__()
        self.copied = []

    def copy(self, source, target, after):
        super().copy(source, target, after)
        self.copied.append((int(source[0]), target.data_ptr()))


def layer_of(number, size=64):
    linear = torch.nn.Linear(8, size // 8, bias=False)
    linear.weight = torch.nn.Parameter(torch.full((size // 8, 8), number, dtype=torch.uint8), requires_grad=False)
    return PackedLayer([linear], torch.empty(packed_bytes([linear]), dtype=torch.uint8))


def test_the_next_layer_s_copy_goes_where_neither_layer_is():
    copier = Recorder()
    staging = Staging({number: layer_of(number) for number in range(4)}, 4, copier)
    assert staging.nbytes == 2 * 256
    step = [(n, "forward") for n in range(4)] + [(n, "backward") for n in reversed(range(4))]
    seen = []
    for number, passing in step * 2:
        before = len(copier.copied)
        buffer = staging.begin(number, passing)
        assert int(buffer[0]) == number
        places = {place for _, place in copier.copied[before:]}
        assert before == 0 or buffer.data_ptr() not in places, "the next layer may not be copied over this one"
        seen.append([layer for layer, _ in copier.copied[before:]])
    first, second = seen[:8], seen[8:]
    assert first == [[0, 1], [2], [3], [], [], [1], [0], []]
    assert second == [[], [2], [3], [], [], [1], [0], []]


def test_resident_layers_between_let_the_next_copy_start_as_soon_as_a_buffer_is_free():
    copier = Recorder()
    staging = Staging({number: layer_of(number) for number in (0, 2, 4)}, 6, copier)
    assert staging.begin(0, "forward") is not None
    assert [layer for layer, _ in copier.copied] == [0, 2]
    assert staging.begin(1, "forward") is None, "a resident layer has nothing staged"
    assert [layer for layer, _ in copier.copied] == [0, 2, 4]


def test_layers_of_different_sizes_share_the_buffers():
    layers = {0: layer_of(1, 64), 1: layer_of(2, 4096), 2: layer_of(3, 512)}
    staging = Staging(layers, 3, SynchronousCopier())
    assert staging.nbytes == 2 * 4096
    for number in (0, 1, 2, 1, 0):
        assert torch.equal(staging.begin(number, "inference")[: layers[number].buffer.nbytes], layers[number].buffer)


def test_nothing_is_allocated_where_all_layers_are_resident():
    assert Staging({}, 4, SynchronousCopier()).nbytes == 0
    assert Staging({2: layer_of(2)}, 4, SynchronousCopier()).nbytes == 256


@pytest.mark.parametrize("size, count", [(104_300_000, 32), (163_000_000, 40), (441_000_000, 80), (1 << 20, 7), (3, 1)])
def test_blocks_of_pinned_memory_nearly_fill_powers_of_two(size, count):
    """Unless there is but one."""
    blocks = blocks_of([size] * count)
    assert [size for block in blocks for size in block] == [size] * count
    taken = sum(1 << (sum(block) - 1).bit_length() for block in blocks)
    assert count == 1 or taken < 1.12 * size * count
    assert blocks_of([]) == []
    large = [sum(block) for block in blocks_of([441 * 10**6] * 80)]
    assert max(large) <= LARGEST_BLOCK
    assert sum(1 << (size - 1).bit_length() for size in large) <= 1.05 * sum(large)
    mixed = [5, 900, 3, 3, 1000, 1]
    assert [size for block in blocks_of(mixed) for size in block] == mixed
