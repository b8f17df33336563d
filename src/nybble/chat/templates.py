"""From runs to their templates and tokenizers, without the model."""

from __future__ import annotations

import pathlib

from transformers import PreTrainedTokenizerBase

from nybble.data.text.saved_template import read_template
from nybble.data.text.template import Template, choose_template
from nybble.model.tokenizer.load import load_tokenizer, read_tokenizer
from nybble.run.folder import Run
from nybble.run.identity import check_template_and_tokenizer


def load_template(run: Run, base: pathlib.Path) -> tuple[PreTrainedTokenizerBase, Template]:
    """Tokenizer and template of a run, checked; for a bare adapter, its own tokenizer or that of the base's folder."""
    if run.is_bare_adapter:
        tokenizer = load_tokenizer(run.folder if (run.folder / "tokenizer_config.json").exists() else base, base)
        return tokenizer, choose_template(tokenizer, "auto", "alpaca")
    tokenizer = read_tokenizer(run.folder / "tokenizer")
    template = read_template(tokenizer, run.folder / "template.json")
    check_template_and_tokenizer(run)  # last: the readers above say more about a file that cannot be read
    return tokenizer, template
