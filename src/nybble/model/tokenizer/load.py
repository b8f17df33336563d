"""A model's tokenizer, as the model knew it when it was trained."""

from __future__ import annotations

import json
import logging
import pathlib

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nybble.errors import ModelError
from nybble.files.reading import read_object
from nybble.model.base.files import refuse_pointers
from nybble.model.tokenizer.files import FILES, check_files, explained

log = logging.getLogger("nybble")


def load_tokenizer(folder: pathlib.Path, base: pathlib.Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token that is never an EOS where that can be: `<unk>` for LLaMA 2, which has none.

    Args:
        folder: with the tokenizer's files.
        base: with the config.json that says how many embeddings there are; None: the same folder.

    Raises:
        ModelError: the folder has no tokenizer, or none that gives the ids the model was trained on.
    """
    tokenizer = read_tokenizer(folder)
    with explained(folder):
        tokenizer = _as_in_its_file(tokenizer, folder)
        if tokenizer.pad_token is None or _lacks_an_embedding(tokenizer, folder, base or folder):
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def read_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder as Transformers reads it: no code from the folder, and nobody is asked whether to run some.

    Raises:
        ModelError: there is none, one of its files is not what it must be, or it gives other ids than the model was trained on.
    """
    refuse_pointers(folder / name for name in FILES)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        raise ModelError(
            f"{folder} has tokenizer.model but no tokenizer.json, and transformers 5 would make token ids from it that differ "
            "from those in training",
            fix="get tokenizer.json from the model's page; for Llama 2: hf download meta-llama/Llama-2-7b-hf "
            f"tokenizer.json --local-dir {folder}",
        )
    check_files(folder)
    with explained(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("A text.\n1")  # some faults show with the first text only
    return tokenizer


def _lacks_an_embedding(tokenizer: PreTrainedTokenizerBase, folder: pathlib.Path, base: pathlib.Path) -> bool:
    """Whether the pad token was added without a row of the embedding, as far as there is a config.json."""
    file = base / "config.json"
    rows = read_object(file).get("vocab_size") if file.exists() else None
    if not isinstance(rows, int) or tokenizer.pad_token_id < rows:
        return False
    log.warning(
        "nybble: the pad token %s of %s has id %d, but the model has embeddings for ids 0 to %d; padding uses another token",
        tokenizer.pad_token,
        folder,
        tokenizer.pad_token_id,
        rows - 1,
    )
    return True


def _as_in_its_file(tokenizer: PreTrainedTokenizerBase, folder: pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer that tokenizer.json describes, where the class that the folder declares is another.

    Meta's repository declares LlamaTokenizer, of which transformers 5 makes one that begins `[INST]` with `[` where
    sentencepiece, and the model, have `▁[`; it also splits repeated spaces otherwise.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return tokenizer
    written = _rules(Tokenizer.from_file(str(file)))
    if _rules(getattr(tokenizer, "backend_tokenizer", None)) == written:
        return tokenizer
    log.warning(
        "nybble: %s as %s gives different token ids from its tokenizer.json; nybble follows the file and saves it with the run",
        folder,
        type(tokenizer).__name__,
    )
    pinned = PreTrainedTokenizerFast.from_pretrained(folder)
    assert _rules(pinned.backend_tokenizer) == written, "PreTrainedTokenizerFast follows its file"
    return pinned


def _rules(backend: Tokenizer | None) -> list[object] | None:
    """What cuts a text into pieces before the vocabulary is asked."""
    if backend is None:
        return None
    # Each alone: `to_str` writes the vocabulary too, and reading that again takes 0.15 s with 32,000 tokens.
    parts = (backend.normalizer, backend.pre_tokenizer)
    return [json.loads(part.__getstate__()) if part is not None else None for part in parts]
