"""`nybble doctor`: can this machine train? Checks that really compute; each problem comes with its fix.

findings = examine("meta-llama/Llama-2-7b-hf")
render(findings, Console())
sys.exit(exit_status(findings))
"""

from __future__ import annotations

import netrc
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import bitsandbytes as bnb
import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.text import Text

from nybble.errors import ModelError, PlaceError
from nybble.files.places import ANOTHER_CACHE, check_cache, check_writable, default_cache, nearest
from nybble.model import hub
from nybble.model.base.checkpoint import find_checkpoint
from nybble.terminal import tell

Verdict = Literal["ok", "warn", "fail"]
COLOURS: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}

GIB = 2**30
# What a 7B needs: its 16-bit files, a 4-bit copy, an adapter's checkpoints with their optimiser states, and
# memory for the 4-bit weights beside what Python and torch take.
DOWNLOAD_7B, QUANTISED_7B, CHECKPOINTS, RAM_7B, VRAM_7B = 13.5e9, 4e9, 2e9, 8 * GIB, 6 * GIB
# Relative (Frobenius) errors of a 4-bit layer; seen: products in bf16 0.0024, Gaussian weights in NF4 0.092.
PRODUCT_TOLERANCE, QUANTISATION_TOLERANCE = 0.01, 0.12
# CUDA builds of torch 2.11 to 2.13 (pytorch/pytorch#190385), the oldest driver for each (CUDA release notes).
WHEELS = (("cu130", 580), ("cu126", 525))


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, the verdict, what was found, the command that fixes it."""

    name: str
    verdict: Verdict
    detail: str
    fix: str | None = None


def examine(model: str | None, cache: Path | None = None) -> list[Finding]:
    """Look at everything a training run stands on, in the order in which it is worth mending.

    Args:
        model: a folder or a name on the Hub whose access is checked too; None leaves that out.
        cache: nybble's; None is this user's own.
    """
    findings = [python(), *packages(_requirements(), _installed), cuda_driver(), *devices()]
    findings += [nf4(torch.device(name)) for name in _cuda_names()]
    findings += [nf4(torch.device("cpu"), needed=not _cuda_names())]
    findings += [memory(*_memory())]
    findings += [own_cache(cache), hub_cache(Path(constants.HF_HUB_CACHE))]
    findings += [
        disk("here", Path.cwd(), CHECKPOINTS, "cd to another folder, or out=FOLDER on another disk"),
        temporary(),
    ]
    findings += [hub_login(), wandb_login()]
    return findings if model is None else [*findings, base_model(model)]


def exit_status(findings: Iterable[Finding]) -> int:
    """0 where the machine is fit; 1 where anything failed."""
    return int(any(finding.verdict == "fail" for finding in findings))


def render(findings: list[Finding], console: Console) -> None:
    """One aligned line per finding, its fix below it, the verdict last."""
    label = max(len(finding.name) for finding in findings) + 8
    for finding in findings:
        begins = Text.assemble(
            (f"{finding.verdict:<4}", COLOURS[finding.verdict]), f"  {finding.name}".ljust(label - 4)
        )
        tell(console, begins + Text(finding.detail), hang=label)
        if finding.fix:
            tell(console, Text(f"{'':{label}}fix: {finding.fix}", style="cyan"), hang=label + len("fix: "))
    failed, warned = (sum(f.verdict == verdict for f in findings) for verdict in ("fail", "warn"))
    verdict = "ready: this machine can train"
    if failed:
        verdict = f"not ready: fix the {failed} problem{'s' * (failed > 1)} above"
    noted = f", {warned} warning{'s' * (warned > 1)}" if warned else ""
    console.print()
    tell(console, Text(f"{verdict}{noted}", style="bold red" if failed else "bold green"), hang=2)


def python() -> Finding:
    version = platform.python_version()
    window = metadata.metadata("nybble").json.get("requires_python") if _installed("nybble") else None
    if window and not SpecifierSet(str(window)).contains(version, prereleases=True):
        return Finding("python", "fail", f"{version}, outside {window}", "create an environment with Python 3.12")
    return Finding("python", "ok", version)


def packages(requirements: list[str], installed: Callable[[str], str | None]) -> list[Finding]:
    """Compare what is installed with what nybble declares.

    Args:
        requirements: as package metadata states them; those of extras are left out.
        installed: the version of a package, None where it is missing.
    """
    if not requirements:
        fix = "install nybble with pip, not through PYTHONPATH alone"
        return [Finding("packages", "warn", "nybble's metadata is missing: the tested versions are unknown", fix)]
    wanted = [Requirement(text) for text in requirements]
    core = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    return [_package(need, installed(need.name)) for need in core]


def _package(need: Requirement, version: str | None) -> Finding:
    fix = f"pip install {_quoted(need)}"
    if version is None:
        return Finding(need.name, "fail", "not installed", fix)
    if not need.specifier.contains(version, prereleases=True):
        return Finding(need.name, "fail", f"{version} is outside the tested versions", fix)
    return Finding(need.name, "ok", version)


def _quoted(need: Requirement) -> str:
    """The requirement as pip takes it in a shell, lower bound first."""
    return f'"{need.name}{",".join(sorted(map(str, need.specifier), reverse=True))}"'


def _pin(name: str) -> str:
    return next((_quoted(need) for need in map(Requirement, _requirements()) if need.name == name), name)


def _requirements() -> list[str]:
    return (metadata.requires("nybble") or []) if _installed("nybble") else []


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cuda_driver() -> Finding:
    fault = None
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            fault = str(error).splitlines()[0]
    return judge_driver(_nvidia_driver(), torch.version.cuda, fault, torch.cuda.device_count())


def judge_driver(driver: str | None, built_for: str | None, fault: str | None, devices: int) -> Finding:
    """What driver and torch build make of the machine's GPUs.

    Args:
        driver: the NVIDIA driver's version; None where there is none, "" where it does not answer.
        built_for: the CUDA version torch was built for; None is a CPU build.
        fault: what torch said when it could not start CUDA.
        devices: how many GPUs torch sees.
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
    fix = f"pip install uv && uv pip install --torch-backend {wheel} --reinstall-package torch {_pin('torch')}"
    if built_for is None:
        return Finding("cuda", "fail", f"torch is a CPU build, but there is an NVIDIA driver {driver}", fix)
    if fault and "too old" in fault:
        return Finding("cuda", "fail", f"driver {driver} is too old for torch's CUDA {built_for}", fix)
    fix = "see `nvidia-smi`; CUDA_VISIBLE_DEVICES must not hide the GPU"
    return Finding("cuda", "fail", f"driver {driver}, but torch sees no GPU: {fault or 'no reason given'}", fix)


