"""An exported folder on the Hugging Face hub: private unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from artifacts.errors import ExportError

TOKEN = "HF_TOKEN"


def hub() -> Any:
    """The hub's client, with the token of the environment and no other.

    Raises:
        ExportError: there is no token.
    """
    from huggingface_hub import HfApi

    token = os.environ.get(TOKEN)
    if not token:
        raise ExportError(f"an upload needs a token that may write, in the environment: {TOKEN}")
    return HfApi(token=token)


def require_name(repo: str) -> None:
    """Refuse what cannot be a repository's name, before anything is computed.

    Raises:
        ExportError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ExportError(f"--push '{repo}': {error}") from error


def upload(folder: Path, repo: str, public: bool, message: str, api: Any) -> str:
    """Upload a folder to a repository, which is made if there is none; where it is then.

    Args:
        api: the hub's client (`hub()`).

    Raises:
        ExportError: the hub refuses or cannot be reached, or the repository is public and was not
            asked to be. The folder stays.
    """
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]  # its HTTP client's

    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise ExportError(f"repository '{repo}' is public; give --public, or another name")
        done = api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"the hub did not take '{repo}': {said}; '{folder}' is whole, and can be uploaded "
            f"later: hf upload {repo} {folder}"
        ) from error
    return str(done.commit_url)
