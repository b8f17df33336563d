"""The recipe's section `data`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.recipe.options.section import Options


class DataOptions(Options):
    """The training data and how rows become tokens."""

    path: str | list[str] | dict[str, float] = ""
    """Files (json, jsonl, csv, tsv, parquet, txt, each also .gz), folders, patterns or Hub ids; with weights: {a: 2, b: 0.5}."""
    subset: str | None = None
    """Configuration of a Hub data set that has several."""
    split: str = "train"
    """Split of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    streaming: bool = False
    """Read rows as they are needed, for data larger than the disk; needs train.max_steps and keeps duplicates."""
    form: Literal["auto", "alpaca", "messages", "sharegpt", "prompt", "text"] = "auto"
    """Format of the rows: alpaca, messages, sharegpt, prompt (and completion), text; auto detects it per row by the columns."""
    map: dict[str, str] = Field(default_factory=dict)
    """Columns with other names: {prompt: question, completion: answer}."""
    template: str = "auto"
    """auto, model (the model's default), another of the model's templates by name, alpaca, llama2, plain or a Jinja file."""
    max_length: int = Field(default=1024, ge=8)
    """Maximum row length in tokens, and the length of packed rows."""
    overlength: Literal["error", "drop", "truncate", "split"] = "error"
    """Rows over max_length: error (refuse above 1%, else drop), drop, truncate (keeps EOS), split (chats between turns)."""
    bad_rows: Literal["error", "drop"] = "error"
    """Rows that cannot be trained on, such as empty answers: error, or drop and report how many."""
    max_row_mb: int = Field(default=16, ge=1, le=2000)
    """Maximum size of a row or a .txt file in MB, so that a damaged or endless file cannot fill the memory."""
    train_on: Literal["answers", "last", "all"] = "answers"
    """Tokens that the loss counts: all answers of a chat, its last answer only, or prompts too."""
    packing: bool = False
    """Pack several samples into each row of max_length (best fit); samples never attend to each other."""
    validation: float | str = 0.05
    """Rows to hold out: a share (below 1), a number (1 or more), 0 for none, or the path of a file."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many distinct rows, from the beginning."""

    @property
    def names(self) -> list[str]:
        """The sources, without their weights."""
        return [self.path] if isinstance(self.path, str) else list(self.path)
