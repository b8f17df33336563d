"""Grammars by llguidance, an optional package: from JSON schemas, and which tokens they let come next."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from nybble.generate.constraint import WORD, Constrain, GrammarError, Mask, mask_words
from nybble.generate.request import Request

try:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance.hf import from_tokenizer

    INSTALLED = True
except ImportError:  # the extra `structured`
    INSTALLED = False

ANY = numpy.uint32(0xFFFFFFFF)  # 32 tokens that may all come next
# White space between two parts of a JSON text: any amount would let a model write nothing else until its limit.
OPTIONS: Any = {"whitespace_pattern": r"[ \n\r\t]{0,20}"}
MOST_CHARACTERS = 65_536  # of a schema: one with 2,000 properties, 60,000 characters, takes 0.5 s
KEPT = 16  # grammars: several answers to one request have the same, and often the next request, too


class SchemaError(ValueError):
    """A JSON schema that cannot be followed; the message says why."""


def json_grammar(schema: Mapping[str, Any] | bool) -> str:
    """The grammar of the JSON texts that a schema allows, in llguidance's own form.

    Raises:
        SchemaError: it is no schema, no text fits it, or it is too large or uses what llguidance does not support.
    """
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema_text(schema), overrides=OPTIONS)
    except ValueError as error:  # NaN, which JSON does not have
        raise SchemaError(str(error)[:300]) from None
    return checked(grammar)


def schema_text(schema: Mapping[str, Any] | bool) -> str:
    """A schema as JSON.

    Raises:
        SchemaError: it is too long.
    """
    text = json.dumps(schema)
    if len(text) > MOST_CHARACTERS:
        raise SchemaError(f"the schema has {len(text):,} characters, more than {MOST_CHARACTERS:,}")
    return text


def checked(grammar: str) -> str:
    """A grammar that llguidance can follow, unchanged.

    Raises:
        SchemaError: it cannot.
    """
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    matcher.compute_bitmask()
    matcher.consume_tokens(matcher.compute_ff_tokens())  # such as {, behind which some are found to be too large
    matcher.compute_bitmask()
    if matcher.is_error():
        told, panicked, _ = matcher.get_error().partition("<backtrace>")
        raise SchemaError("it is too large for llguidance" if panicked else " ".join(told.split())[:300])
    return grammar


class GrammarState:
    """See `nybble.generate.constraint.Constraint`.

    Args:
        matcher: of the grammar, at its beginning.
        words: of a mask of the tokenizer.
        stop_ids: tokens that end the answer; they may come exactly where the grammar may end.

    Raises:
        GrammarError: the grammar cannot be followed.
    """

    def __init__(self, matcher: LLMatcher, words: int, stop_ids: frozenset[int]) -> None:
        self._matcher, self._words = matcher, words
        self._stop_ids = sorted(stop_ids)
        self.error = ""
        self._note_error()
        if self.error:
            raise GrammarError(self.error)

    def fill(self, mask: Mask) -> None:
        """See `Constraint.fill`."""
        own = numpy.zeros(self._words, dtype=numpy.uint32)
        if not self.error and not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
            self._note_error()
        if self.error:
            mask.fill(ANY)
            return
        mask[:] = own[: len(mask)]
        may_end = self._matcher.is_accepting()
        for token_id in self._stop_ids:
            bit = numpy.uint32(1 << token_id % WORD)
            mask[token_id // WORD] &= ANY ^ bit
            mask[token_id // WORD] |= bit if may_end else numpy.uint32(0)
        if not mask.any():
            self.error = "no token of the model can continue what the grammar asks for"
            mask.fill(ANY)

    def take(self, token_id: int) -> None:
        """See `Constraint.take`."""
        self._matcher.consume_token(token_id)
        self._note_error()

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = f"the grammar cannot be followed: {' '.join(self._matcher.get_error().split())[:300]}"


def make_constrain(tokenizers: Mapping[str | None, PreTrainedTokenizerBase], vocabulary: int) -> Constrain | None:
    """What makes the constraints of a generator; None where llguidance is not installed.

    Args:
        tokenizers: by adapter, None for the base.
        vocabulary: logits of a row.
    """
    if not INSTALLED:
        return None
    known: dict[int, LLTokenizer] = {}
    for tokenizer in tokenizers.values():
        if id(tokenizer) not in known:
            size = max(vocabulary, len(tokenizer))
            known[id(tokenizer)] = from_tokenizer(tokenizer, n_vocab=size, eos_token=tokenizer.eos_token_id)

    @functools.lru_cache(maxsize=KEPT)
    def beginning(tokenizer: int, grammar: str) -> LLMatcher:
        return LLMatcher(known[tokenizer], grammar, log_level=0)

    def constrain(request: Request) -> GrammarState:
        assert request.grammar is not None, "only requests with a grammar are constrained"
        tokenizer = id(tokenizers[request.adapter])
        matcher = beginning(tokenizer, request.grammar).deep_copy()
        return GrammarState(matcher, mask_words(known[tokenizer].vocab_size), request.stop_ids)

    return constrain
