"""Serves a run with vLLM's own server, for more requests than one machine can answer.

Nothing of vLLM is imported: this process is replaced by vLLM's command.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from nybble.chat.loading import check_one_base
from nybble.errors import ServeError
from nybble.model.adapter.config import read_adapter_config
from nybble.model.adapter.lora import check_stored
from nybble.run.folder import Run
from nybble.run.identity import check_template_and_tokenizer
from nybble.serve.app import Limits
from nybble.serve.guard import check_open_to
from nybble.serve.names import run_names
from nybble.serve.server import Address


def command(runs: Sequence[Run], host: str, port: int) -> list[str]:
    """vLLM's command: the merged model if there is one run that was merged, else the base with an adapter for each run.

    It does not contain the API key, since other users can see a command line: `environment` does.
    """
    names = run_names(runs)
    merged = runs[0].folder / "export" / "merged"
    address = ["--host", host, "--port", str(port)]
    if len(runs) == 1 and (merged / "config.json").exists():
        return ["vllm", "serve", str(merged), "--served-model-name", names[0], *address]
    check_one_base(runs)
    options = runs[0].recipe.model
    for run in runs:
        check_stored(run.adapter)
        check_template_and_tokenizer(run)
    ranks = [read_adapter_config(run.adapter).r for run in runs]
    modules = [f"{name}={run.adapter}" for name, run in zip(names, runs, strict=True)]
    tokenizer = [] if runs[0].is_bare_adapter else ["--tokenizer", str(runs[0].folder / "tokenizer")]
    four_bit = ["--quantization", "bitsandbytes"] if options.quantization in ("nf4", "fp4") else []
    revision = ["--revision", options.revision] if options.revision else []
    return [
        "vllm", "serve", options.path, *revision, *tokenizer, *four_bit, "--enable-lora", "--max-lora-rank",
        str(_rank(max(ranks))), "--lora-modules", *modules, *address,
    ]  # fmt: skip


def environment(key: str | None) -> dict[str, str]:
    """The environment for vLLM, which reads the key from it."""
    return {**os.environ, **({"VLLM_API_KEY": key} if key else {})}


def serve_with_vllm(runs: Sequence[Run], address: Address, *, device: str, limits: Limits) -> None:
    """Serve with vLLM: this process becomes vLLM's server.

    Raises:
        ServeError: options that only nybble's own server has, or as `become_vllm`.
    """
    if limits != Limits() or device != "auto" or address.access.origins or address.access.hosts:
        raise ServeError(
            "--queue, --timeout, --device, --log-prompts, --allow-origin and --allow-host are for nybble's own server; "
            "vLLM has its own options",
            fix="omit them, or --engine auto",
        )
    become_vllm(runs, address.host, address.port, address.access.key)


def become_vllm(runs: Sequence[Run], host: str, port: int, key: str | None) -> None:
    """Replace this process with vLLM's server; it does not return.

    Raises:
        ServeError: vLLM is not installed, or others could reach it without a key.
    """
    check_open_to(host, key)
    arguments = command(runs, host, port)
    program = shutil.which("vllm")
    if program is None:
        raise ServeError(
            f"vLLM is not installed; the command would be: {' '.join(arguments)}",
            fix="python -m venv vllm && vllm/bin/pip install vllm, in its own environment, as it pins torch; then "
            "PATH=$PWD/vllm/bin:$PATH nybble serve ... --engine vllm",
        )
    os.execve(program, arguments, environment(key))


def _rank(largest: int) -> int:
    """The smallest rank that vLLM supports and that is large enough."""
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= largest), largest)
