"""A tokenizer in llama.cpp's terms: tokens, scores, types, merges, and the name of its rules.

Everything is read from tokenizer.json, with which the run was trained. llama.cpp has rules for splitting words only
by name, so rules without a known name are refused: with other rules the model would get other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from nybble.data.text.template import puts_bos
from nybble.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's llama_token_type
# The regular expression by which Llama 3 splits words, from its tokenizer.json.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ADVICE = "use --to merged, and convert that with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Vocabulary:
    """The values of GGUF's keys tokenizer.ggml.*.

    Attributes:
        model: gpt2 (byte-level BPE) or llama (SentencePiece).
        pre: llama.cpp's name of the rules that split words; default for SentencePiece.
        tokens: the tokens by id; as many as the embedding has rows.
        types: llama.cpp's type of each token.
        scores: the score of each token, for SentencePiece; the highest is merged first.
        merges: pairs in order, for BPE.
        space_prefix: whether a space is put before a text.
        add_bos: whether the tokenizer itself puts BOS before a text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space_prefix: bool
    add_bos: bool


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer.

    Args:
        tokenizer: the run's tokenizer.
        rows: number of rows of the model's embedding.

    Raises:
        ModelError: llama.cpp's name of the rules is unknown, or there are more tokens than the embedding has rows.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre = kind_of(described)
    vocabulary = described["model"]["vocab"]
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    by_id = {number: text for text, number in vocabulary.items()} | {
        number: entry["content"] for number, entry in added.items()
    }
    if max(by_id) >= rows:
        raise ModelError(
            f"the tokenizer has token id {max(by_id)}, but the model has embeddings for ids 0 to {rows - 1:,}",
            fix="use the tokenizer that came with the weights",
        )
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in described["model"]["merges"]]
    special = set(tokenizer.all_special_ids)
    is_sentencepiece = model == "llama"
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=[by_id.get(number, f"[PAD{number}]") for number in range(rows)],
        types=[_type_of(number, by_id, added, special, described, is_sentencepiece) for number in range(rows)],
        scores=_scores(pairs, by_id, rows) if is_sentencepiece else [],
        merges=[] if is_sentencepiece else [" ".join(pair) for pair in pairs],
        space_prefix=is_sentencepiece and _prepends(described),
        add_bos=puts_bos(tokenizer),
    )


def kind_of(described: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's names for a tokenizer.json: the model, and its rules.

    Raises:
        ModelError: there is no known name.
    """
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    if described["model"]["type"] != "BPE":
        raise ModelError(
            f"a vocabulary of type {described['model']['type']} cannot be written as GGUF here", fix=ADVICE
        )
    if described["model"].get("byte_fallback"):
        return "llama", "default"
    kinds = [step["type"] for step in steps]
    if described["normalizer"] is None and kinds[-1:] == ["ByteLevel"] and not steps[-1]["add_prefix_space"]:
        cuts = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and cuts:
            return "gpt2", "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and cuts:
            return "gpt2", "smollm"
        if kinds == ["Split", "ByteLevel"] and not cuts and steps[0]["pattern"] == {"Regex": LLAMA3}:
            return "gpt2", "llama-bpe"
    raise ModelError(
        f"the tokenizer splits words by rules ({', '.join(kinds) or 'none'}) that cannot be written as GGUF here",
        fix=ADVICE,
    )


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokeniser."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _prepends(described: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, by the normaliser or by Metaspace."""
    steps = [*_steps(described["normalizer"], "normalizers"), *_steps(described["pre_tokenizer"], "pretokenizers")]
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("always", "first") for step in steps)


def _scores(pairs: Sequence[Sequence[str]], by_id: Mapping[int, str], rows: int) -> list[float]:
    """The score of each token: SentencePiece first merges the pair with the highest score, and the pairs are in that order."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        first.setdefault("".join(pair), rank)
    return [-float(first[by_id[number]]) if by_id.get(number) in first else 0.0 for number in range(rows)]


def _type_of(
    number: int,
    by_id: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    special: set[int],
    described: Mapping[str, Any],
    is_sentencepiece: bool,
) -> int:
    if number not in by_id:
        return UNUSED
    if by_id[number] == described["model"]["unk_token"] and is_sentencepiece:
        return UNKNOWN
    if number in special or (number in added and added[number]["special"]):
        return CONTROL
    if number in added:
        return USER_DEFINED
    text = by_id[number]
    return BYTE if is_sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL
