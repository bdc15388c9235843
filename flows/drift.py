"""Frozen winners held against today: each is measured again if anything that matters has changed.

The same lines run inside the Prefect flow (`flows.rebenchmark`) and without Prefect (the command
line when no server is configured). One study that cannot be measured does not stop the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from artifacts.errors import ConfigError, TribunalError, one_line
from artifacts.specs import Config
from artifacts.store import Manifest, Ref, Store
from flows.pipeline import sources, split_of
from flows.results import find_study
from flows.settings import validate_stored
from tasks.drift import HELD, UNCHANGED, causes_of, device_causes, newest_drift, record_drift
from tasks.models.identity import require_hub
from tasks.probe import probe_model
from tasks.prompts import load_prompts
from tasks.remeasure import (
    Environment,
    Frozen,
    environment,
    environment_of,
    frozen_winners,
    input_of,
    is_source_of,
    newest,
    prompts_of,
    rejudge_candidates,
    retest_winner,
)
from tasks.stage import current

SPLITS = ("test", "selection")


@dataclass(frozen=True)
class Outcome:
    """What became of one study's winner. `error` says why it could not be measured."""

    study: str
    drift: Ref | None = None
    rows: tuple[Mapping[str, Any], ...] = ()
    news: bool = False
    error: str | None = None

    @property
    def winner(self) -> Mapping[str, Any]:
        """What the rows of a comparison share: verdict, cause, places, gates."""
        return self.rows[0]

    @property
    def verdict(self) -> str:
        return "not measured" if self.error else str(self.winner["verdict"])

    @property
    def holds(self) -> bool:
        return self.verdict in HELD

    @property
    def unchanged(self) -> bool:
        return self.verdict == UNCHANGED

    @property
    def drifted(self) -> list[Mapping[str, Any]]:
        """The winner's metrics whose difference is more than noise."""
        own = [row for row in self.rows if row["arm"] == self.winner["arm"]]
        return [row for row in own if row["change"] == "drifted"]


def winners_to_check(store: Store, names: Sequence[str] | None) -> list[Frozen]:
    """The frozen winners of the named studies, or of all.

    Raises:
        ConfigError: no such study, or it has no frozen winner that was tested.
    """
    found = {frozen.study: frozen for frozen in frozen_winners(store)}
    wanted = list(found) if names is None else [find_study(store, name) for name in names]
    if not wanted:
        raise ConfigError(
            f"no frozen winner in the store '{store.location}' yet; start with: tribunal run"
        )
    for name in wanted:
        if name not in found:
            raise ConfigError(f"study '{name}' has no tested winner yet; finish it: tribunal run")
    return [found[name] for name in dict.fromkeys(wanted)]


def occasion_of(force: bool, words: str | None) -> str | None:
    """Why all are measured again, whatever changed: the words, or the time; None: they are not."""
    if force and not words:
        return datetime.now(UTC).isoformat(timespec="milliseconds")
    return words or None


def work_of(store: Store, winners: Sequence[Frozen]) -> int:
    """Trials to judge, at most: each winner, its candidates, and the unedited model twice."""
    candidates = {manifest.key: manifest.rows for manifest in store.manifests("selections")}
    return sum(3 + candidates.get(frozen.selection, 0) for frozen in winners)


def check_winners(
    winners: Sequence[Frozen], occasion: str | None = None, now: Environment | None = None
) -> list[Outcome]:
    """Hold every winner against today, one after the other.

    Args:
        winners: the studies' winners.
        occasion: why all are measured again although nothing changed; part of the keys. None:
            only what changed is measured.
        now: what is installed; default: this installation.
    """
    installed = environment() if now is None else now
    return [_outcome(frozen, occasion, installed) for frozen in winners]