def _nvidia_driver() -> str | None:
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
    findings = []
    for name in _cuda_names():
        free, total = torch.cuda.mem_get_info(name)
        major, minor = torch.cuda.get_device_capability(name)
        detail = f"{torch.cuda.get_device_name(name)}, compute {major}.{minor} ({units((major, minor))})"
        detail += f", {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if free < VRAM_7B:
            fix = "see `nvidia-smi` for what else uses it, or choose a smaller model"
            findings.append(Finding(name, "warn", f"{detail}; a 7B in 4 bits needs {VRAM_7B / GIB:.0f}", fix))
        else:
            findings.append(Finding(name, "ok", detail))
    return findings


def units(capability: tuple[int, int]) -> str:
    """The formats that a GPU of this compute capability multiplies in hardware (CUDA programming guide)."""
    formats = {"fp16": (7, 0), "bf16": (8, 0), "fp8": (8, 9)}
    return ", ".join(name for name, since in formats.items() if capability >= since) or "fp32 only"


def _cuda_names() -> list[str]:
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def nf4(device: torch.device, needed: bool = True) -> Finding:
    """Quantise a small layer to NF4 on the device, and hold its products against plain ones."""
    name = f"nf4, {device}"
    fault: Verdict = "fail" if needed else "warn"
    fix = f"`python -m bitsandbytes` says more; reinstall: pip install --force-reinstall {_pin('bitsandbytes')}"
    try:
        quantised, forward, gradient = nf4_errors(device)
    except RuntimeError as error:
        return Finding(name, fault, f"4-bit layers do not run: {str(error).splitlines()[0]}", fix)
    detail = f"relative error: forward {forward:.2g}, gradient {gradient:.2g} (limit {PRODUCT_TOLERANCE})"
    if not (forward <= PRODUCT_TOLERANCE and gradient <= PRODUCT_TOLERANCE):
        return Finding(name, fault, f"wrong results: {detail}", fix)
    if not quantised <= QUANTISATION_TOLERANCE:
        return Finding(
            name, fault, f"relative error of the weights {quantised:.2g} (limit {QUANTISATION_TOLERANCE})", fix
        )
    return Finding(name, "ok", detail)


