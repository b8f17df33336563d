"""The Hugging Face Hub: fetch a base model, or say in plain words why it cannot be had.

The Hub names a fault with a status, the header X-Error-Code and the sentence in X-Error-Message. What each
means was taken from huggingface_hub's hf_raise_for_status, from people's reports of the sentences, and from
https://huggingface.co/docs/hub/models-gated:

    401, GatedRepo                      gated, and no token was sent (or it was not accepted)
    401, no code, no token sent         no such name, or private: to a stranger the Hub tells no difference
    403, GatedRepo                      "not in the authorized list", "awaiting a review" or "rejected"
    403, no code, "fine-grained token"  the token's scope leaves gated repositories out
    404, RepoNotFound                   no such name, or private and not shared with this account
    404, RevisionNotFound               the model is there, the branch, tag or commit is not

A gated repository's listing is public, its files are not; so access is asked of a file, as a download would.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nybble.errors import HubError, ModelError
from nybble.model.base.headers import read_index

logger = logging.getLogger(__name__)

# The base class of every fault of the HTTP client: httpx's under huggingface_hub 1, httpx2's under 2.
_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# hf_xet, which moves the bytes of most repositories, reports a broken transfer as RuntimeError.
FAULTS: tuple[type[Exception], ...] = (OSError, HFValidationError, _CLIENT_ERROR, RuntimeError)
"""What huggingface_hub raises where the Hub refuses or cannot be reached."""

_TOKENS = "https://huggingface.co/settings/tokens"
_GO_ON = "run the command again: it resumes where it stopped"
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
_WEIGHTS = ["*.safetensors", "pytorch_model*.bin"]
# Subfolders hold other formats' copies; consolidated* repeats the weights in Meta's and Mistral's own layout; an adapter beside
# the weights is no part of the base.
_OTHER_FORMATS = ("pth", "pt", "onnx", "gguf", "ggml", "h5", "msgpack", "ot")
_NEVER = ["*/*", "consolidated*", "adapter_model*", *(f"*.{end}" for end in _OTHER_FORMATS)]
_TEMPLATES = [
    "additional_chat_templates/*.jinja"
]  # the one subfolder that belongs to a model: its named chat templates


class _UnreachableError(HubError):
    """Nothing was refused: the Hub could not be asked, so what the cache holds may be used."""


@dataclass(frozen=True)
class Listing:
    """What `fetch` would download: the resolved commit and the size in bytes of each file."""

    commit: str
    sizes: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def fetch(repo_id: str, revision: str | None, allow_patterns: list[str] | None = None) -> tuple[Path, str]:
    """Download a model's configuration, tokenizer and weights, or use a whole cached copy if the Hub is away.

    Args:
        repo_id: the name on the Hub, `owner/model`.
        revision: a branch, tag or commit; None is the default branch.
        allow_patterns: fetch only files whose names match one of these; None takes what a base model needs:
            safetensors alone where the repository has them, never *.pth, *.gguf, *.onnx or a second copy.

    Returns:
        The local folder and the commit it holds.
    """
    try:
        listing = look(repo_id, revision, allow_patterns)
    except _UnreachableError as error:
        folder = _cached_or_raise(error, repo_id, revision, allow_patterns)
        logger.warning("%s Using the copy in the cache, commit %s.", error.what, folder.name[:12])
        return folder, folder.name
    names = [name.replace("[", "[[]") for name in listing.sizes]
    try:
        with _plain_words(repo_id, revision):
            # By the name of the revision, not the commit: only so can the cache be asked for that name later.
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))
    except _UnreachableError as error:
        raise HubError(f"The download of {repo_id!r} was cut off. {error.what}", fix=_GO_ON) from error
    return folder, folder.name


def check_access(repo_id: str, revision: str | None) -> str:
    """The commit that `fetch` would give, without downloading weights; HubError says why there is none."""
    try:
        return look(repo_id, revision).commit
    except _UnreachableError as error:
        return _cached_or_raise(error, repo_id, revision, None).name


def look(repo_id: str, revision: str | None, allow_patterns: list[str] | None = None) -> Listing:
    """Ask the Hub itself which files `fetch` would take, and whether this machine may read them."""
    with _plain_words(repo_id, revision):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    if info.sha is None:
        raise HubError(f"The Hub names no commit for {repo_id!r}.", fix=f"look at {_page(repo_id)}")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = _wanted(sizes, allow_patterns)
    if allow_patterns is None and (fault := _not_loadable(sizes)):
        raise HubError(f"{repo_id!r} on the Hub {fault[0]}", fix=fault[1])
    if not names:
        raise HubError(
            f"{repo_id!r} on the Hub has no file named like {', '.join(allow_patterns or [])}.",
            fix=f"its files are listed at {_page(repo_id)}/tree/main",
        )
    probe = "config.json" if "config.json" in names else names[0]
    with _plain_words(repo_id, revision):
        get_hf_file_metadata(hf_hub_url(repo_id, probe, revision=info.sha))
    return Listing(info.sha, {name: sizes[name] for name in names})


def whoami() -> str | None:
    """The account of this machine's token; None without a token, HubError where the Hub does not say."""
    if get_token() is None:
        return None
    with _plain_words(None, None):
        return str(HfApi().whoami()["name"])


