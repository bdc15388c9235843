"""Frozen winners measured again: the same edits from their stored parameters and directions.

The model, the prompts and the libraries are today's; parameters, directions and gates are those of
the study. Nothing is searched, and the test split is opened for the frozen trial only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts.errors import PromptError
from artifacts.keys import digest
from artifacts.specs import Config, PromptSource
from artifacts.store import Manifest, Ref, Store
from tasks.locked_test import measure_test, refuse_other_trials
from tasks.numerics import labels
from tasks.prompt_sources import source_identity
from tasks.selection import frozen_trial, select_trials
from tasks.stage import Made, current, stage
from tasks.trials import Trial, open_court, to_frame, trial_of

LIBRARIES = ("torch", "transformers", "tokenizers", "tribunal")
STAGES = {made_by.kind: made_by.version for made_by in (measure_test, select_trials)}
LABELLERS = "labellers"

Environment = Mapping[str, str]
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Frozen:
    """A study's frozen winner, and the artifacts it was measured as and with."""

    study: str
    named: Ref  # the studies artifact, which holds the config
    winner: Manifest
    test: Manifest
    only: bool  # whether it is the only winner of its study, whose config is that of the first run

    @property
    def protocol(self) -> Ref:
        return input_of(self.winner, "protocol")

    @property
    def selection(self) -> str:
        """Key of the selection that chose it."""
        return str(self.winner.notes["selection"])


def input_of(manifest: Manifest, role: str) -> Ref:
    """An input of an artifact."""
    return ref_of(manifest.inputs[role])


def ref_of(entry: Mapping[str, str]) -> Ref:
    """The reference that an entry of a manifest's inputs stands for."""
    return Ref(entry["kind"], entry["key"], entry["digest"])


def prompts_of(judged: Manifest) -> dict[str, Ref]:
    """The prompt sets that an artifact of judged trials was judged on, by class."""
    roles = [role for role in judged.inputs if role.startswith("prompts.")]
    return {role.removeprefix("prompts."): input_of(judged, role) for role in roles}


def frozen_winners(store: Store) -> list[Frozen]:
    """The winner that each study froze last, with its first measurement, by the study's name."""
    held = sorted(store.manifests(), key=lambda m: (str(m.provenance.get("created")), m.key))

    def made_from(kind: str, role: str, key: str) -> list[Manifest]:
        return [m for m in held if m.kind == kind and m.inputs[role]["key"] == key]

    found = []
    for named in (manifest for manifest in held if manifest.kind == "studies"):
        protocol = named.inputs["protocol"]["key"]
        winners = made_from("winners", "protocol", protocol)
        tests = made_from("tests", "winner", winners[-1].key) if winners else []
        if tests:
            study = f"{_name(named)}-{protocol[:6]}"
            found.append(Frozen(study, named.ref, winners[-1], tests[0], len(winners) == 1))
    return sorted(found, key=lambda frozen: frozen.study)


def _name(named: Manifest) -> str:
    """The config's name: told by the manifest, so that a torn table spoils no other study."""
    identity: Any = named.identity
    return str(identity["config"])


def environment() -> Environment:
    """What of the installation can change a measurement: libraries, stages, labellers.

    The device is not part of it: which one a run gets is unknown before torch is loaded, and a
    study that moves between workers would be measured again every time. It is told among the
    causes where something else had the winner measured again.
    """
    return {
        **{name: version(name) for name in LIBRARIES},
        **{f"{kind} stage": str(number) for kind, number in STAGES.items()},
        LABELLERS: _code_digest(Path(labels.__file__)),
    }


def environment_of(*made: Manifest) -> Environment:
    """The same, as far as artifacts of the study tell it."""
    told = {
        name: str(manifest.provenance[name])
        for manifest in made
        for name in LIBRARIES
        if name in manifest.provenance
    }
    return told | {f"{manifest.kind} stage": str(manifest.version) for manifest in made}


def _code_digest(file: Path) -> str:
    """Digest of a module's code; its comments and layout do not count."""
    return digest(ast.dump(ast.parse(file.read_bytes())))[:16]


def is_source_of(source: PromptSource, prompts: Manifest) -> bool:
    """Whether a stored prompt set was read from this source, whatever it holds today.

    Content may have changed, so a file or folder is known by its name and a hub id by itself; all
    else (split, column, revision, ...) has to be the same.
    """
    identity: Any = prompts.identity
    then = dict(identity["source"])
    name = then.pop("source")
    now = source.model_dump(mode="json", exclude={"source"})
    if any(now.get(field) != value for field, value in then.items()):
        return False
    if isinstance(name, Mapping):  # a digest, of what lay somewhere
        return str(prompts.notes["resolved"]).startswith(f"{Path(source.source).name} sha256:")
    return bool(source.source == name)


def newest(source: PromptSource, resolved: str) -> PromptSource:
    """The source at the commit its hub branch is at today; any other source as it is.

    A hub id identifies its content by its revision only, so a branch that moved has to be looked
    up. Where `resolved`, the commit that was loaded, is still the newest, the source stays as it
    is, and so does the key of its prompts; likewise where the hub is switched off.

    Raises:
        PromptError: the hub cannot name the commit.
    """
    local = isinstance(source_identity(source)["source"], Mapping)
    if local or (source.revision and _COMMIT.fullmatch(source.revision)):
        return source
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]  # its HTTP client's

    try:
        commit = HfApi().dataset_info(source.source, revision=source.revision, timeout=10).sha
    except OfflineModeIsEnabled:
        return source
    except (HTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PromptError(
            f"cannot look up data set '{source.source}' at '{source.revision or 'main'}' on the "
            f"Hugging Face hub: {reason}; pin its revision to a full commit, or connect"
        ) from error
    if commit is None or resolved.endswith(f"@{commit}"):
        return source
    return source.model_copy(update={"revision": commit})


@stage(
    "retests",
    version=1,
    ignore=("config",),  # the protocol holds what of it counts
    label=lambda **_: "winner, measured again",
    work=lambda **_: 2,
)
def retest_winner(
    *,
    config: Config,
    winner: Ref,
    protocol: Ref,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
    environment: Environment,
    occasion: str | None,
) -> Made:
    """The frozen trial and the unedited model on today's test prompts.

    Raises:
        TestSplitSpent: these test prompts were opened for another trial.
    """
    trial = frozen_trial(winner)
    refuse_other_trials(current().store, protocol.key, prompts, trial.number)
    court, base = open_court("test", config, protocol, materials, prompts)
    judged = court.judge([trial])
    unedited = court.row(Trial("unedited", None, {}), base.rows)
    return Made(to_frame([*judged, unedited]), {"trial": trial.number})


@stage(
    "reselections",
    version=1,
    ignore=("config",),
    label=lambda **_: "candidates, measured again",
    work=lambda selection, **_: 1 + selection.rows,
)
def rejudge_candidates(
    *,
    config: Config,
    selection: Ref,
    protocol: Ref,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
    environment: Environment,
    occasion: str | None,
) -> Made:
    """The trials that were compared on the selection split, on its prompts of today."""
    candidates = current().store.read(selection).drop("responses")
    court, _ = open_court("selection", config, protocol, materials, prompts)
    trials = [trial_of(row) for row in candidates.to_dicts()]
    return Made(to_frame(court.judge(trials)))
