"""Small disks, read-only folders, and a user without a home, for tests."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest


def mounted(folder: pathlib.Path, *words: str) -> None:
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", *words, folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str):
    """A disk of so many bytes. It goes without waiting for files that a traceback may still hold open."""
    mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def read_only(folder: pathlib.Path):
    """The folder as it is, on a file system that root cannot write to either."""
    mounted(folder, "--bind", str(folder))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


COMMAND = """
import sys
from nybble.cli import main
sys.argv = ["nybble", *sys.argv[1:]]
try:
    main()
finally:
    print("loaded:", [name for name in ("torch", "transformers", "datasets") if name in sys.modules], file=sys.stderr)
"""


def as_somebody_without_a_home(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user whom this machine does not know, with no rights anywhere."""
    user = ["setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups"]
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs to become another user")
    if subprocess.run([*user, sys.executable, "-c", ""], capture_output=True, cwd="/", check=False).returncode:
        pytest.skip("needs a Python that another user may start")
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "USER")}
    command = [*user, sys.executable, "-c", COMMAND, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment, cwd="/")
