"""A training script that starts, waits before its first step until it is told to go on, and then has the card to itself.

    python -m bench.gate SCRIPT word ...

Loading takes most of a short row's time. Several scripts load side by side in this way, and train one after another.
Before Trainer.train begins, READY is printed and a line awaited on stdin.
"""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from typing import IO, Any


@dataclass
class Row:
    """A script that runs behind the gate."""

    name: str
    words: list[str]
    seconds: float
    """After which it is given up."""
    lines: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Begin to load."""
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed when the row is over)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.gate", *self.words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        self.timer = threading.Timer(self.seconds, self.process.kill)
        self.timer.start()

    def read(self, last: str | None = None) -> None:
        """Its output up to a line, or to the end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if self.lines[-1] == last:
                return

    def train(self) -> str | None:
        """Let it train and end; the line after RESULT, or None where it failed."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.read()
        self.process.wait()
        self.timer.cancel()
        return next((line.removeprefix("RESULT ") for line in self.lines if line.startswith("RESULT ")), None)

    def said(self) -> str:
        """The end of what it wrote as errors."""
        self.errors.seek(0)
        return self.errors.read()[-2000:]


def main() -> None:
    """Run the script with a gate before its training."""
    script, *words = sys.argv[1:]
    if "unsloth" in words:
        importlib.import_module("unsloth")  # it changes Transformers, and has to come first
    trainer: Any = importlib.import_module("transformers").Trainer
    train = trainer.train

    def gated(self: Any, *rest: Any, **named: Any) -> Any:
        print("READY", flush=True)
        sys.stdin.readline()
        return train(self, *rest, **named)

    trainer.train = gated
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
