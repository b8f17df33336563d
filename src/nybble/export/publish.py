"""Upload an artefact to the Hugging Face Hub, privately."""

from __future__ import annotations

import pathlib
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from nybble.errors import HubError
from nybble.model.hub import whoami
from nybble.model.hub_faults import FAULTS

LOGIN = "hf auth login, with a token with write access (https://huggingface.co/settings/tokens)"

# ValueError: the Hub rejects the card's front matter.
UPLOAD_FAULTS: tuple[type[Exception], ...] = (*FAULTS, ValueError)


def check_push(repo: str) -> None:
    """Check before any work that the Hub accepts the name and the token.

    Raises:
        HubError: one of them is wrong.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"{repo!r} is not a valid Hub name: {error}", fix="--push OWNER/NAME") from error
    if get_token() is None:
        raise HubError(f"pushing to {repo!r} needs a token, and this machine is not logged in to the Hub", fix=LOGIN)
    whoami()


def push(folder: pathlib.Path, repo: str, withheld: str) -> str:
    """Upload a folder as a model; a new repository is private, an existing one stays as it is.

    Args:
        folder: the artefact.
        repo: OWNER/NAME.
        withheld: a file that is not uploaded.

    Returns:
        Its page, with whether it is private.

    Raises:
        HubError: the Hub refuses, or cannot be reached; the folder is untouched.
    """
    api = HfApi()
    again = f"the artefact is complete in {folder}; upload it with: hf upload {repo} {folder} --private --exclude {withheld}"
    try:
        is_new = not api.repo_exists(repo)
        created = api.create_repo(repo, private=True, exist_ok=True).repo_id
        info: Any = api.model_info(created)
        if is_new and not info.private:
            raise HubError(f"the Hub made {created!r} public although private was requested: nothing was uploaded")
        api.upload_folder(
            repo_id=created, folder_path=folder, commit_message="Export by nybble", ignore_patterns=[withheld]
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        message = (error.server_message or "").strip().rstrip(".")
        raise HubError(
            f"the Hub refused the upload to {repo!r} with status {status}{': ' + message if message else ''}",
            fix=f"{LOGIN if status in (401, 403) else 'see its message'}; {again}",
        ) from error
    except UPLOAD_FAULTS as error:
        raise HubError(
            f"the upload to {repo!r} failed: {' '.join(str(error).split())}",
            fix=again,
        ) from error
    return f"{constants.ENDPOINT}/{created} ({'private' if info.private else 'public, as it was'})"
