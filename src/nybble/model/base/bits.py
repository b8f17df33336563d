"""The bits of a quantised base: a digest of its tensors, and how they were made.

The digest is the same whether the base was quantised just now, read from the cache or never written to a file. Equal weights need
not give equal bits: a double-quantised weight subtracts the mean of its scales, whose last bit depends on the order of summation,
and so on the device and on the number of threads.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import bitsandbytes
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from nybble.files.cache import DamagedError
from nybble.model.base.files import weight_files
from nybble.run.folder import Run
from nybble.run.start import MadeBy, QuantizedBase
from nybble.terminal import first_of

SMALL = 1 << 18  # bytes of a tensor that is not worth a thread
THREADS = 8  # XXH3 makes 8 to 11 GB/s on a core and lets other threads run: memory is the limit


@dataclass(frozen=True)
class TrainedBase:
    """The base that a run was trained on, according to its record."""

    fingerprint: str
    bits: QuantizedBase

    def differs_from(self, fingerprint: str) -> bool:
        """Whether the weights certainly differ; a folder cannot be compared with a commit of the Hub."""
        return (
            fingerprint.startswith("sha256:") == self.fingerprint.startswith("sha256:")
            and fingerprint != self.fingerprint
        )

    def contradicts(self, bits: QuantizedBase, fingerprint: str) -> bool:
        """Whether bits that were made from the same weights in the same way differ."""
        return bits.made == self.bits.made and bits.digest != self.bits.digest and not self.differs_from(fingerprint)


def trained_base(run: Run) -> TrainedBase | None:
    """The base in a run's record; None for an adapter without a run, for a base that nybble did not quantise, and for runs
    before 0.7.

    Raises:
        RunError: the record is damaged.
    """
    file = run.folder / "start.json"
    if run.is_bare_adapter or not file.exists():
        return None
    start = run.start()
    if start.quantized_base is None:
        return None
    return TrainedBase(start.base, start.quantized_base)


def made_by(device: torch.device, dtype: torch.dtype) -> MadeBy:
    """What the bits depend on if weights of this type are quantised on this device now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {torch.backends.cpu.get_cpu_capability()}, threads {torch.get_num_threads()}"
    kind = str(dtype).removeprefix("torch.")
    return MadeBy(device=name, dtype=kind, bitsandbytes=bitsandbytes.__version__, torch=str(torch.__version__))


def digests_of_files(folder: pathlib.Path) -> dict[str, str]:
    """Type, shape and digest of each tensor in a folder's safetensors files, as one line per tensor, by name.

    The files are mapped, as they are when the model is loaded from them.

    Raises:
        DamagedError: a file cannot be read.
    """
    files = weight_files(folder)
    try:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            return _lines((name, file.get_tensor(name)) for file in opened for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"the weights cannot be read: {error}") from error


def digests_of_model(model: PreTrainedModel) -> dict[str, str]:
    """The same for a model in memory, without tied tensors, which are stored once."""
    tied = model.all_tied_weights_keys
    return _lines((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


def combined(tensors: Mapping[str, str]) -> str:
    """The digest of all tensors."""
    return xxhash.xxh3_128_hexdigest("".join(f"{name} {line}\n" for name, line in sorted(tensors.items())).encode())


def check(folder: pathlib.Path, tensors: Mapping[str, str]) -> None:
    """Compare a folder's tensors with the digests recorded when they were written.

    Raises:
        DamagedError: naming the first that differs.
    """
    now = digests_of_files(folder)
    odd = sorted(name for name in tensors.keys() | now.keys() if now.get(name) != tensors.get(name))
    if odd:
        raise DamagedError(f"{first_of(odd)} is not what was written")


def _lines(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        lines: dict[str, str | concurrent.futures.Future[str]] = {}
        for name, tensor in tensors:  # most are scales, which are not worth a thread
            lines[name] = threads.submit(_line, tensor) if tensor.nbytes > SMALL else _line(tensor)
        return {name: line if isinstance(line, str) else line.result() for name, line in lines.items()}


def _line(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} {xxhash.xxh3_128_hexdigest(content)}"