def nf4_errors(device: torch.device) -> tuple[float, float, float]:
    """Relative errors of an NF4 layer with double quantisation on the device.

    Returns:
        Of its weights against those it was made from; of its forward products (several rows, as in training,
        and one, as in generation) and of its input gradient, against plain ones of its dequantised weights.
    """
    generator = torch.Generator().manual_seed(0)
    weight, rows, pushed = (torch.randn(*shape, generator=generator) for shape in ((128, 256), (16, 256), (16, 128)))
    half = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float16 if half else torch.bfloat16
    layer = bnb.nn.Linear4bit(256, 128, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(device)
    # As nybble trains: bitsandbytes would repack the weights for AVX512 in eval mode, for good.
    layer.support_avx512bf16_for_cpu = False
    x = rows.to(device, dtype).requires_grad_()
    out = layer(x)
    out.backward(pushed.to(device, dtype))
    with torch.no_grad():
        one = layer(x[:1])
    plain = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    expected = x.detach().float() @ plain.T
    forward = max(_off(out, expected), _off(one, expected[:1]))
    gradient = float("inf") if x.grad is None else _off(x.grad, pushed.to(device, dtype).float() @ plain)
    return _off(plain, weight.to(device)), forward, gradient


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().float() - expected).norm() / expected.norm())


def memory(available: int, total: int) -> Finding:
    detail = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    if available < RAM_7B:
        fix = "close other programs, or choose a smaller model"
        return Finding("memory", "warn", f"{detail}; a 7B needs {RAM_7B / GIB:.0f}", fix)
    return Finding("memory", "ok", detail)


def _memory() -> tuple[int, int]:
    """Free and total memory, of the container where one sets a limit (cgroup v2)."""
    machine = psutil.virtual_memory()
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        total = min(int(most), machine.total)
        return min(total - int(used.read_text()), machine.available), total
    return machine.available, machine.total


def own_cache(cache: Path | None) -> Finding:
    """Where quantised bases and tokenised data are kept: can it be written, with the folders in it, and is there room?"""
    try:
        folder = cache or default_cache()
        check_cache(folder)
    except PlaceError as error:
        return Finding("cache", "fail", error.what, error.fix)
    return disk("cache", folder, QUANTISED_7B, f"free space there; or {ANOTHER_CACHE}")


def hub_cache(folder: Path) -> Finding:
    """Where the Hub's files are kept; models in folders are trained without it."""
    name, cure = "cache, Hub", "free space (`hf cache ls`), or point HF_HOME at another disk"
    if not folder.is_absolute():  # as huggingface_hub leaves ~ where there is no home
        return Finding(name, "warn", f"no home folder: it would be {folder}", "set HOME, or HF_HOME")
    finding = disk(name, folder, DOWNLOAD_7B, cure)
    if finding.verdict == "fail":
        return replace(finding, verdict="warn", fix="point HF_HOME at a folder of yours")
    return finding


def disk(name: str, folder: Path, needed: float, cure: str) -> Finding:
    """Whether a folder that is or will be there can be written, and free space on its disk."""
    try:
        check_writable(folder, str(folder), cure)
    except PlaceError as error:
        return Finding(name, "fail", error.what, cure)
    free = shutil.disk_usage(nearest(folder)).free
    detail = f"{free / 1e9:.1f} GB free at {folder}"
    if free < needed:
        return Finding(name, "warn", f"{detail}; a 7B needs {needed / 1e9:.1f}", cure)
    return Finding(name, "ok", detail)


def temporary() -> Finding:
    """A folder for files that live for a moment: exports are compared through some."""
    try:
        return Finding("temporary", "ok", tempfile.gettempdir())
    except FileNotFoundError as error:
        return Finding("temporary", "fail", str(error.strerror), "set TMPDIR to a writable folder")


def hub_login() -> Finding:
    try:
        account = hub.whoami()
    except ModelError as error:
        return Finding("hub login", "warn", error.what, error.fix)
    if account is None:
        fix = "`hf auth login` with a token from https://huggingface.co/settings/tokens"
        return Finding("hub login", "warn", "not logged in: gated models such as Llama 2 are not accessible", fix)
    return Finding("hub login", "ok", f"logged in as {account}")


def base_model(model: str) -> Finding:
    folder = Path(model).expanduser()
    try:
        if folder.exists() or model.startswith((".", "/", "~", "\\")) or model.count("/") > 1:
            if folder.is_dir():
                find_checkpoint(str(folder))  # what train asks of it, in the same words
            hub.check_folder(folder)
            return Finding("model", "ok", f"{folder} contains a model that Transformers can load")
        return Finding("model", "ok", f"{model} can be read, commit {hub.check_access(model, None)[:12]}")
    except ModelError as error:
        return Finding("model", "fail", error.what, error.fix)


def wandb_login() -> Finding:
    """Whether Weights & Biases has a key where it looks for one; asks nobody, neither person nor server."""
    name, mode = "wandb login", os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return Finding(name, "ok", f"WANDB_MODE is {mode}")
    if os.environ.get("WANDB_API_KEY"):
        return Finding(name, "ok", "key in WANDB_API_KEY")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(place).expanduser() for place in places if place):
        try:
            found = netrc.netrc(path).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return Finding(name, "ok", f"key in {path}")
    fix = "`wandb login`; or later `wandb sync` for runs made without it"
    return Finding(name, "warn", "no key: runs are logged offline", fix)
