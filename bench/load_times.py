"""Seconds to load a base from the cache, with and without checking its digests, and for the checks alone.

    python -m bench.load_times model FOLDER [SCRATCH]     a base of your own
    python -m bench.load_times 7b SCRATCH                 random weights of the Llama-2-7B shape; 17.5 GB, and a GPU to make them
    python -m bench.load_times file SCRATCH [GB]          a file of 4 GB in tensors of 20 MB: the check alone

Prints one JSON line. The base is quantised once into a cache in SCRATCH (default: a temporary folder), which is deleted at
the end. Then it is loaded from there with and without the check, three times each (median): `warm` with its file in memory,
`cold` after asking the kernel to drop it from memory (posix_fadvise). `check_s` is the time for the digest of every tensor
of the copy. The others are for the fingerprint of the 16-bit weights: `first_s` computes SHA-256 and XXH3, `remembered_s`
uses the digest remembered in the cache, `proven_s` reads every byte and compares it with the remembered XXH3.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from bench.llama2_7b import prepare
from nybble.export.merge.shards import Spec, write_shards
from nybble.files import digests
from nybble.files.cache import Entry
from nybble.model.base import bits
from nybble.model.base.cached import find_copy
from nybble.model.base.checkpoint import Checkpoint, find_checkpoint, fingerprint
from nybble.model.base.load import load_base
from nybble.model.device import choose_device, choose_dtype
from nybble.recipe import ModelOptions
from nybble.run.versions import versions

ROUNDS = 3
ROW = 1 << 20  # numbers in a row of the file's tensors, in bytes


def seconds(work: Callable[[], object]) -> float:
    """How long something takes, including the device's queue. The previous result is freed before."""
    gc.collect()
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    del result
    return round(took, 3)


def median(work: Callable[[], object], before: Callable[[], None] = lambda: None) -> float:
    """The median of three times."""
    times = []
    for _ in range(ROUNDS):
        before()
        times.append(seconds(work))
    return statistics.median(times)


def forget(folder: pathlib.Path) -> None:
    """Ask the kernel to drop a folder's files from memory."""
    for file in folder.rglob("*"):
        if file.is_file():
            number = os.open(file, os.O_RDONLY)
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(number)


def measure_model(folder: pathlib.Path, scratch: pathlib.Path) -> dict[str, object]:
    """Measure a base."""
    device = choose_device("auto")
    dtype, _ = choose_dtype("auto", device)
    checkpoint, options, cache = find_checkpoint(str(folder)), ModelOptions(path=str(folder)), scratch / "cache"

    def load() -> object:
        return load_base(checkpoint, options, dtype, device, cache).model

    first = seconds(lambda: fingerprint(checkpoint, cache))
    quantised = seconds(load)
    (entry,) = (cache / "base").iterdir()
    facts = find_copy(entry).facts

    def without() -> object:
        with mock.patch("nybble.model.base.load.find_copy", lambda folder: Entry(folder, facts)):
            return load()

    seconds(without)  # the first time loads and compiles what the others need
    size = sum(file.stat().st_size for file in entry.iterdir())
    times = {"warm_checked_s": median(load), "warm_unchecked_s": median(without)}
    cold = lambda: forget(entry)  # noqa: E731
    times |= {"cold_checked_s": median(load, cold), "cold_unchecked_s": median(without, cold)}
    check = median(lambda: find_copy(entry))
    own = load_base(checkpoint, options, dtype, device, cache).bits
    return {
        "same_bits_again": load_base(checkpoint, options, dtype, device, scratch / "another").bits == own,
        "copy_gb": round(size / 1e9, 3), "quantised_s": quantised, **times, "check_s": check,
        "check_gb_s": round(size / 1e9 / check, 1), **fingerprints(checkpoint, cache, first),
    }  # fmt: skip


def fingerprints(checkpoint: Checkpoint, cache: pathlib.Path, first: float) -> dict[str, float]:
    """Measure the digests of the 16-bit weights."""
    size = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    return {
        "weights_gb": round(size / 1e9, 3),
        "first_s": first,
        "remembered_s": median(lambda: fingerprint(checkpoint, cache)),
        "proven_s": median(lambda: fingerprint(checkpoint, cache, prove=True)),
    }


def measure_file(scratch: pathlib.Path, size: float) -> dict[str, object]:
    """Measure the check of a file that belongs to no model."""
    count = round(size * 1e9 / (20 * ROW))
    specs = [Spec(f"tensor.{number}", (20, ROW), torch.uint8) for number in range(count)]
    block = torch.randint(0, 256, (20, ROW), dtype=torch.uint8)

    def rows(name: str) -> Iterator[torch.Tensor]:
        block[0, :8] = torch.tensor(list(name.encode()[-8:].rjust(8)), dtype=torch.uint8)
        yield block

    write_shards(scratch, specs, rows, lambda _: None, shard=1 << 40)
    (file,) = scratch.glob("*.safetensors")
    size = file.stat().st_size / 1e9
    by_tensor, by_file = median(lambda: bits.digests_of_files(scratch)), median(lambda: digests.digest(file))
    cold = median(lambda: bits.digests_of_files(scratch), lambda: forget(scratch))
    return {
        "gb": round(size, 3), "check_s": by_tensor, "check_gb_s": round(size / by_tensor, 1), "one_thread_s": by_file,
        "one_thread_gb_s": round(size / by_file, 1), "cold_check_s": cold,
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    """Parse and print."""
    if len(arguments) < 2 or arguments[0] not in ("model", "7b", "file"):
        sys.exit(__doc__)
    kind, folder, *rest = arguments
    parent = rest[0] if kind == "model" and rest else None if kind == "model" else folder
    if parent is not None:
        pathlib.Path(parent).mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="load-times-", dir=parent))
    try:
        if kind == "file":
            result = measure_file(scratch, float(rest[0]) if rest else 4.0)
        elif kind == "7b":
            (scratch / "no-tokenizer").mkdir()
            prepare(scratch / "model", scratch / "no-tokenizer")
            result = measure_model(scratch / "model", scratch)
        else:
            result = measure_model(pathlib.Path(folder), scratch)
    finally:
        shutil.rmtree(scratch)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"kind": kind, "device": device, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(json.dumps({**about, **result, "versions": versions(), "date": now}))


if __name__ == "__main__":
    main(sys.argv[1:])
