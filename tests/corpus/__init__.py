"""Damaged inputs by kind, each with what must come of it: tests/test_corpus_*.py run them."""
