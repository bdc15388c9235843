"""What a model is, apart from where it lies: a hub commit, or a digest of a folder's files.

Artifact keys are made from this before any model is loaded, so torch and transformers stay out,
and the hub's client is imported only for a hub id whose commit is not known yet.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import ModelError
from artifacts.paths import exists

ORGANISM = Path(__file__).resolve().parents[1] / "organism" / "model"

_SUFFIXES = {".json", ".safetensors", ".model", ".tiktoken", ".txt", ".jinja", ".py"}
_PROSE = ("readme", "license", "notice", "card", "use_policy")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)  # the hub's own limit


@dataclass(frozen=True)
class ModelIdentity:
    """Where to load a model from, and the name under which its results are kept.

    Attributes:
        source: folder or hub id; where, so never part of a key.
        revision: commit on the hub; None for a folder.
        digest: "sha256:..." of a folder's files, or "hub:ID@COMMIT".
    """

    source: str
    revision: str | None
    digest: str


def resolve(model_id: str, revision: str | None = None) -> ModelIdentity:
    """The identity of 'organism', a local folder, or a hub id at a branch, tag or commit.

    A full commit is taken at its word; a branch or tag is looked up on the hub, or, where that is
    out of reach, in the hub's local cache.

    Raises:
        ModelError: no such folder, or a revision that neither hub nor cache can name.
    """
    folder = local_folder(model_id)
    if folder is not None:
        return ModelIdentity(str(folder), None, f"sha256:{folder_digest(folder)}")
    commit = revision if revision and _COMMIT.fullmatch(revision) else _commit(model_id, revision)
    return ModelIdentity(model_id, commit, f"hub:{model_id}@{commit}")


def local_folder(model_id: str) -> Path | None:
    """The folder that `model_id` names, or None if it can only be a hub id.

    Raises:
        ModelError: it is written as a path, and there is no such folder.
    """
    folder = ORGANISM if model_id == "organism" else Path(os.path.expanduser(model_id))
    if exists(folder) and folder.is_dir():
        return folder
    if model_id == "organism" or not _HUB_ID.fullmatch(model_id) or model_id.startswith("."):
        raise ModelError(f"no model folder '{model_id}'; give a folder, a hub id, or 'organism'")
    return None


def folder_digest(folder: Path) -> str:
    """sha256, in hex, of everything in a folder that can change what the model computes.

    That is configuration, weights, tokenizer, chat templates and code, each by its name inside
    the folder. Where the folder lies, the order of its files, hidden files and prose (README,
    licence, model card) do not count. Names are hashed with a separator no name can hold, and
    contents by their own digest, so that two folders never look alike by shifting a boundary.

    Raises:
        ModelError: the folder holds no such file.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    names = sorted(name for name, path in files.items() if _counts(name) and path.is_file())
    if not names:
        raise ModelError(f"folder '{folder}' holds no model files")
    digest = hashlib.sha256()
    for name in names:
        with files[name].open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _counts(name: str) -> bool:
    path = Path(name)
    hidden = any(part.startswith(".") for part in path.parts)
    prose = path.stem.lower().startswith(_PROSE)
    return path.suffix in _SUFFIXES and not hidden and not prose


def require_hub(model_id: str, revision: str | None = None) -> None:
    """Refuse to take a branch's commit from the cache because the hub is out of reach.

    A folder, a full commit, and a hub that is switched off (HF_HUB_OFFLINE=1) need no hub.

    Raises:
        ModelError: the hub cannot name the commit.
    """
    pinned = revision and _COMMIT.fullmatch(revision)
    if not pinned and local_folder(model_id) is None:
        _commit(model_id, revision, cached=False)


def _commit(repo: str, revision: str | None, cached: bool = True) -> str:
    """The commit behind a branch or tag (None: the default branch).

    Args:
        repo, revision: what to look up.
        cached: whether the cache answers for a hub out of reach; for one switched off it does.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]  # its HTTP client's

    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=10).sha
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        usable = cached or isinstance(e, OfflineModeIsEnabled)
        commit = _cached_commit(repo, revision) if usable else None
    else:
        reason = "the hub names no commit"
    if commit is None:
        raise ModelError(
            f"cannot look up '{repo}' at '{revision or 'main'}' on the Hugging Face hub: {reason}; "
            "give model.id a local folder, or pin model.revision to a full commit"
        )
    return commit


def _cached_commit(repo: str, revision: str | None) -> str | None:
    from huggingface_hub import constants

    folder = f"models--{repo.replace('/', '--')}"
    ref = Path(constants.HF_HUB_CACHE, folder, "refs", revision or "main")
    return ref.read_text().strip() if ref.is_file() else None
