"""Access to the Hub, to the base model and to Weights & Biases."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from nybble.errors import ModelError
from nybble.model import hub
from nybble.model.base.checkpoint import find_checkpoint
from nybble.preflight.doctor.finding import Finding


def hub_login() -> Finding:
    """Whether a user is logged in to the Hub on this machine."""
    try:
        account = hub.whoami()
    except ModelError as error:
        return Finding("hub login", "warn", error.what, error.fix)
    if account is None:
        fix = "`hf auth login` with a token from https://huggingface.co/settings/tokens"
        return Finding("hub login", "warn", "not logged in: gated models such as Llama 2 are not accessible", fix)
    return Finding("hub login", "ok", f"logged in as {account}")


def base_model(model: str) -> Finding:
    """Whether a model in a folder or on the Hub can be read from this machine."""
    folder = Path(model).expanduser()
    try:
        if folder.exists() or model.startswith((".", "/", "~", "\\")) or model.count("/") > 1:
            if folder.is_dir():
                find_checkpoint(str(folder))  # the checks that train makes, with the same messages
            hub.check_folder(folder)
            return Finding("model", "ok", f"{folder} contains a model that Transformers can load")
        return Finding("model", "ok", f"{model} can be read, commit {hub.check_access(model, None)[:12]}")
    except ModelError as error:
        return Finding("model", "fail", error.what, error.fix)


def wandb_login() -> Finding:
    """Whether Weights & Biases has a key in one of the places where it looks; neither the user nor a server is asked."""
    name, mode = "wandb login", os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return Finding(name, "ok", f"WANDB_MODE is {mode}")
    if os.environ.get("WANDB_API_KEY"):
        return Finding(name, "ok", "key in WANDB_API_KEY")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(file).expanduser() for file in files if file):
        try:
            login = netrc.netrc(path).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if login and login[2]:
            return Finding(name, "ok", f"key in {path}")
    fix = "`wandb login`, or upload runs later with `wandb sync`"
    return Finding(name, "warn", "no key: runs are logged offline", fix)
