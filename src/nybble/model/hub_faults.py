"""Explanations of refusals by the Hugging Face Hub, and of failures to reach it.

The Hub reports a fault with a status, the header X-Error-Code and a sentence in X-Error-Message. Their
meaning was taken from huggingface_hub's hf_raise_for_status, from users' reports of the sentences, and from
https://huggingface.co/docs/hub/models-gated:

    401, GatedRepo                      gated, and no token was sent (or it was not accepted)
    401, no code, no token sent         no such name, or private: without a login the Hub does not say which
    403, GatedRepo                      "not in the authorized list", "awaiting a review" or "rejected"
    403, no code, "fine-grained token"  the token's scope excludes gated repositories
    404, RepoNotFound                   no such name, or private and not shared with this account
    404, RevisionNotFound               the model exists, the branch, tag or commit does not

The listing of a gated repository is public, its files are not; so access is checked with a file, as in a download.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nybble.errors import HubError

# The base class of every error of the HTTP client: httpx's under huggingface_hub 1, httpx2's under 2.
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# hf_xet, which moves the bytes of most repositories, reports a broken transfer as RuntimeError.
FAULTS: tuple[type[Exception], ...] = (OSError, HFValidationError, CLIENT_ERROR, RuntimeError)
"""What huggingface_hub raises where the Hub refuses or cannot be reached."""

RETRY = "run the command again: it resumes where it stopped"
_TOKENS = "https://huggingface.co/settings/tokens"


class UnreachableError(HubError):
    """The Hub could not be reached, and so refused nothing: a cached copy may be used."""


@contextmanager
def explained_hub_faults(repo_id: str | None, revision: str | None) -> Iterator[None]:
    """Turn a refusal by the Hub, or a failed request, into an error that says what to do.

    Raises:
        HubError: instead of one of FAULTS.
    """
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
        return UnreachableError(
            "HF_HUB_OFFLINE is set, so the Hub is not contacted.",
            fix="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE",
        )
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo_id, revision)
    if isinstance(error, (CLIENT_ERROR, LocalEntryNotFoundError)):
        return UnreachableError(
            f"The Hub at {constants.ENDPOINT} cannot be reached: {_first_line(error)}.",
            fix="check the network and the proxy settings",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"The disk that holds the cache {constants.HF_HUB_CACHE} is full.",
            fix="free space (`hf cache ls` shows what is there), or set HF_HOME to a folder on another disk",
        )
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return HubError(
            f"You may not read the Hub's files on this machine: {_first_line(error)}.",
            fix="fix the permissions, or set HF_HOME to a folder you can write to",
        )
    return HubError(
        f"The download of {repo_id!r} was cut off: {_first_line(error)}.",
        fix=RETRY,
    )


def _refused(error: HfHubHTTPError, repo_id: str | None, revision: str | None) -> HubError:
    """The Hub refused; status, code and sentence say why (see the top of this file)."""
    status = error.response.status_code
    message = (error.server_message or error.response.headers.get("x-error-message") or "").strip()
    anonymous = "authorization" not in error.response.request.headers
    if status == 429 or status >= 500:
        return UnreachableError(
            f"The Hub at {constants.ENDPOINT} answers {status} at the moment.",
            fix="wait a few minutes"
            + ("; the Hub allows more requests after `hf auth login`" * (status == 429 and anonymous)),
        )
    if status == 401 and not anonymous:
        return HubError(
            "The Hub does not accept this machine's token: it is wrong, revoked or expired.",
            fix=f"create one at {_TOKENS}, then `hf auth login --force`; renew HF_TOKEN too where it is set",
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"{repo_id!r} is on the Hub, but has no branch, tag or commit {revision!r}.",
            fix=f"choose one from {page_of(repo_id)}/commits/main, or leave the revision out",
        )
    if isinstance(error, GatedRepoError) or "fine-grained" in message:
        return _gated(repo_id, message, anonymous)
    # huggingface_hub itself treats a 401 without a token as "not found" only for addresses that start with https.
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return _not_found(repo_id, anonymous)
    return HubError(
        f"The Hub refused {repo_id!r} with status {status}: {message.rstrip('.') or _first_line(error)}.",
        fix=f"look at {page_of(repo_id)}",
    )


def _gated(repo_id: str | None, message: str, anonymous: bool) -> HubError:
    if anonymous:
        return HubError(
            f"{repo_id!r} is gated, and this machine is not logged in to the Hub.",
            fix=f"accept the licence at {page_of(repo_id)}, then `hf auth login`",
        )
    if "fine-grained" in message:
        return HubError(
            f"{repo_id!r} is gated, and this machine's fine-grained token may not read gated repositories.",
            fix=f"at {_TOKENS} give it 'Read access to contents of all public gated repos you can access'",
        )
    if "awaiting a review" in message:
        return HubError(
            f"{repo_id!r} is gated; your request was sent and is awaiting its authors' review.",
            fix=f"wait for their answer; {constants.ENDPOINT}/settings/gated-repos shows your requests",
        )
    if "rejected" in message:
        return HubError(
            f"{repo_id!r} is gated, and its authors rejected your request.",
            fix="use a model that you have access to: the Hub accepts no second request",
        )
    return HubError(
        f"{repo_id!r} is gated, and this account has not accepted its licence yet.",
        fix=f"accept it at {page_of(repo_id)} with the account that `hf auth whoami` names",
    )


def _not_found(repo_id: str | None, anonymous: bool) -> HubError:
    short = "" if repo_id is None or "/" in repo_id else " The full form is owner/model."
    spelling = f"check the spelling at {constants.ENDPOINT}/models"
    if anonymous:
        return HubError(
            f"The Hub shows no model {repo_id!r} to a machine that is not logged in: it is misspelt, or"
            f" private (the Hub does not say which).{short}",
            fix=f"{spelling}; if it is private, `hf auth login`",
        )
    return HubError(
        f"The Hub has no model {repo_id!r} that this account may see: it is misspelt, or private.{short}",
        fix=f"{spelling}; if it is private, ask its owner to share it with the account of `hf auth whoami`",
    )


def page_of(repo_id: str | None) -> str:
    """A model's page."""
    return f"{constants.ENDPOINT}/{repo_id}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
