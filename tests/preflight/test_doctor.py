"""The doctor on this machine, on made-up machines, and before a stand-in Hub."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from rich.console import Console

from nybble.plan.free_memory import Memory
from nybble.preflight.doctor.access import base_model, wandb_login
from nybble.preflight.doctor.examine import examine
from nybble.preflight.doctor.finding import Finding
from nybble.preflight.doctor.four_bit import nf4
from nybble.preflight.doctor.gpu import judge_driver, number_formats, nvidia_driver
from nybble.preflight.doctor.report import exit_status, render
from nybble.preflight.doctor.space import GIB, disk, download_of_7b, hub_cache, memory, quantised_7b, run_of_7b
from nybble.preflight.doctor.versions import declared, packages
from tests.standin_hub import Account, Repo, StandinHub, commit_of

# One process for the whole real run: the report on a good folder, then what it says of the Hub to each token.
PATIENT = """
import dataclasses, json, os, sys
from rich.console import Console
from huggingface_hub import constants
from nybble.preflight.doctor.access import base_model, hub_login
from nybble.preflight.doctor.examine import examine
from nybble.preflight.doctor.report import exit_status, render

folder, cases = json.loads(sys.argv[1])
findings = examine(folder)
render(findings, Console(width=80))
print("exit", exit_status(findings))
for token, model in cases:
    os.environ["HF_TOKEN"] = token or ""
    constants.HF_HUB_OFFLINE = token == "offline"
    pair = [hub_login(), base_model(model)]
    print("json", json.dumps([dataclasses.asdict(finding) for finding in pair]))
