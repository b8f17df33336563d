"""Seconds to make the prompt of a conversation of many one-letter messages, with a model's own template.

    python -m bench.messages MODEL_FOLDER

Prints one line per number of messages: the median of five times, each with a new template that has cached nothing.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import time

from nybble.data.rows.formats import Message
from nybble.data.text.template import choose_template
from nybble.data.text.tokens import encode_prompt
from nybble.model.tokenizer.load import load_tokenizer

COUNTS = (511, 1023, 2047)
ROUNDS = 5


def main(folder: pathlib.Path) -> None:
    """Print the table."""
    tokenizer = load_tokenizer(folder)
    for count in COUNTS:
        turns = tuple(Message("assistant" if n % 2 else "user", "a") for n in range(count))
        times = []
        for _ in range(ROUNDS):
            template = choose_template(tokenizer, "auto", "messages")
            began = time.perf_counter()
            encode_prompt(template, turns)
            times.append(time.perf_counter() - began)
        print(f"{count:,} messages: {statistics.median(times):.3f} s")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