def check_folder(folder: Path) -> None:
    """Raise ModelError unless the folder contains a model that Transformers can load."""
    if not folder.is_dir():
        raise ModelError(
            f"There is no folder {str(folder)!r}.",
            fix="check the path, or give a name on the Hub: owner/model",
        )
    names = [path.name for path in folder.iterdir()]
    if fault := _not_loadable(names):
        raise ModelError(f"The folder {str(folder)!r} {fault[0]}", fix=fault[1])
    if missing := missing_weights(folder, set(names)):
        raise ModelError(
            f"The folder {str(folder)!r} lacks {few(missing)}.",
            fix="finish the download, or copy what is missing",
        )


def _wanted(names: Iterable[str], allow_patterns: list[str] | None) -> list[str]:
    allow = _SMALL + _WEIGHTS if allow_patterns is None else allow_patterns
    never = _NEVER + (["*.bin", "*.bin.index.json"] if any(_is_safetensors(name) for name in names) else [])
    kept = [name for name in names if not _matches(name, never) or _matches(name, _TEMPLATES)]
    return sorted(name for name in kept if _matches(name, allow))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_safetensors(name: str) -> bool:
    return name.endswith(".safetensors") and not _matches(name, _NEVER)


def _not_loadable(names: Iterable[str]) -> tuple[str, str] | None:
    """Why files of these names are no model in Transformers' format, and the cure; None where they are."""
    names = list(names)
    if "config.json" in names and any(
        _is_safetensors(name) or _matches(name, ["pytorch_model*.bin"]) for name in names
    ):
        return None
    if "config.json" not in names and "adapter_config.json" in names:
        return (
            "is a LoRA adapter, not a base model.",
            "give the base that its adapter_config.json names; adapter=FOLDER continues from an adapter on this disk",
        )
    if any(_matches(name, ["consolidated*"]) for name in names):
        return (
            "holds a checkpoint in Meta's own format (consolidated.*), which Transformers does not read.",
            "use the converted repository, whose name ends in -hf, e.g. meta-llama/Llama-2-7b-hf",
        )
    if any(name.endswith(".gguf") for name in names):
        return (
            "holds GGUF files, which are made for inference and cannot be trained on.",
            "use the model they were made from",
        )
    lacking = "config.json" if "config.json" not in names else "weights (*.safetensors or pytorch_model*.bin)"
    return f"has no {lacking}.", "give a model in Transformers' format, e.g. meta-llama/Llama-2-7b-hf"


def missing_weights(folder: Path, names: set[str]) -> list[str]:
    """The files that the index of a sharded checkpoint names and the folder lacks."""
    index = "model.safetensors.index.json"
    if index not in names and not any(map(_is_safetensors, names)):
        index = "pytorch_model.bin.index.json"
    if index not in names:
        return []
    try:
        return sorted(set(read_index(folder / index).values()) - names)
    except ModelError:
        return [f"a readable {index}"]


def _cached_or_raise(
    error: _UnreachableError, repo_id: str, revision: str | None, allow_patterns: list[str] | None
) -> Path:
    folder = _cached(repo_id, revision, allow_patterns)
    if folder is None:
        raise HubError(
            f"{error.what} And {repo_id!r} is not completely in the cache {constants.HF_HUB_CACHE}.",
            fix=f"{error.fix}, or give a folder that holds the model",
        ) from error
    return folder