"""
CASES = {
    "no token": (None, "org/gated"),
    "accepted": ("hf_ada", "org/gated"),
    "pending": ("hf_bob", "org/gated"),
    "stale token": ("hf_old", "org/open"),
    "offline": ("offline", "org/open"),
}


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def printed(findings: list[Finding], width: int = 80, terminal: bool = True) -> str:
    page = StringIO()
    render(findings, Console(file=page, width=width, color_system=None, force_terminal=terminal))
    return page.getvalue()


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("doctor")
    good = model_folder(root / "good")
    accounts = {
        "hf_ada": Account("ada", {"org/gated": "accepted"}),
        "hf_bob": Account("bob", {"org/gated": "pending"}),
    }
    with StandinHub([Repo("org/gated", good, gated=True), Repo("org/open", good)], accounts) as server:
        environment = server.environment(root / "home", NETRC=str(root / "netrc"), HOME=str(root))
        for name in ("WANDB_API_KEY", "WANDB_MODE", "COLUMNS"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-c", PATIENT, json.dumps([str(good), list(CASES.values())])],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    answers = [json.loads(line.removeprefix("json ")) for line in lines if line.startswith("json ")]
    report = "\n".join(line for line in lines if not line.startswith("json "))
    return report, dict(zip(CASES, answers, strict=True)), root


def test_this_machine_is_examined_for_real(visit: tuple[str, dict[str, Any], Path]) -> None:
    report = visit[0]
    print(report)
    lines = report.splitlines()
    cells = [re.split(r"\s{2,}", line) for line in lines]
    found = {row[1]: row[0] for row in cells if row[0] in ("ok", "warn", "fail")}
    expected = {"torch", "transformers", "peft", "bitsandbytes"} if declared() else {"packages"}
    assert expected | {"python", "nf4, cpu", "cuda", "model"} <= set(found)
    assert found["nf4, cpu"] == found["model"] == "ok"
    assert found["hub login"] == found["wandb login"] == "warn"
    failed = list(found.values()).count("fail")
    assert lines[-1] == f"exit {int(failed > 0)}"
    assert lines[-2].startswith("not ready: fix the " if failed else "ready: this machine can train")


def test_the_hub_is_asked_who_and_what(visit: tuple[str, dict[str, Any], Path]) -> None:
    _, answers, root = visit
    commit = commit_of(root / "good")[:12]
    expected = {
        "no token": ("warn", "not logged in", "fail", "gated, and this machine is not logged in"),
        "accepted": ("ok", "logged in as ada", "ok", f"org/gated can be read, commit {commit}"),
        "pending": ("ok", "logged in as bob", "fail", "is awaiting its authors' review"),
        "stale token": ("warn", "wrong, revoked or expired", "ok", "org/open can be read"),
        "offline": ("warn", "HF_HUB_OFFLINE is set", "fail", "is not fully in the cache"),
    }
    for name, (login, who, access, what) in expected.items():
        told, model = answers[name]
        assert (told["verdict"], model["verdict"]) == (login, access), name
        assert who in told["detail"]
        assert what in model["detail"]
        assert all(finding["fix"] for finding in (told, model) if finding["verdict"] != "ok")


def test_a_model_folder_is_judged(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        (meta / name).touch()
    good, bad, missing = (base_model(str(path)) for path in (model_folder(tmp_path / "good"), meta, tmp_path / "no"))
    assert good.verdict == "ok"
    assert (bad.verdict, "Meta's own format" in bad.detail, "-hf" in (bad.fix or "")) == ("fail", True, True)
    assert (missing.verdict, "There is no folder" in missing.detail) == ("fail", True)


def test_versions_outside_the_window_are_named_with_their_pin() -> None:
    needs = [
        "torch<2.14,>=2.11",
        "peft>=0.21,<0.22",
        "wandb<1,>=0.26",
        "rich>=13.9",
        "gguf<1; extra == 'demo'",
    ]
    have = {"torch": "2.9.1+cu128", "peft": "0.21.2", "rich": "15.0.0"}
    findings = {finding.name: finding for finding in packages(needs, have.get)}
    assert list(findings) == ["torch", "peft", "wandb", "rich"]
    assert [finding.verdict for finding in findings.values()] == ["fail", "ok", "fail", "ok"]
    assert "2.9.1+cu128" in findings["torch"].detail
    assert findings["torch"].fix == 'pip install "torch>=2.11,<2.14"'
    assert findings["wandb"].detail == "not installed"
    assert exit_status(findings.values()) == 1
    assert packages([], have.get)[0].verdict == "warn"


def test_a_local_build_of_a_version_inside_is_inside() -> None:
    [finding] = packages(["torch<2.14,>=2.11"], lambda _: "2.13.0+cu126")
    assert finding.verdict == "ok"


@pytest.mark.parametrize(
    ("machine", "verdict", "words", "cure"),
    [
        ((None, None, None, 0), "warn", "small models only", None),
        (("580.65.06", "13.0", None, 2), "ok", "driver 580.65.06, torch built for CUDA 13.0", None),
        (("580.65.06", None, None, 0), "fail", "CPU build", "--torch-backend cu130"),
        (("560.28", None, None, 0), "fail", "CPU build", "--torch-backend cu126"),
        (
            ("550.54", "13.0", "The NVIDIA driver on your system is too old", 0),
            "fail",
            "too old",
            "--torch-backend cu126",
        ),
        (
            ("470.1", "13.0", "The NVIDIA driver on your system is too old", 0),
            "fail",
            "every tested",
            "580 or newer",
        ),
        (("", "13.0", "No CUDA GPUs are available", 0), "fail", "does not answer", "nvidia-smi"),
        (("580.1", "13.0", "No CUDA GPUs are available", 0), "fail", "No CUDA GPUs", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_driver_and_torch_build_are_judged_together(
    machine: tuple[str | None, str | None, str | None, int], verdict: str, words: str, cure: str | None
) -> None:
    finding = judge_driver(*machine)
    assert finding.verdict == verdict
    assert words in finding.detail
    assert (cure is None) == (finding.fix is None)
    assert cure is None or cure in (finding.fix or "")


@pytest.mark.parametrize(
    ("script", "driver"),
    [
        ("echo 580.65.06; echo 580.65.06", "580.65.06"),
        ("echo No devices were found; exit 6", None),
        ("echo NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver; exit 9", ""),
        (None, None),
    ],
)
def test_the_driver_is_asked_for_its_version(
    script: str | None, driver: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert nvidia_driver() == driver


def test_number_formats_follow_compute_capability() -> None:
    capabilities = ((6, 1), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0))
    assert [number_formats(capability) for capability in capabilities] == [
        "fp32 only",
        "fp16",
        "fp16, bf16",
        "fp16, bf16",
        "fp16, bf16, fp8",
        "fp16, bf16, fp8",
    ]


def test_wrong_or_broken_4bit_layers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    true_weights = bnb.functional.dequantize_4bit
    with monkeypatch.context() as patch:
        patch.setattr(bnb.functional, "dequantize_4bit", lambda *args: true_weights(*args) * 1.02)
        wrong = nf4(cpu)
    assert (wrong.verdict, wrong.detail.startswith("wrong results")) == ("fail", True)

    def broken(*args: object) -> None:
        raise RuntimeError("libbitsandbytes is not there\nand a long story")

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", broken)
    finding = nf4(cpu)
    assert finding.detail == "4-bit layers do not run: libbitsandbytes is not there"
    assert (finding.verdict, nf4(cpu, needed=False).verdict) == ("fail", "warn")
    assert "pip install --force-reinstall" in (finding.fix or "")


def test_little_free_space_is_a_warning(tmp_path: Path) -> None:
    assert memory(Memory(4 * GIB, 16 * GIB)).verdict == "warn"
    assert memory(Memory(12 * GIB, 16 * GIB)).verdict == "ok"
    assert disk("here", tmp_path / "not" / "yet", 1, "a fix").verdict == "ok"
    assert disk("here", tmp_path, 1e18, "a fix").verdict == "warn"
    assert disk("here", tmp_path, 1e18, "a fix").detail.endswith("; a 7B needs 1000000000.0 GB")
    assert hub_cache(tmp_path).name == "cache, Hub"


def test_what_a_7b_needs_is_the_ledger_s() -> None:
    assert [round(size / 1e9, 1) for size in (download_of_7b(), quantised_7b(), run_of_7b())] == [13.5, 4.3, 2.1]


def test_wandb_key_is_found_where_wandb_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert wandb_login().verdict == "warn"
    (tmp_path / "keys").write_text("machine api.wandb.ai\n  login user\n  password 0123456789\n")
    assert wandb_login().detail == f"key in {tmp_path / 'keys'}"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert wandb_login().detail == "key in WANDB_API_KEY"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_login().detail == "WANDB_MODE is offline"


def test_the_report_is_plain_aligned_and_ends_in_a_verdict() -> None:
    findings = [
        Finding("python", "ok", "3.12.1"),
        Finding("disk, cache", "warn", "a long story " * 9, "free space " + "/a/long/path" * 9),
        Finding("torch", "fail", "[2.9.1] is outside", 'pip install "torch>=2.11,<2.14"'),
    ]
    text = printed(findings)
    print(text)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert lines[0] == "ok    python       3.12.1"
    assert all(len(line) <= 80 for line in lines if "/a/long/path" not in line), "a path stays whole"
    assert all(re.match(r"(ok|warn|fail) |not ready| {19}|$", line) for line in lines), "lines hang under the detail"
    assert sum(line.startswith(" " * 19 + "fix: ") for line in lines) == 2
    assert 'fix: pip install "torch>=2.11,<2.14"' in lines[-3]
    assert "fail  torch        [2.9.1] is outside" in lines
    assert lines[-1] == "not ready: fix the 1 problem above, 1 warning"
    assert printed(findings[:1]).splitlines()[-1] == "ready: this machine can train"
    assert "disk, cache  " + "a long story " * 8 in printed(findings, terminal=False), "in a pipe a line stays whole"
    assert [exit_status(some) for some in (findings, findings[:2], [])] == [1, 0, 0]


@pytest.mark.gpu
def test_every_gpu_is_named_and_computes() -> None:
    findings = {finding.name: finding for finding in examine(None)}
    print(printed(list(findings.values())))
    assert findings["cuda"].verdict == "ok"
    assert torch.cuda.device_count() > 0
    for index in range(torch.cuda.device_count()):
        device = findings[f"cuda:{index}"]
        assert torch.cuda.get_device_name(index) in device.detail
        assert "GiB free" in device.detail
        assert findings[f"nf4, cuda:{index}"].verdict == "ok"
