"""How a product is laid out on a card: tiles, warps, chunks of K. Plain numbers, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BLOCK = 64  # numbers with one scale
SLAB = 16  # outputs of a tensor core's tile
MAX_ROWS = 64
MOST_WARPS = 11  # 352 threads


@dataclass(frozen=True)
class ProductLayout:
    """The constants that product.cu is compiled with, and how K is cut."""

    tiles: int
    """Of eight rows of x."""
    warp_blocks: int
    """Blocks of K that a warp has: 4, or 2 where x would not fit into registers."""
    warps: int
    min_blocks: int
    """Blocks of threads that are resident on a multiprocessor."""
    stages: int
    chunks: int
    """Of K; each has sums of its own, which the next kernel adds up in their order."""

    @property
    def chunk_blocks(self) -> int:
        """Blocks of K in a chunk."""
        return self.warps * self.warp_blocks

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def defines(self) -> Mapping[str, int]:
        """For the compiler."""
        return {
            "NT": self.tiles, "KI": self.warp_blocks, "WARPS": self.warps, "MIN_BLOCKS": self.min_blocks, "STAGES": self.stages,
        }  # fmt: skip

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, as product.cu lays it out."""
        outputs = 128 * self.tiles
        split = 4 if self.threads >= 4 * outputs else 2 if self.threads >= 2 * outputs else 1
        words = 8192 + self.warps * self.stages * self.warp_blocks * 128 + 256
        words += 2 * self.warps * (outputs + 32 // split) + 8 * self.tiles
        return 4 * words


def product_layout(rows: int, blocks: int, shared_limit: int) -> ProductLayout:
    """The layout for a number of rows.

    Args:
        rows: of x, 1 to 64.
        blocks: of 64 numbers, in K.
        shared_limit: bytes of shared memory that a block may have.
    """
    tiles = -(-rows // 8)
    warp_blocks = 4 if tiles <= 4 else 2
    twice = tiles == 1
    groups = -(-blocks // warp_blocks)
    most = MOST_WARPS if tiles == 2 else 8
    # Fewest idle warps, then fewest chunks: each chunk writes its sums, which the next kernel reads.
    warps = min(range(min(groups, 8), min(groups, most) + 1), key=lambda w: (-(-groups // w) * (w + 0.1), -w))
    for stages in (2,) if twice else (3, 2):
        for fewer in range(warps, 0, -1):
            layout = ProductLayout(tiles, warp_blocks, fewer, 2 if twice else 1, stages, -(-groups // fewer))
            if layout.shared_bytes <= shared_limit and (stages == 2 or fewer == warps):
                return layout
    raise ValueError(f"{rows} rows do not fit into {shared_limit} bytes of shared memory")


def attention_groups(head_size: int, group: int) -> tuple[int, int]:
    """Query heads of a block, and blocks for one key-value head.

    Args:
        head_size: numbers of a head.
        group: query heads to a key-value head.
    """
    most = 4 if head_size <= 128 else 2
    together = next(count for count in range(most, 0, -1) if group % count == 0)
    return together, group // together


def attention_shares(rows: int, kv_blocks: int, multiprocessors: int) -> int:
    """Into how many shares a row's pages may be cut, so that few rows, too, fill the card; four blocks fit on a multiprocessor.

    Args:
        rows: of the batch.
        kv_blocks: key-value heads times blocks for each.
        multiprocessors: of the card.
    """
    return max(1, min(64, 4 * multiprocessors // (rows * kv_blocks)))