def _outcome(frozen: Frozen, occasion: str | None, now: Environment) -> Outcome:
    store = current().store
    try:
        before = newest_drift(frozen.winner.ref)
        drift = check_winner(frozen, occasion, now)
        rows = tuple(store.read(drift).to_dicts())
    except Exception as error:  # noqa: BLE001 - whatever fails a study, the next ones are checked
        known = isinstance(error, TribunalError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        return Outcome(frozen.study, error=one_line(" ".join(said.split())))
    return Outcome(frozen.study, drift, rows, news=before is None or before.key != drift.key)


def check_winner(frozen: Frozen, occasion: str | None, now: Environment) -> Ref:
    """Ask for every artifact of one comparison, in order."""
    store = current().store
    config = config_of(frozen)
    test, selection = frozen.test, store.manifest("selections", frozen.selection)
    prompts = todays_prompts(config, frozen, selection)
    require_hub(config.model.id, config.model.revision)
    measured_as = store.manifest("models", input_of(test, "materials.model").key)
    model = probe_model(
        spec=config.model,
        harmful=input_of(measured_as, "harmful"),
        harmless=input_of(measured_as, "harmless"),
    )
    causes = causes_of(
        test=test,
        selection=selection,
        model=model,
        prompts=prompts,
        then=environment_of(selection, test),
        now=now,
        labeller=config.judging.labeller,
    )
    causes += [f"on demand: {occasion}"] if occasion else []
    test_now, selection_now = test.ref, selection.ref
    if causes:
        test_now, selection_now = _measure(frozen, config, selection, model, prompts, now, occasion)
        causes += device_causes(test, store.manifest(test_now.kind, test_now.key))
    return record_drift(
        winner=frozen.winner.ref,
        protocol=frozen.protocol,
        test_before=test.ref,
        test_after=test_now,
        selection_before=selection.ref,
        selection_after=selection_now,
        causes=causes,
    )


def _measure(
    frozen: Frozen,
    config: Config,
    selection: Manifest,
    model: Ref,
    prompts: Mapping[str, Mapping[str, Ref]],
    now: Environment,
    occasion: str | None,
) -> tuple[Ref, Ref]:
    """The winner on the test split and the candidates on the selection split, as of today."""
    materials = {"model": model, "directions": input_of(frozen.test, "materials.directions")}
    test_now = retest_winner(
        config=config,
        winner=frozen.winner.ref,
        protocol=frozen.protocol,
        materials=materials,
        prompts=prompts["test"],
        environment=now,
        occasion=occasion,
    )
    selection_now = rejudge_candidates(
        config=config,
        selection=selection.ref,
        protocol=frozen.protocol,
        materials=materials,
        prompts=prompts["selection"],
        environment=now,
        occasion=occasion,
    )
    return test_now, selection_now


def config_of(frozen: Frozen) -> Config:
    """The config of a study.

    Raises:
        ConfigError: this version does not understand it.
    """
    (text,) = current().store.read(frozen.named, ["config"])["config"]
    return validate_stored(json.loads(text), frozen.study)


def todays_prompts(
    config: Config, frozen: Frozen, selection: Manifest
) -> dict[str, dict[str, Ref]]:
    """The test and selection prompts as their sources give them today, by split and class.

    A study's config is that of the first run of its protocol. Another run may have frozen the
    winner, for other prompts: then prompts are taken as they are stored, so that no split is opened
    that this winner was never tested on.
    """
    stored = {"test": prompts_of(frozen.test), "selection": prompts_of(selection)}
    if not (frozen.only and _names_sources_of(config, stored)):
        return stored
    loaded = {
        f"{prompt_class}/{split}": load_prompts(
            prompt_class=prompt_class,
            split=split,
            source=newest(source, _resolved(stored[split][prompt_class])),
        )
        for prompt_class, split, source in sources(config)
        if split in SPLITS
    }
    return {split: split_of(loaded, split) for split in SPLITS}


def _names_sources_of(config: Config, stored: Mapping[str, Mapping[str, Ref]]) -> bool:
    """Whether the config names the sources of exactly these prompt sets."""
    store = current().store
    named = {(split, name): source for name, split, source in sources(config) if split in SPLITS}
    held = {(split, name): ref for split, sets in stored.items() for name, ref in sets.items()}
    return named.keys() == held.keys() and all(
        is_source_of(named[place], store.manifest(ref.kind, ref.key)) for place, ref in held.items()
    )


def _resolved(prompts: Ref) -> str:
    """What the source of a stored prompt set was resolved to."""
    return str(current().store.manifest(prompts.kind, prompts.key).notes["resolved"])
