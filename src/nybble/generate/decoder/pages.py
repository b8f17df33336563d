"""Pages of the key-value cache: which are free, whose they are, and which beginnings they hold for sequences to come."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 64  # tokens


def pages_of(tokens: int) -> int:
    """Pages that so many tokens need."""
    return -(-tokens // PAGE)


@dataclass(eq=False)
class CachedPage:
    """A full page whose keys and values a later sequence may share."""

    number: int
    key: tuple[int, tuple[int, ...]]
    """The serial number of the page before it, and its own tokens."""
    serial: int
    """Of what is in it: unlike `number` it never comes again."""
    users: int = 0


class PagePool:
    """Pages by number.

    Full pages of finished sequences stay, by their tokens and all tokens before them, until their room is needed: the one that
    was used longest ago goes first.

    Args:
        count: of pages.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[tuple[int, tuple[int, ...]], CachedPage] = OrderedDict()
        self._by_number: dict[int, CachedPage] = {}
        self._serials = itertools.count()
        self._roots: dict[str | None, int] = {}

    def reserve(self, ids: Sequence[int], adapter: str | None, count: int) -> tuple[list[int], int] | None:
        """Pages for a sequence, and how many of the first hold its beginning already; None where there are not enough.

        Args:
            ids: the prompt; the page of its last token is never shared.
            adapter: sequences of different adapters share nothing.
            count: of pages.
        """
        shared = self._match(ids, adapter)
        for page in shared:
            page.users += 1
        needed = count - len(shared)
        if not self._make_free(needed):
            for page in shared:
                page.users -= 1
            return None
        own = [self._free.pop() for _ in range(needed)]
        return [*(page.number for page in shared), *own], len(shared)

    def release(self, pages: Sequence[int], ids: Sequence[int], adapter: str | None) -> None:
        """Give a sequence's pages back; full ones are kept for others.

        Args:
            pages: of `reserve`.
            ids: the tokens that are in them.
            adapter: of the sequence.
        """
        parent = self._root(adapter)
        for index, number in enumerate(pages):
            tokens = tuple(ids[index * PAGE : (index + 1) * PAGE])
            known = self._by_number.get(number)
            if known is not None:
                known.users -= 1
            elif len(tokens) == PAGE and (parent, tokens) not in self._cached:
                known = CachedPage(number, (parent, tokens), next(self._serials))
                self._cached[known.key] = self._by_number[number] = known
            else:
                self._free.append(number)
            if len(tokens) == PAGE and (parent, tokens) in self._cached:
                parent = self._cached[parent, tokens].serial

    def _match(self, ids: Sequence[int], adapter: str | None) -> list[CachedPage]:
        parent, found = self._root(adapter), []
        for start in range(0, len(ids) - PAGE, PAGE):
            page = self._cached.get((parent, tuple(ids[start : start + PAGE])))
            if page is None:
                break
            self._cached.move_to_end(page.key)
            found.append(page)
            parent = page.serial
        return found

    def _make_free(self, needed: int) -> bool:
        unused = [page for page in self._cached.values() if not page.users] if needed > len(self._free) else []
        for page in unused[: max(0, needed - len(self._free))]:
            del self._cached[page.key], self._by_number[page.number]
            self._free.append(page.number)
        return needed <= len(self._free)

    def _root(self, adapter: str | None) -> int:
        return self._roots.setdefault(adapter, -1 - len(self._roots))
