"""Pages: nobody's are handed out twice, none are lost, and a shared one holds what the sequence begins with."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.generate.decoder.pages import PAGE, PagePool, pages_of

WORDS = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4)  # of 64 tokens each: many sequences begin alike


class Ledger:
    """What each page holds, by the sequences that were computed into it."""

    def __init__(self, count):
        self.pool, self.content = PagePool(count), {}
        self.open = []

    def start(self, words, adapter, count):
        ids = [word * 1000 + place for word in words for place in range(PAGE)] + [7]
        found = self.pool.reserve(ids, adapter, count)
        if found is None:
            return None
        pages, shared = found
        assert len(pages) == len(set(pages)) == count
        assert shared * PAGE < len(ids), "the last token is left to compute"
        for index, page in enumerate(pages[:shared]):
            assert self.content[page] == (adapter, tuple(ids[: (index + 1) * PAGE])), (
                "a shared page holds the beginning"
            )
        owned = {page for _, own, _, mine in self.open for page in own[mine:]}
        assert not owned & set(pages[shared:]), "a page that somebody writes to is nobody else's"
        for index, page in enumerate(pages[shared:], shared):
            self.content[page] = (adapter, tuple(ids[: (index + 1) * PAGE]))
        self.open.append((ids, pages, adapter, shared))
        return pages

    def end(self, which, computed):
        ids, pages, adapter, _ = self.open.pop(which % len(self.open))
        self.pool.release(pages, ids[:computed], adapter)


@settings(max_examples=200)
@given(
    st.integers(4, 12),
    st.lists(st.tuples(WORDS, st.sampled_from([None, "one"]), st.booleans(), st.integers(0, 20)), max_size=40),
)
def test_pages_are_shared_by_content_and_never_lost(count, events):
    ledger = Ledger(count)
    for words, adapter, ends, which in events:
        if ends and ledger.open:
            ledger.end(which, 10**6)
        else:
            ledger.start(words, adapter, len(words) + 1)
    while ledger.open:
        ledger.end(0, 10**6)
    assert ledger.start([9] * (count - 1), "other", count) is not None, "every page comes back"


def test_a_sequence_shares_whole_pages_of_its_own_adapter_only():
    ledger = Ledger(8)
    first = ledger.start([1, 2], None, 3)
    ledger.end(0, 10**6)
    same = ledger.start([1, 2], None, 3)
    assert same[:2] == first[:2]
    assert ledger.open[-1][3] == 2
    ledger.start([1, 2], "one", 3)
    assert ledger.open[-1][3] == 0


def test_what_was_not_computed_is_not_kept():
    ledger = Ledger(8)
    ledger.start([1, 2, 3], None, 4)
    ledger.end(0, PAGE + 10)  # cancelled in the second page
    ledger.start([1, 2, 3], None, 4)
    assert ledger.open[-1][3] == 1


def test_the_beginning_used_longest_ago_makes_room():
    ledger = Ledger(6)
    for words in ([1], [2], [3]):
        ledger.start(words, None, 2)
        ledger.end(0, 10**6)
    ledger.start([1], None, 2)  # used again
    ledger.end(0, 10**6)
    ledger.start([4, 5, 6], None, 4)
    ledger.end(0, 3)
    assert ledger.start([1], None, 2) is not None
    assert ledger.open[-1][3] == 1
    ledger.start([2], None, 2)
    assert ledger.open[-1][3] == 0


@given(st.integers(0, 10**6))
def test_pages_hold_what_they_were_counted_for_and_no_page_more(tokens):
    assert tokens <= pages_of(tokens) * PAGE < tokens + PAGE
