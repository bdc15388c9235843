"""Files of other tools, told apart by what is in them: journals, SQLite studies, JSON reports.

A file is read from a copy in a temporary folder, so that it is neither locked nor touched, and
through Optuna's own storage classes, which load no pickle from these formats.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.errors import PeerError
from artifacts.paths import exists
from tasks.peers.found import HERETIC, PeerStudy, PeerTrial

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LARGEST = 2**28  # bytes
_SQLITE = b"SQLite format 3\0"
KNOWN = (
    "an Optuna journal, an Optuna SQLite study, a reproduce.json, a batch_summary.json or a "
    "config.toml of HERETIC or ICONOCLAST"
)


@dataclass(frozen=True)
class PeerFile:
    """A file of another tool: what it is, and the studies in it."""

    name: str
    form: str
    digest: str
    studies: tuple[PeerStudy, ...]


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        PeerError: it cannot be read, or is too large to be one of these.
    """
    return hashlib.sha256(_bytes(path)).hexdigest()


def read_peer_file(path: Path, *, drop_torn: bool = False) -> PeerFile:
    """The studies of a file.

    Args:
        path: journal, SQLite file, reproduce.json or batch_summary.json.
        drop_torn: leave out a journal's last line if it is torn.

    Raises:
        PeerError: it is none of these, is torn, or holds no trial.
    """
    data = _bytes(path)
    form = form_of(path.name, data)
    if form == "sqlite":
        studies = _sqlite(path)
    elif form == "journal":
        studies = _journal(path.name, data, drop_torn)
    else:
        studies = (_report(path.name, form, json.loads(data)),)
    if not any(study.trials for study in studies):
        raise PeerError(f"'{path.name}' holds no trial")
    return PeerFile(path.name, form, hashlib.sha256(data).hexdigest(), studies)


def form_of(name: str, data: bytes) -> str:
    """What a file is.

    Raises:
        PeerError: none of the known forms.
    """
    if not data.strip():
        raise PeerError(f"'{name}' is empty; give {KNOWN}")
    if data.startswith(_SQLITE):
        return "sqlite"
    whole, first = _tree(data), _tree(data.split(b"\n", 1)[0])
    if isinstance(whole, Mapping) and isinstance(whole.get("pareto_trials"), list):
        return "batch_summary.json"
    if isinstance(whole, Mapping) and isinstance(whole.get("parameters"), Mapping):
        return "reproduce.json"
    if isinstance(first, Mapping) and "op_code" in first:
        return "journal"
    raise PeerError(f"'{name}' is not what a known tool writes; give {KNOWN}")


