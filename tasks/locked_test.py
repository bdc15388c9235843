"""The test split: opened by this task only, for one frozen trial per study, beside its controls."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from artifacts.errors import TestSplitSpent
from artifacts.specs import COMPONENTS, Config
from artifacts.store import Ref, Store
from tasks.judging import trial_edit
from tasks.selection import frozen_trial
from tasks.stage import Made, current, stage
from tasks.trials import Court, Trial, open_court, to_frame

if TYPE_CHECKING:
    from tasks.models.editing import Edit

OPENINGS = ("tests", "retests")  # kinds of artifact that a test split is opened for
OVER_EDIT = 3.0  # times the winner's weights, on every layer


@stage(
    "tests",
    version=1,
    identify={"config": lambda config: {"controls": list(config.selection.controls)}},
    label=lambda **_: "test",
    work=lambda config, **_: 2 + len(config.selection.controls),
)
def measure_test(
    *,
    config: Config,
    winner: Ref,
    protocol: Ref,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> Made:
    """The frozen trial, the unedited model and the controls on the test split.

    Raises:
        TestSplitSpent: the study's test split was opened for another trial.
    """
    trial = frozen_trial(winner)
    refuse_other_trials(current().store, protocol.key, prompts, trial.number)
    court, base = open_court("test", config, protocol, materials, prompts)
    edits = {trial.arm: court.edit_of(trial.parameters)} | {
        name: _control(name, court, trial, config.seed) for name in config.selection.controls
    }
    unedited = court.row(Trial("unedited", None, {}), base.rows)
    judged = court.judge([replace(trial, arm=arm) for arm in edits], edits=list(edits.values()))
    return Made(to_frame([judged[0], unedited, *judged[1:]]), {"trial": trial.number})


def refuse_other_trials(
    store: Store, protocol: str, prompts: Mapping[str, Ref], number: int | None
) -> None:
    """Hold a trial against the study's test artifacts.

    Raises:
        TestSplitSpent: one of them, on the same prompts, is of another trial.
    """
    wanted = {ref.digest for ref in prompts.values()}
    for manifest in (m for kind in OPENINGS for m in store.manifests(kind)):
        if manifest.inputs["protocol"]["key"] != protocol:
            continue
        opened = {e["digest"] for role, e in manifest.inputs.items() if role.startswith("prompts.")}
        if opened & wanted and manifest.notes["trial"] != number:
            raise TestSplitSpent(
                f"the test split of this study was opened for trial {manifest.notes['trial']} on "
                f"{manifest.provenance['created']}, so it cannot judge trial '{number}'; only new "
                "test prompts in the config can"
            )


def _control(name: str, court: Court, trial: Trial, seed: int) -> Edit:
    """The edit of a control, made from the winner's."""
    if name == "random-direction":
        vectors = _random_directions(court, seed)
        return trial_edit(court.bench, vectors, trial.parameters, court.edit)
    factor = OVER_EDIT if name == "over-edit" else 0.0
    return court.edit_of(_scaled(trial.parameters, factor))


def _scaled(parameters: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The same parameters with weights times `factor`, and the same weight on every layer."""
    changed = dict(parameters)
    for component in COMPONENTS:
        changed[f"{component}_max_weight"] = factor * parameters[f"{component}_max_weight"]
        changed[f"{component}_min_weight"] = 1.0
        changed[f"{component}_min_weight_distance"] = 1e9
    return changed


def _random_directions(court: Court, seed: int) -> dict[str, Any]:
    """A random unit direction per layer, the same for every component."""
    import torch

    anatomy = court.bench.loaded.anatomy
    text = f"random-direction/{seed}".encode()
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    )
    shape = (len(anatomy.layers), anatomy.hidden_size)
    vectors = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
    return dict.fromkeys(COMPONENTS, vectors)
