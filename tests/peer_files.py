"""Files as HERETIC and ICONOCLAST write them, made with Optuna and the attributes they set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

KERNEL = {
    "max_weight": 1.25,
    "max_weight_position": 5.5,
    "min_weight": 0.5,
    "min_weight_distance": 3.0,
}
SETTINGS = {
    "model": "owner/model",
    "row_normalization": "full",
    "good_prompts": {"dataset": "a", "split": "train[:400]"},
    "bad_prompts": {"dataset": "b", "split": "train[:400]"},
    "good_evaluation_prompts": {"dataset": "a", "split": "test[:100]"},
    "bad_evaluation_prompts": {"dataset": "b", "split": "test[20:60]"},
}
RANGES = {
    "max_weight": FloatDistribution(-0.25, 2.0),
    "max_weight_position": FloatDistribution(0.0, 40.0),
    "min_weight": FloatDistribution(0.0, 1.0),
    "min_weight_distance": FloatDistribution(1.0, 30.0),
}


def attributes(refusals: int, kl: float, index: int = 1, **changes: Any) -> dict[str, Any]:
    """What HERETIC 1.4.0 sets on a finished trial: min_weight is a weight, not a fraction."""
    return {
        "index": index,
        "direction_index": 4.75,
        "parameters": {"attn.o_proj": dict(KERNEL), "mlp.down_proj": dict(KERNEL)},
        "kl_divergence": kl,
        "refusals": refusals,
        "base_refusals": 40,
        "n_bad_prompts": 40,
    } | changes


def iconoclast(refusals: int, overrefusals: int, kl: float, index: int = 1) -> dict[str, Any]:
    """What ICONOCLAST sets: no sizes, no unedited model; a method, a blend and its scores."""
    told = attributes(refusals, kl, index)
    del told["base_refusals"], told["n_bad_prompts"]
    return told | {
        "direction_scope": "global",
        "direction_method": "hybrid",
        "direction_blend": 0.25,
        "overrefusals": overrefusals,
        "harmful_marker_hits": 3,
        "harmful_compliance_score": 0.75,
        "objective_regime": "refusal_reduction",
        "merge_penalty": 0.0,
    }


def journal(path: Path, trials: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    """A journal with these user attributes, one finished trial each."""
    fill(JournalStorage(JournalFileBackend(str(path))), trials, **options)
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    return path


def sqlite(path: Path, trials: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    """The same as an SQLite study."""
    storage = RDBStorage(f"sqlite:///{path}")
    fill(storage, trials, **options)
    storage.engine.dispose()
    return path


def fill(
    storage: optuna.storages.BaseStorage,
    trials: Sequence[Mapping[str, Any]],
    name: str = "heretic",
    settings: Mapping[str, Any] = SETTINGS,
    states: Mapping[int, TrialState] | None = None,
) -> None:
    """A study of these trials; `states`: those that are not complete, by number."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize", "minimize"]
    )
    study.set_user_attr("settings", json.dumps(settings))
    study.set_user_attr("finished", True)
    for number, told in enumerate(trials):
        state = (states or {}).get(number, TrialState.COMPLETE)
        ended = state is TrialState.COMPLETE
        params, ranges = sampled(told)
        study.add_trial(
            create_trial(
                state=state,
                values=[0.5, 0.25] if ended else None,
                params=params,
                distributions=ranges,
                user_attrs=dict(told),
            )
        )


def sampled(told: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters as they were sampled (min_weight as a fraction), and their ranges."""
    params: dict[str, Any] = {"direction_scope": "global", "direction_index": 4.75}
    ranges: dict[str, Any] = {
        "direction_scope": CategoricalDistribution(("global", "per layer")),
        "direction_index": FloatDistribution(0.0, 40.0),
    }
    if told.get("direction_index") is None:
        params["direction_scope"] = "per layer"
    for component, kernel in told.get("parameters", {}).items():
        for key, value in kernel.items():
            fraction = value / kernel["max_weight"] if key == "min_weight" else value
            params[f"{component}.{key}"] = fraction
            ranges[f"{component}.{key}"] = RANGES[key]
    return params, ranges


def reproduce_json(**changes: Any) -> dict[str, Any]:
    """HERETIC's reproduce.json, version 2."""
    told = attributes(3, 0.0625)
    metrics = ("kl_divergence", "refusals", "base_refusals", "n_bad_prompts")
    return {
        "version": "2",
        "timestamp": "2026-01-01T00:00:00",
        "environment": {"heretic": {"version": "1.4.0", "metadata": {}}, "requirements": {}},
        "settings": SETTINGS,
        "parameters": {
            "direction_index": told["direction_index"],
            "abliteration_parameters": told["parameters"],
        },
        "metrics": {name: told[name] for name in metrics},
        "hashes": {},
    } | changes
