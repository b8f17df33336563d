"""Memory, disk space and folders that must be writable, measured against what a 7B needs."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from nybble.errors import StorageError
from nybble.files.paths import ANOTHER_CACHE, check_cache, check_writable, default_cache, nearest_existing
from nybble.plan.file_bytes import cached_copy_bytes, download_bytes, run_folder_bytes
from nybble.plan.free_memory import Memory
from nybble.plan.ledger import base_bytes
from nybble.plan.shapes import LLAMA_2_7B
from nybble.preflight.doctor.finding import Finding
from nybble.recipe import Recipe
from nybble.terminal import bytes_text

GIB = 2**30
RAM_7B = 8 * GIB  # its 4-bit weights, Python and torch


def download_of_7b() -> int:
    """The bytes of Llama 2 7B on the Hub."""
    return download_bytes(LLAMA_2_7B)


def quantised_7b() -> int:
    """The disk space for its quantised copy, with a recipe's defaults."""
    model = Recipe().model
    return cached_copy_bytes(base_bytes(LLAMA_2_7B, model.quantization, model.double_quantization, 2).total)


def run_of_7b() -> int:
    """The disk space for a run of it, with a recipe's defaults."""
    recipe = Recipe()
    trained = LLAMA_2_7B.adapter_parameters(recipe.lora.r, LLAMA_2_7B.projections)
    return run_folder_bytes(trained, recipe.train.keep_checkpoints)


def memory(host: Memory) -> Finding:
    """Whether the machine's free memory is enough for a 7B."""
    detail = f"{host.free / GIB:.1f} of {host.total / GIB:.1f} GiB free"
    if host.free < RAM_7B:
        fix = "close other programs, or choose a smaller model"
        return Finding("memory", "warn", f"{detail}; a 7B needs {RAM_7B / GIB:.0f} GiB", fix)
    return Finding("memory", "ok", detail)


def nybble_cache(cache: Path | None) -> Finding:
    """Whether nybble's cache and the folders in it are writable, and whether there is enough space for a quantised base."""
    try:
        folder = cache or default_cache()
        check_cache(folder)
    except StorageError as error:
        return Finding("cache", "fail", error.what, error.fix)
    return disk("cache", folder, quantised_7b(), f"free space there; or {ANOTHER_CACHE}")


def hub_cache(folder: Path) -> Finding:
    """The cache of the Hub's files; a problem is only a warning, since models in folders do not need it."""
    name, fix = "cache, Hub", "free space (`hf cache ls`), or set HF_HOME to a folder on another disk"
    if not folder.is_absolute():  # huggingface_hub does not expand ~ if there is no home folder
        return Finding(name, "warn", f"there is no home folder, so it would be {folder}", "set HOME, or HF_HOME")
    finding = disk(name, folder, download_of_7b(), fix)
    if finding.verdict == "fail":
        return replace(finding, verdict="warn", fix="set HF_HOME to a folder you can write to")
    return finding


def disk(name: str, folder: Path, needed: float, fix: str) -> Finding:
    """Whether a folder, which need not exist yet, is writable, and whether its disk has enough free space."""
    try:
        check_writable(folder, str(folder), fix)
    except StorageError as error:
        return Finding(name, "fail", error.what, fix)
    free = shutil.disk_usage(nearest_existing(folder)).free
    detail = f"{bytes_text(free, 1)} free at {folder}"
    if free < needed:
        return Finding(name, "warn", f"{detail}; a 7B needs {bytes_text(needed, 1)}", fix)
    return Finding(name, "ok", detail)


def temporary() -> Finding:
    """The folder for temporary files, which the check of an export needs."""
    try:
        return Finding("temporary", "ok", tempfile.gettempdir())
    except FileNotFoundError as error:
        return Finding("temporary", "fail", str(error.strerror), "set TMPDIR to a writable folder")