def _cached(repo_id: str, revision: str | None, allow_patterns: list[str] | None) -> Path | None:
    """The folder of a complete cached copy, or None.

    huggingface_hub knows what is missing only from a listing that an earlier snapshot_download kept, and that
    listing would ask for *.bin beside safetensors; so the weights are checked here, against their own index.
    """
    small = _SMALL if allow_patterns is None else allow_patterns
    try:
        found = snapshot_download(
            repo_id, revision=revision, allow_patterns=small, ignore_patterns=_NEVER, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    names = [path.name for path in folder.iterdir()]
    if allow_patterns is not None:
        return folder if _wanted(names, allow_patterns) else None
    return None if _not_loadable(names) or missing_weights(folder, set(names)) else folder


@contextmanager
def _plain_words(repo_id: str | None, revision: str | None) -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        raise _explain(error, repo_id, revision) from error


def _explain(error: BaseException, repo_id: str | None, revision: str | None) -> HubError:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__, repo_id, revision)
    if isinstance(error, HFValidationError):
        return HubError(
            f"{repo_id!r} is neither a folder on this machine nor a name on the Hub.",
            fix="give an existing folder, or a name like meta-llama/Llama-2-7b-hf",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return _UnreachableError(
            "HF_HUB_OFFLINE is set, so the Hub is not asked.",
            fix="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE",
        )
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo_id, revision)
    if isinstance(error, (_CLIENT_ERROR, LocalEntryNotFoundError)):
        return _UnreachableError(
            f"The Hub at {constants.ENDPOINT} cannot be reached: {_first_line(error)}.",
            fix="check the network and the proxy settings",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"The disk of the cache {constants.HF_HUB_CACHE} is full.",
            fix="free space (`hf cache ls` shows what is there), or set HF_HOME to a folder on another disk",
        )
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return HubError(
            f"You may not read the Hub's files on this machine: {_first_line(error)}.",
            fix="fix the permissions, or set HF_HOME to a folder you can write to",
        )
    return HubError(
        f"The download of {repo_id!r} was cut off: {_first_line(error)}.",
        fix=_GO_ON,
    )


def _refused(error: HfHubHTTPError, repo_id: str | None, revision: str | None) -> HubError:
    """The Hub answered, with a refusal; which one is in status, code and sentence (see this file's top)."""
    status = error.response.status_code
    said = (error.server_message or error.response.headers.get("x-error-message") or "").strip()
    stranger = "authorization" not in error.response.request.headers
    if status == 429 or status >= 500:
        return _UnreachableError(
            f"The Hub at {constants.ENDPOINT} answers {status} at the moment.",
            fix="wait a few minutes"
            + ("; the Hub allows more requests after `hf auth login`" * (status == 429 and stranger)),
        )
    if status == 401 and not stranger:
        return HubError(
            "The Hub does not accept this machine's token: it is wrong, revoked or expired.",
            fix=f"create one at {_TOKENS}, then `hf auth login --force`; renew HF_TOKEN too where it is set",
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"{repo_id!r} is on the Hub, but has no branch, tag or commit {revision!r}.",
            fix=f"choose one from {_page(repo_id)}/commits/main, or leave the revision out",
        )
    if isinstance(error, GatedRepoError) or "fine-grained" in said:
        return _gated(repo_id, said, stranger)
    # huggingface_hub itself takes a stranger's 401 for "not found" only from addresses that begin with https.
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return _not_found(repo_id, stranger)
    return HubError(
        f"The Hub refused {repo_id!r} with status {status}: {said.rstrip('.') or _first_line(error)}.",
        fix=f"look at {_page(repo_id)}",
    )


def _gated(repo_id: str | None, said: str, stranger: bool) -> HubError:
    if stranger:
        return HubError(
            f"{repo_id!r} is gated, and this machine is not logged in to the Hub.",
            fix=f"accept the licence at {_page(repo_id)}, then `hf auth login`",
        )
    if "fine-grained" in said:
        return HubError(
            f"{repo_id!r} is gated, and this machine's fine-grained token may not read gated repositories.",
            fix=f"at {_TOKENS} give it 'Read access to contents of all public gated repos you can access'",
        )
    if "awaiting a review" in said:
        return HubError(
            f"{repo_id!r} is gated; your request is sent and awaits its authors' review.",
            fix=f"wait for their answer; {constants.ENDPOINT}/settings/gated-repos shows your requests",
        )
    if "rejected" in said:
        return HubError(
            f"{repo_id!r} is gated, and its authors rejected your request.",
            fix="use a model that you have access to: the Hub accepts no second request",
        )
    return HubError(
        f"{repo_id!r} is gated, and this account has not accepted its licence yet.",
        fix=f"accept it at {_page(repo_id)} with the account that `hf auth whoami` names",
    )


def _not_found(repo_id: str | None, stranger: bool) -> HubError:
    short = "" if repo_id is None or "/" in repo_id else " A full name is owner/model."
    spelling = f"check the spelling at {constants.ENDPOINT}/models"
    if stranger:
        return HubError(
            f"The Hub shows no model {repo_id!r} to a machine that is not logged in: it is misspelt, or"
            f" private (the Hub does not say which).{short}",
            fix=f"{spelling}; if it is private, `hf auth login`",
        )
    return HubError(
        f"The Hub has no model {repo_id!r} that this account may see: it is misspelt, or private.{short}",
        fix=f"{spelling}; if it is private, ask its owner to share it with the account of `hf auth whoami`",
    )


def _page(repo_id: str | None) -> str:
    return f"{constants.ENDPOINT}/{repo_id}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def few(names: list[str]) -> str:
    """The first three of several names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
