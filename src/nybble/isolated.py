"""Tries code that cannot be interrupted, such as regular expressions and tokenizers, in a process that can be killed.

The process reads its job as JSON from standard input, writes the fault that it found as JSON to standard output, and has limits
of time and memory.
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

# It starts without the current folder in sys.path (-P). To import the same nybble as its parent, however that found it, nybble's
# folder is inserted after the standard library and before installed packages.
START = """
import runpy, sys
position = next((n for n, entry in enumerate(sys.path) if entry.endswith("-packages")), len(sys.path))
sys.path.insert(position, sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def attempt(module: str, job: Any, *, seconds: float, memory: int) -> str | None:
    """Run one of nybble's modules on a job in a process of its own; returns the fault that it found, as a clause, or None.

    Args:
        module: a module that calls `run_job`.
        job: its input, as values that JSON can represent.
        seconds: time limit, after which the process is killed.
        memory: limit in bytes.
    """
    folder = pathlib.Path(__file__).resolve().parents[1]
    command = [sys.executable, "-P", "-c", START, str(folder), module, str(memory)]
    try:
        process = subprocess.run(
            command, input=json.dumps(job).encode(), capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it is still running after {seconds:.0f} seconds"
    if process.returncode == 0:
        fault = json.loads(process.stdout)
        return None if fault is None else str(fault)
    if process.returncode < 0:
        return f"it crashes the process with signal {-process.returncode}"
    errors = process.stderr.decode(errors="replace").strip().splitlines()
    return errors[-1][:200] if errors else f"it ends the process with status {process.returncode}"


def run_job(find_fault: Callable[[Any], str | None]) -> None:
    """In the new process: read the job, examine it within the memory limit, and write the result."""
    limit = int(sys.argv[1])
    _limit_memory(limit)
    try:
        fault = find_fault(json.load(sys.stdin))
    except MemoryError:
        fault = f"it needs more than {limit / 1e9:.0f} GB of memory"
    json.dump(fault, sys.stdout)


def _limit_memory(limit: int) -> None:
    """Limit this process's memory if the system can: Windows cannot, and macOS refuses to."""
    if sys.platform != "win32":
        hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
