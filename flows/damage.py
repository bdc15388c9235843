"""What the damage commands ask for: which trials, and what their artifacts say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from artifacts.store import Ref, Store
from flows import results
from flows.settings import validate_stored

if TYPE_CHECKING:
    from tasks.stored_trials import StoredTrial

Row = dict[str, Any]


def trials_to_measure(store: Store, text: str | None, study: str | None) -> list[StoredTrial]:
    """The trial that a user names; with none named, a study's winner and the other candidates.

    Raises:
        ConfigError: no such study or trial, or no winner yet.
    """
    from tasks.stored_trials import stored_trial

    if text is not None:
        name, number = results.find_trial(store, text, study)
        results.trial_rows(store, name, number)  # which says what the study has instead
        return [stored_trial(store, name, number, validate_stored)]
    name, winner = results.find_trial(store, results.WINNER, study)
    selected = [
        int(row["trial"]) for row in results.ranking(store, name, "selection", None).records()
    ]
    numbers = list(dict.fromkeys([winner, *selected]))
    return [stored_trial(store, name, number, validate_stored) for number in numbers]


def summary(store: Store, made: Ref, frozen: int | None) -> Row:
    """A trial's KL along responses, over its prompts; nats."""
    from tasks.numerics.intervals import bootstrap_mean

    frame = store.read(made)
    means = frame["kl_mean"].to_numpy()
    finite = bool(np.isfinite(means).all())
    return {
        "trial": frame["trial"][0],
        "frozen": frame["trial"][0] == frozen,
        "prompts": frame.height,
        "tokens": frame["n_tokens"].sum(),
        "kl_first": _mean(frame["kl_first"]),
        "kl_mean": _mean(frame["kl_mean"]),
        "kl_mean_interval": bootstrap_mean(means) if finite else (math.nan, math.nan),
        "kl_sum": _mean(frame["kl_sum"]),
        "kl_max": float(frame["kl_max"].to_numpy().max()),
        "changed": frame["changed"].sum(),
        "curve": _mean_curve(frame["curve"].to_list()),
        "artifact": made.key,
    }


def _mean(values: Any) -> float:
    return math.fsum(values) / len(values)


def _mean_curve(curves: list[list[float]]) -> list[float]:
    """Per bin of tokens, the mean over the responses that reach it."""
    longest = max(map(len, curves))
    reached = ([c[b] for c in curves if len(c) > b] for b in range(longest))
    return [_mean(values) for values in reached]


def compare_capabilities(store: Store, base: Ref, edited: Ref) -> list[Row]:
    """Task by task the unedited model's metric, the trial's, and the difference."""
    before = {_name(row): row for row in store.read(base).to_dicts()}
    return [
        _compared(before[_name(after)], after)
        for after in store.read(edited).to_dicts()
        if _name(after) in before
    ]


def _name(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["task"], row["metric"], row["filter"]


def _compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> Row:
    low, high = _interval(before["scores"], after["scores"])
    return {
        "task": after["task"],
        "metric": after["metric"],
        "filter": after["filter"],
        "n": after["n"],
        "unedited": before["value"],
        "unedited_stderr": before["stderr"],
        "edited": after["value"],
        "edited_stderr": after["stderr"],
        "difference": after["value"] - before["value"],
        "low": low,
        "high": high,
    }


LEAST = 10  # documents; fewer would give a bootstrap of no meaning


def _interval(
    before: list[float] | None, after: list[float] | None
) -> tuple[float | None, float | None]:
    """95 % interval of the mean difference over the same documents; None where there is none."""
    from tasks.numerics.differences import match, mean_difference, rate_difference

    if not before or not after or len(before) != len(after) or len(before) < LEAST:
        return None, None
    samples = match(dict(enumerate(before)), dict(enumerate(after)))
    if not np.isfinite([*before, *after]).all():
        return None, None
    counts = set(before) | set(after) <= {0.0, 1.0}
    return rate_difference(samples) if counts else mean_difference(samples)