def _bytes(path: Path) -> bytes:
    if not exists(path) or not path.is_file():
        raise PeerError(f"no file '{path}'")
    try:
        if path.stat().st_size > LARGEST:
            raise PeerError(f"'{path.name}' is larger than {LARGEST >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise PeerError(f"cannot read '{path}': {error.strerror}") from error


def _tree(data: bytes) -> Any:
    """JSON; None if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _journal(name: str, data: bytes, drop_torn: bool) -> tuple[PeerStudy, ...]:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "journal"
        copy.write_bytes(_whole_lines(name, data, drop_torn))
        with _reading(name):
            return _studies(JournalStorage(JournalFileBackend(str(copy))))


def _whole_lines(name: str, data: bytes, drop_torn: bool) -> bytes:
    """A journal that ends with a whole line.

    Raises:
        PeerError: a line is no JSON, and is not a last one that may be dropped.
    """
    lines = data.splitlines(keepends=True)
    torn = [n for n, line in enumerate(lines) if not isinstance(_tree(line), Mapping)]
    last = len(lines) - 1
    if not torn and not data.endswith(b"\n"):
        torn = [last]
    if not torn:
        return data
    if torn != [last]:
        raise PeerError(f"line {torn[0] + 1} of the journal '{name}' is damaged: it is no JSON")
    if not drop_torn:
        raise PeerError(
            f"the last line of the journal '{name}', number {last + 1}, is torn: its run was "
            "killed while writing, or is writing now; --drop-torn reads it without that line"
        )
    return b"".join(lines[:-1])


def _sqlite(path: Path) -> tuple[PeerStudy, ...]:
    from optuna.storages import RDBStorage

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "study.db"
        try:
            shutil.copyfile(path, copy)
            for ending in ("-wal", "-journal"):  # what is not yet in the file itself
                beside = path.with_name(path.name + ending)
                if exists(beside):
                    shutil.copyfile(beside, copy.with_name(copy.name + ending))
        except OSError as error:
            raise PeerError(f"cannot read '{path}': {error.strerror}") from error
        _require_optuna(path.name, copy)
        with _reading(path.name):
            storage = RDBStorage(f"sqlite:///{copy}", skip_compatibility_check=True)
            try:
                storage.upgrade()
                return _studies(storage)
            finally:
                storage.engine.dispose()


def _require_optuna(name: str, copy: Path) -> None:
    """Refuse an SQLite file that is not Optuna's, before Optuna makes its tables in the copy."""
    try:
        with closing(sqlite3.connect(copy)) as connection:
            found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {row[0] for row in found}
    except sqlite3.Error as error:
        raise PeerError(f"'{name}' is a damaged SQLite file: {error}") from error
    if not {"studies", "trials", "trial_user_attributes"} <= tables:
        raise PeerError(f"the SQLite file '{name}' holds no Optuna study")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Optuna reads silently, and whatever it stumbles over is one line."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise PeerError(f"'{name}' is damaged, or of an unknown Optuna version: {said}") from error
    finally:
        optuna.logging.set_verbosity(level)


def _studies(storage: BaseStorage) -> tuple[PeerStudy, ...]:
    found = []
    for study in storage.get_all_studies():
        trials = sorted(storage.get_all_trials(study._study_id), key=lambda trial: trial.number)
        told = dict(study.user_attrs)
        settings = told.get("settings")
        tree = _tree(settings.encode()) if isinstance(settings, str) else settings
        told |= {"settings": tree}
        found.append(
            PeerStudy(
                name=study.study_name,
                trials=[
                    PeerTrial(
                        number=trial.number,
                        state=trial.state.name,
                        attributes=trial.user_attrs,
                        sampled=trial.params,
                        system=trial.system_attrs,
                        values=trial.values or (),
                    )
                    for trial in trials
                ],
                settings=tree if isinstance(tree, Mapping) else {},
                attributes=told,
            )
        )
    return tuple(found)


def _report(name: str, form: str, tree: Mapping[str, Any]) -> PeerStudy:
    return _reproduce(name, tree) if form == "reproduce.json" else _summary(name, tree)


def _reproduce(name: str, tree: Mapping[str, Any]) -> PeerStudy:
    """HERETIC's reproduce.json, versions 1 and 2; version 3 has `scores` in place of `metrics`.

    Raises:
        PeerError: its edit is not one of this family.
    """
    edit, environment = tree["parameters"], tree.get("environment")
    if not isinstance(edit.get("abliteration_parameters"), Mapping):
        kind = ", ".join(map(str, edit)) or "nothing"
        raise PeerError(f"'{name}' holds an edit of another kind ({kind}), which is none here")
    metrics = tree.get("metrics")
    told = dict(metrics) if isinstance(metrics, Mapping) else {}
    told |= {"direction_index": edit["direction_index"]} if "direction_index" in edit else {}
    told |= {"parameters": edit["abliteration_parameters"]}
    told |= {"scores": tree["scores"]} if "scores" in tree else {}
    heretic = environment.get("heretic") if isinstance(environment, Mapping) else None
    version = heretic.get("version") if isinstance(heretic, Mapping) else None
    settings = tree.get("settings")
    return PeerStudy(
        name=HERETIC,
        trials=[PeerTrial(None, "COMPLETE", told)],
        settings=settings if isinstance(settings, Mapping) else {},
        attributes={k: v for k, v in tree.items() if k not in ("parameters", "metrics")},
        tool_version=version if isinstance(version, str) else None,
    )


def _summary(name: str, tree: Mapping[str, Any]) -> PeerStudy:
    """ICONOCLAST's batch_summary.json: the trials of its own list, and the unedited model.

    Raises:
        PeerError: a trial is none.
    """
    base = tree.get("base_metrics")
    unedited = base.get("refusals") if isinstance(base, Mapping) else None
    trials = []
    for place, told in enumerate(tree["pareto_trials"]):
        if not isinstance(told, Mapping):
            raise PeerError(f"'{name}' is damaged: entry {place} of its pareto_trials is no trial")
        index = told.get("index")
        number = index - 1 if isinstance(index, int) and index > 0 else None
        trials.append(PeerTrial(number, "COMPLETE", {"base_refusals": unedited, **told}))
    model = tree.get("model")
    return PeerStudy(
        name="iconoclast",
        trials=trials,
        settings={"model": model} if isinstance(model, str) else {},
        attributes={k: v for k, v in tree.items() if k != "pareto_trials"},
    )
