"""How long runs of several processes take to begin, to save and to resume on another number of them, by nybble's command line.

    python -m bench.scale_starts MODEL DATA --processes 1 2 [4 8] [--weights device|sharded] [--json FILE]

Each run is killed with its launcher after its first checkpoint, and resumed by the next number of processes (the last one by the
first). Seconds to begin are those from the command to the first step's end, digests, loading and compilation included; seconds to
save are those from the checkpoint's folder to its mark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.processes import kill_all

SAVED = 4  # the step with a checkpoint
OPTIONS = [
    "lora.r=16", "lora.alpha=16", "train.micro_batch=4", "data.max_length=2048", "data.packing=true", "data.template=alpaca",
    "data.validation=0", "train.samples=0", "train.max_steps=200", f"train.save_every={SAVED}",
]  # fmt: skip
TIMEOUT = 300


class NotReachedError(Exception):
    """What was waited for will not come."""


@contextlib.contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[bytes]]:
    """A command, killed with its processes at the end."""
    command = [sys.executable, "-m", "nybble", *map(str, words)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            yield process
        except NotReachedError:
            errors.seek(0)
            sys.exit(errors.read()[-2000:])
        finally:
            kill_all(process)


def seconds_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> float:
    """Wait until something is so.

    Raises:
        NotReachedError: the process has ended, or TIMEOUT has passed.
    """
    began = time.perf_counter()
    while not condition():
        if process.poll() is not None or time.perf_counter() - began > TIMEOUT:
            raise NotReachedError
        time.sleep(0.005)
    return time.perf_counter() - began


def lines(file: pathlib.Path) -> int:
    """How many lines a file has."""
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def measure(given: argparse.Namespace, first: int, second: int) -> dict[str, Any]:
    """A run of so many processes, resumed by so many."""
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        checkpoint, metrics = run / "checkpoints" / f"checkpoint-{SAVED}", run / "metrics.jsonl"
        words = ["train", given.model, given.data, f"out={run}", *OPTIONS, f"engine.weights={given.weights}"]
        with running(*words, f"train.accumulation={given.rows // first}", f"train.processes={first}") as process:
            begun = seconds_until(process, lambda: lines(metrics) > 0)
            seconds_until(process, checkpoint.exists)
            saved = seconds_until(process, (checkpoint / "COMPLETE").exists)
        metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:SAVED]))  # as resuming will do
        with running("train", "--resume", run, "--processes", second) as process:
            resumed = seconds_until(process, lambda: lines(metrics) > SAVED)
        return {"processes": first, "begin_s": round(begun, 1), "save_s": round(saved, 2), "resumed_by": second,
                "resume_s": round(resumed, 1), "weights": given.weights}  # fmt: skip


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--processes", type=int, nargs="+", required=True)
    parser.add_argument("--weights", choices=["device", "sharded"], default="device")
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    given.rows = max(given.processes)
    if any(given.rows % count for count in given.processes):
        parser.error("the largest number of processes must be a multiple of the others: they take the same steps")
    if given.weights == "sharded" and min(given.processes) == 1:
        parser.error("--weights sharded needs two processes at least")
    found = []
    for place, first in enumerate(given.processes):
        found.append(measure(given, first, given.processes[(place + 1) % len(given.processes)]))
        print(json.dumps(found[-1]), flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
