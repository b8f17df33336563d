"""The Hugging Face Hub: fetch a base model; `nybble.model.hub_faults` explains failures."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from nybble.errors import HubError, ModelError
from nybble.model.base.headers import read_index
from nybble.model.hub_faults import RETRY, UnreachableError, explained_hub_faults, page_of

logger = logging.getLogger(__name__)

_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
_WEIGHTS = ["*.safetensors", "pytorch_model*.bin"]
# Subfolders contain copies in other formats; consolidated* repeats the weights in Meta's and Mistral's own layout; an adapter
# beside the weights is not part of the base.
_OTHER_FORMATS = ("pth", "pt", "onnx", "gguf", "ggml", "h5", "msgpack", "ot")
_NEVER = ["*/*", "consolidated*", "adapter_model*", *(f"*.{end}" for end in _OTHER_FORMATS)]
# The one subfolder that belongs to a model: its named chat templates.
_TEMPLATES = ["additional_chat_templates/*.jinja"]


@dataclass(frozen=True)
class Listing:
    """What `fetch` would download: the resolved commit and the size in bytes of each file."""

    commit: str
    sizes: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def fetch(repo_id: str, revision: str | None, allow_patterns: list[str] | None = None) -> tuple[Path, str]:
    """Download a model's configuration, tokenizer and weights, or use a complete cached copy if the Hub cannot be reached.

    Args:
        repo_id: the name on the Hub, `owner/model`.
        revision: a branch, tag or commit; None is the default branch.
        allow_patterns: fetch only files whose names match one of these; None fetches what a base model needs:
            safetensors only if the repository has them, never *.pth, *.gguf, *.onnx or a second copy.

    Returns:
        The local folder and its commit.
    """
    try:
        listing = list_files(repo_id, revision, allow_patterns)
    except UnreachableError as error:
        folder = _cached_or_raise(error, repo_id, revision, allow_patterns)
        logger.warning("%s Using the copy in the cache, commit %s.", error.what, folder.name[:12])
        return folder, folder.name
    names = [name.replace("[", "[[]") for name in listing.sizes]
    try:
        with explained_hub_faults(repo_id, revision):
            # By the name of the revision, not the commit, so that the cache can be searched for that name later.
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))
    except UnreachableError as error:
        raise HubError(f"The download of {repo_id!r} was cut off. {error.what}", fix=RETRY) from error
    return folder, folder.name


def check_access(repo_id: str, revision: str | None) -> str:
    """The commit that `fetch` would return, without downloading weights; HubError says why there is none."""
    try:
        return list_files(repo_id, revision).commit
    except UnreachableError as error:
        return _cached_or_raise(error, repo_id, revision, None).name


def list_files(repo_id: str, revision: str | None, allow_patterns: list[str] | None = None) -> Listing:
    """Ask the Hub which files `fetch` would download, and whether this machine may read them."""
    with explained_hub_faults(repo_id, revision):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    if info.sha is None:
        raise HubError(f"The Hub gives no commit for {repo_id!r}.", fix=f"look at {page_of(repo_id)}")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = _wanted(sizes, allow_patterns)
    if allow_patterns is None and (fault := _not_loadable(sizes)):
        raise HubError(f"{repo_id!r} on the Hub {fault[0]}", fix=fault[1])
    if not names:
        raise HubError(
            f"{repo_id!r} on the Hub has no file named like {', '.join(allow_patterns or [])}.",
            fix=f"its files are listed at {page_of(repo_id)}/tree/main",
        )
    probe = "config.json" if "config.json" in names else names[0]
    with explained_hub_faults(repo_id, revision):
        get_hf_file_metadata(hf_hub_url(repo_id, probe, revision=info.sha))
    return Listing(info.sha, {name: sizes[name] for name in names})


def whoami() -> str | None:
    """The account of this machine's token; None without a token, HubError if the Hub does not answer."""
    if get_token() is None:
        return None
    with explained_hub_faults(None, None):
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
            f"The folder {str(folder)!r} is missing {first_three(missing)}.",
            fix="finish the download, or copy what is missing",
        )


def _wanted(names: Iterable[str], allow_patterns: list[str] | None) -> list[str]:
    allow = _SMALL + _WEIGHTS if allow_patterns is None else allow_patterns
    never = _NEVER + (["*.bin", "*.bin.index.json"] if any(_is_safetensors(name) for name in names) else [])
    allowed = [name for name in names if not _matches(name, never) or _matches(name, _TEMPLATES)]
    return sorted(name for name in allowed if _matches(name, allow))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_safetensors(name: str) -> bool:
    return name.endswith(".safetensors") and not _matches(name, _NEVER)


def _not_loadable(names: Iterable[str]) -> tuple[str, str] | None:
    """Why files with these names are not a model in Transformers' format, and the fix; None if they are."""
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
            "contains a checkpoint in Meta's own format (consolidated.*), which Transformers does not read.",
            "use the converted repository, whose name ends in -hf, e.g. meta-llama/Llama-2-7b-hf",
        )
    if any(name.endswith(".gguf") for name in names):
        return (
            "contains GGUF files, which are made for inference and cannot be trained on.",
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
    error: UnreachableError, repo_id: str, revision: str | None, allow_patterns: list[str] | None
) -> Path:
    folder = _cached(repo_id, revision, allow_patterns)
    if folder is None:
        raise HubError(
            f"{error.what} And {repo_id!r} is not fully in the cache {constants.HF_HUB_CACHE}.",
            fix=f"{error.fix}, or give a folder that contains the model",
        ) from error
    return folder


def _cached(repo_id: str, revision: str | None, allow_patterns: list[str] | None) -> Path | None:
    """The folder of a complete cached copy, or None.

    huggingface_hub can tell what is missing only from a listing that an earlier snapshot_download saved, and that
    listing would include *.bin besides safetensors; so the weights are checked here, against their own index.
    """
    small = _SMALL if allow_patterns is None else allow_patterns
    try:
        cached = snapshot_download(
            repo_id, revision=revision, allow_patterns=small, ignore_patterns=_NEVER, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(cached)
    names = [path.name for path in folder.iterdir()]
    if allow_patterns is not None:
        return folder if _wanted(names, allow_patterns) else None
    return None if _not_loadable(names) or missing_weights(folder, set(names)) else folder


def first_three(names: list[str]) -> str:
    """The first three of several names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
