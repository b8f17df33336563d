"""A model's tokenizer, with the token ids that the model was trained on."""

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
    """The tokenizer with a pad token, which is not EOS if that can be avoided: `<unk>` for Llama 2, which has no pad token.

    Args:
        folder: the folder of the tokenizer's files.
        base: the folder with the config.json that says how many embeddings there are; None for the same folder.

    Raises:
        ModelError: the folder has no tokenizer, or not one that gives the ids the model was trained on.
    """
    tokenizer = read_tokenizer(folder)
    with explained(folder):
        tokenizer = _following_its_file(tokenizer, folder)
        if tokenizer.pad_token is None or _lacks_an_embedding(tokenizer, folder, base or folder):
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def read_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder as Transformers reads it; no code from the folder is run, and the user is not asked to allow it.

    Raises:
        ModelError: there is none, one of its files is invalid, or it gives other ids than the model was trained on.
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
        tokenizer("A text.\n1")  # some faults show only with the first text
    return tokenizer


def _lacks_an_embedding(tokenizer: PreTrainedTokenizerBase, folder: pathlib.Path, base: pathlib.Path) -> bool:
    """Whether the pad token was added without an embedding; False if there is no config.json."""
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


def _following_its_file(tokenizer: PreTrainedTokenizerBase, folder: pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer that tokenizer.json describes, even if the class that the folder declares differs from it.

    Meta's repository declares LlamaTokenizer. That of transformers 5 begins `[INST]` with `[`, where sentencepiece and the
    model have `▁[`; it also splits repeated spaces differently.
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
    """The rules that split a text into pieces before the vocabulary is applied."""
    if backend is None:
        return None
    # Each alone: `to_str` writes the vocabulary too, and reading that again takes 0.15 s with 32,000 tokens.
    parts = (backend.normalizer, backend.pre_tokenizer)
    return [json.loads(part.__getstate__()) if part is not None else None for part in parts]
