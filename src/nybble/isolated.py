"""Code that cannot be interrupted once it runs, tried first in a process that can be killed: regular expressions, tokenizers.

The program reads its job as JSON from standard input, writes what is wrong as JSON to standard output, and has limits of time
and memory.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None  # type: ignore[assignment]

# Without the current folder (-P). The same nybble is found however its importer found it: its folder goes after the standard
# library and before installed packages.
START = """
import runpy, sys
place = next((n for n, entry in enumerate(sys.path) if entry.endswith("-packages")), len(sys.path))
sys.path.insert(place, sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def attempt(module: str, job: Any, *, seconds: float, memory: int) -> str | None:
    """Run a program of nybble on a job; returns what is wrong, or None.

    Args:
        module: that calls `answer`.
        job: what it is given, as JSON can hold it.
        seconds: after which it is killed.
        memory: limit in bytes.
    """
    own = pathlib.Path(__file__).resolve().parents[1]
    words = [sys.executable, "-P", "-c", START, str(own), module, str(memory)]
    try:
        done = subprocess.run(words, input=json.dumps(job).encode(), capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"it is still running after {seconds:.0f} seconds"
    if done.returncode == 0:
        found = json.loads(done.stdout)
        return None if found is None else str(found)
    if done.returncode < 0:
        return f"it crashes the process with signal {-done.returncode}"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return said[-1][:200] if said else f"it ends the process with status {done.returncode}"


def answer(examine: Callable[[Any], str | None]) -> None:
    """The other side: read the job, examine it within the memory limit, write the result."""
    most = int(sys.argv[1])
    _limit_memory(most)
    try:
        found = examine(json.load(sys.stdin))
    except MemoryError:
        found = f"it needs more than {most / 1e9:.0f} GB of memory"
    json.dump(found, sys.stdout)


def _limit_memory(most: int) -> None:
    """Where the system can do that: Windows cannot, and macOS refuses it."""
    if sys.platform != "win32":
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
