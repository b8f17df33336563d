"""Runs a training script that loads, waits for a signal before its first step, and then has the card to itself.

    python -m bench.gate SCRIPT ARGUMENT ...

Loading takes most of a short row's time. In this way several scripts load side by side and train one after another.
Before Trainer.train begins, the script prints READY and waits for a line on stdin.
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
    """A row of a table: a script that runs behind the gate."""

    name: str
    arguments: list[str]
    timeout: float
    """Seconds after which it is killed."""
    lines: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Start the script, which begins to load."""
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed when the row is over)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.gate", *self.arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        self.timer = threading.Timer(self.timeout, self.process.kill)
        self.timer.start()

    def read(self, last: str | None = None) -> None:
        """Read the script's output up to the line `last`, or to the end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if self.lines[-1] == last:
                return

    def train(self) -> str | None:
        """Let the script train and end. Returns what follows RESULT in its output, or None if it failed."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.read()
        self.process.wait()
        self.timer.cancel()
        return next((line.removeprefix("RESULT ") for line in self.lines if line.startswith("RESULT ")), None)

    def error_output(self) -> str:
        """The end of the script's standard error."""
        self.errors.seek(0)
        return self.errors.read()[-2000:]


def main() -> None:
    """Run the script, with a gate before its training."""
    script, *arguments = sys.argv[1:]
    if "unsloth" in arguments:
        importlib.import_module("unsloth")  # it changes Transformers, so it must be imported first
    trainer: Any = importlib.import_module("transformers").Trainer
    train = trainer.train

    def gated(self: Any, *rest: Any, **named: Any) -> Any:
        print("READY", flush=True)
        sys.stdin.readline()
        return train(self, *rest, **named)

    trainer.train = gated
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
