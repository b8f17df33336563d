"""Which bits a quantised base consists of, by a digest of its tensors, and how they were made.

The digest is the same whether the base was quantised just now, read from the cache or held in memory only. Equal weights need not
give equal bits: a double-quantised weight subtracts the mean of its scales, whose last bit depends on the order of summation,
and so on the device and on the number of threads.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from nybble.errors import RunError
from nybble.files.cache import DamagedError
from nybble.model.base.files import some, weight_files
from nybble.run.folder import QUANTIZED, Run

MADE = ("device", "dtype", "bitsandbytes", "torch")
SMALL = 1 << 18  # bytes of a tensor that takes no thread
THREADS = 8  # XXH3 makes 8 to 11 GB/s on a core and lets other threads run: memory is the limit


@dataclass(frozen=True)
class Bits:
    """The bits of a quantised base."""

    digest: str
    """XXH3 of 128 bits over name, type, shape and bytes of each tensor, the scales among them."""
    made: Mapping[str, str]
    """What the bits depend on beside the weights: device, type, bitsandbytes and torch."""

    def as_json(self) -> dict[str, Any]:
        """As a run records it."""
        return {"digest": self.digest, "made": dict(self.made)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Bits:
        """From a run's record, or from the cache's; LookupError or TypeError where it is neither."""
        return cls(str(value["digest"]), {name: str(value["made"][name]) for name in MADE})

    def made_by(self) -> str:
        """How they were made, as people read it."""
        return ", ".join(f"{name} {self.made[name]}" for name in MADE)


@dataclass(frozen=True)
class Trained:
    """What a run was trained on, by its record."""

    fingerprint: str
    bits: Bits

    def is_another(self, fingerprint: str) -> bool:
        """Whether a base's weights are certainly others; a folder cannot be compared with a commit of the Hub."""
        return (
            fingerprint.startswith("sha256:") == self.fingerprint.startswith("sha256:")
            and fingerprint != self.fingerprint
        )

    def contradicts(self, bits: Bits, fingerprint: str) -> bool:
        """Whether bits that were made of the same weights in the same way are others."""
        return bits.made == self.bits.made and bits.digest != self.bits.digest and not self.is_another(fingerprint)


def trained_on(run: Run) -> Trained | None:
    """What a run's record says of its base; None of an adapter without a run, of a base that nybble did not quantise, and of
    runs before 0.7.

    Raises:
        RunError: the record is damaged.
    """
    file = run.folder / "start.json"
    if run.is_bare_adapter or not file.exists():
        return None
    start = run.start()
    stored = start.get(QUANTIZED)
    try:
        return None if stored is None else Trained(str(start["base"]), Bits.from_json(stored))
    except (LookupError, TypeError) as error:
        raise RunError(
            f"the record of the quantised base is damaged: {QUANTIZED} is {str(stored)[:80]}",
            where=str(file),
            fix=f"copy start.json again; or delete {QUANTIZED} from it, and the base is used without this check",
        ) from error


def making_on(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What bits depend on that are made on a device now, of weights in that type."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {torch.backends.cpu.get_cpu_capability()}, threads {torch.get_num_threads()}"
    own = {"device": name, "dtype": str(dtype).removeprefix("torch.")}
    return {**own, "bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}


def of_files(folder: pathlib.Path) -> dict[str, str]:
    """Type, shape and digest of each tensor in a folder's safetensors files, a line each, by name.

    The files are mapped, as they are when the model is loaded from them.

    Raises:
        DamagedError: a file cannot be read.
    """
    files = weight_files(folder)
    try:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            return _lines((name, one.get_tensor(name)) for one in opened for name in one.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"the weights cannot be read: {error}") from error


def of_model(model: PreTrainedModel) -> dict[str, str]:
    """The same of a model in memory, without tied tensors, which are stored once."""
    tied = model.all_tied_weights_keys
    return _lines((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


def combined(tensors: Mapping[str, str]) -> str:
    """The digest of all tensors."""
    return xxhash.xxh3_128_hexdigest("".join(f"{name} {line}\n" for name, line in sorted(tensors.items())).encode())


def check(folder: pathlib.Path, tensors: Mapping[str, str]) -> None:
    """Hold a folder's tensors against what they were.

    Raises:
        DamagedError: naming the first that differs.
    """
    now = of_files(folder)
    odd = sorted(name for name in tensors.keys() | now.keys() if now.get(name) != tensors.get(name))
    if odd:
        raise DamagedError(f"{some(odd)} is not what was written")


def _lines(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        lines: dict[str, str | concurrent.futures.Future[str]] = {}
        for name, tensor in tensors:  # most are scales, for which a thread is not worth its while
            lines[name] = threads.submit(_line, tensor) if tensor.nbytes > SMALL else _line(tensor)
        return {name: line if isinstance(line, str) else line.result() for name, line in lines.items()}


def _line(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} {xxhash.xxh3_128_hexdigest(content)}"
