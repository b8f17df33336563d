"""GPUs: driver, torch build, memory, number formats."""

from __future__ import annotations

import shutil
import subprocess

import torch

from nybble.plan.free_memory import device_memory
from nybble.preflight.doctor.finding import Finding
from nybble.preflight.doctor.space import GIB
from nybble.preflight.doctor.versions import pin

VRAM_7B = 6 * GIB  # 4-bit weights, the leanest training, and CUDA itself
# CUDA builds of torch 2.11 to 2.13 (pytorch/pytorch#190385), each with the oldest driver that runs it (CUDA release notes).
WHEELS = (("cu130", 580), ("cu126", 525))


def cuda_driver() -> Finding:
    """Whether torch can start CUDA, and if not, why."""
    fault = None
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            fault = str(error).splitlines()[0]
    return judge_driver(nvidia_driver(), torch.version.cuda, fault, torch.cuda.device_count())


def judge_driver(driver: str | None, built_for: str | None, fault: str | None, devices: int) -> Finding:
    """Whether driver and torch build fit each other and the machine's GPUs.

    Args:
        driver: the NVIDIA driver's version; None if there is none, "" if it does not answer.
        built_for: the CUDA version torch was built for; None for a CPU build.
        fault: torch's error if it could not start CUDA.
        devices: the number of GPUs that torch sees.
    """
    if devices:
        return Finding("cuda", "ok", f"driver {driver or 'unknown'}, torch built for CUDA {built_for}")
    if driver is None:
        return Finding("cuda", "warn", "no NVIDIA GPU: training on the CPU, small models only")
    if not driver:
        return Finding(
            "cuda",
            "fail",
            "the NVIDIA driver does not answer",
            "`nvidia-smi` says why; a restart often helps",
        )
    major = int(driver.split(".")[0])
    wheel = next((tag for tag, oldest in WHEELS if major >= oldest), None)
    if wheel is None:
        fix = f"install driver {WHEELS[0][1]} or newer: https://www.nvidia.com/drivers"
        return Finding("cuda", "fail", f"driver {driver} is too old for every tested torch", fix)
    fix = f"pip install uv && uv pip install --torch-backend {wheel} --reinstall-package torch {pin('torch')}"
    if built_for is None:
        return Finding("cuda", "fail", f"torch is a CPU build, but there is an NVIDIA driver {driver}", fix)
    if fault and "too old" in fault:
        return Finding("cuda", "fail", f"driver {driver} is too old for torch's CUDA {built_for}", fix)
    fix = "see `nvidia-smi`; CUDA_VISIBLE_DEVICES must not hide the GPU"
    return Finding("cuda", "fail", f"driver {driver}, but torch sees no GPU: {fault or 'no reason given'}", fix)


def nvidia_driver() -> str | None:
    """The NVIDIA driver's version; None if there is none, "" if it does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    first = answer.stdout.strip().splitlines()[:1]
    if answer.returncode != 0:
        return None if "No devices" in answer.stdout else ""
    return first[0].strip() if first and first[0][:1].isdigit() else None


def devices() -> list[Finding]:
    """Each GPU: its model, compute capability and free memory."""
    findings = []
    for name in cuda_names():
        memory = device_memory(name)
        major, minor = torch.cuda.get_device_capability(name)
        detail = f"{torch.cuda.get_device_name(name)}, compute {major}.{minor} ({number_formats((major, minor))})"
        detail += f", {memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
        if memory.free < VRAM_7B:
            fix = "see `nvidia-smi` for what else uses it, or choose a smaller model"
            findings.append(Finding(name, "warn", f"{detail}; a 7B in 4 bits needs {VRAM_7B / GIB:.0f} GiB", fix))
        else:
            findings.append(Finding(name, "ok", detail))
    return findings


def number_formats(capability: tuple[int, int]) -> str:
    """The number formats that a GPU of this compute capability multiplies in hardware (CUDA programming guide)."""
    formats = {"fp16": (7, 0), "bf16": (8, 0), "fp8": (8, 9)}
    return ", ".join(name for name, since in formats.items() if capability >= since) or "fp32 only"


def cuda_names() -> list[str]:
    """The names of the GPUs in torch."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
