"""From CUDA source to machine code of one kind of card, by NVRTC: no toolkit, no header and no compiler on the machine.

NVRTC and `cuda.bindings` come with torch's CUDA packages. What was compiled is kept on the disk.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from cuda.bindings import nvrtc

from nybble.files.atomic import replacing

log = logging.getLogger("nybble.kernels")
OPTIONS = ("--std=c++17", "-default-device", "-diag-suppress=177")  # 177: a constant that one of the files does not use


class CompileError(RuntimeError):
    """A kernel that could not be compiled; the message has NVRTC's own words."""


def read_source(name: str) -> str:
    """The source of one file of this package, with what all of them share before it."""
    folder = importlib.resources.files("nybble.kernels.cuda")
    return "".join((folder / file).read_text() for file in ("common.cuh", f"{name}.cu"))


def cubin(name: str, architecture: str, defines: Mapping[str, int], folder: pathlib.Path | None) -> bytes:
    """The machine code of one file of this package.

    Args:
        name: of the file, without .cu.
        architecture: as "sm_90".
        defines: the constants that it is compiled with.
        folder: where machine code is kept; None to keep none.

    Raises:
        CompileError: NVRTC is not there, or refuses the source or the architecture.
    """
    source = read_source(name)
    options = (f"-arch={architecture}", *OPTIONS, *(f"-D{key}={value}" for key, value in sorted(defines.items())))
    if folder is None:
        return _compile(name, source, options)
    key = hashlib.sha256(repr((source, options, _nvrtc_release())).encode()).hexdigest()
    file = folder / f"{name}-{architecture}-{key[:32]}.cubin"
    try:
        return file.read_bytes()
    except FileNotFoundError:
        code = _compile(name, source, options)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as half:
        half.write_bytes(code)
    return code


def _nvrtc_release() -> tuple[int, int]:
    major, minor = _checked(nvrtc.nvrtcVersion())
    return major, minor


def _compile(name: str, source: str, options: tuple[str, ...]) -> bytes:
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            text = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, text))
            said = bytes(text).rstrip(b"\0").decode(errors="replace").strip()
            raise CompileError(
                f"{name}.cu does not compile for {options[0].removeprefix('-arch=')}: {said or status.name}"
            )
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    log.debug("compiled %s.cu: %s", name, " ".join(options))
    return bytes(code)


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC failed: {status.name}")
    return values[0] if len(values) == 1 else values
