"""`nybble doctor`: check this machine; each problem comes with its fix.

findings = examine("meta-llama/Llama-2-7b-hf")
render(findings, Console())
sys.exit(exit_status(findings))
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import constants

from nybble.plan.free_memory import host_memory
from nybble.preflight.doctor.access import base_model, hub_login, wandb_login
from nybble.preflight.doctor.finding import Finding
from nybble.preflight.doctor.four_bit import nf4
from nybble.preflight.doctor.gpu import cuda_driver, cuda_names, devices
from nybble.preflight.doctor.several_gpus import links
from nybble.preflight.doctor.space import disk, hub_cache, memory, nybble_cache, run_of_7b, temporary
from nybble.preflight.doctor.versions import declared, installed_version, packages, python


def examine(model: str | None, cache: Path | None = None) -> list[Finding]:
    """Check everything that a training run needs, in the order in which problems are worth fixing.

    Args:
        model: a folder or a Hub id to which access is checked too; None skips that.
        cache: nybble's cache; None for this user's default.
    """
    findings = [python(), *packages(declared(), installed_version), cuda_driver(), *devices()]
    findings += links(cuda_names())
    findings += [nf4(torch.device(name)) for name in cuda_names()]
    findings += [nf4(torch.device("cpu"), needed=not cuda_names())]
    findings += [memory(host_memory())]
    findings += [nybble_cache(cache), hub_cache(Path(constants.HF_HUB_CACHE))]
    findings += [
        disk("here", Path.cwd(), run_of_7b(), "cd to another folder, or out=FOLDER on another disk"),
        temporary(),
    ]
    findings += [hub_login(), wandb_login()]
    return findings if model is None else [*findings, base_model(model)]
