"""What became of a frozen winner: its numbers then and now, why they differ, and what follows.

Comparisons of one winner form a chain, so the last one always says what holds now, whatever the
clock says and however often things change back and forth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import polars as pl

from artifacts.catalog import rank_frame
from artifacts.schemas import DRIFT, polars_schema
from artifacts.store import Manifest, Ref
from tasks.numerics.differences import Samples, match, mean_difference, rate_difference
from tasks.numerics.labels import is_refusal
from tasks.remeasure import LABELLERS, Environment, input_of, prompts_of, ref_of
from tasks.selection import frozen_trial
from tasks.stage import Made, current, stage
from tasks.trials import Trial

Row = dict[str, Any]
Pair = tuple[pl.DataFrame, pl.DataFrame]  # before and after

VERDICTS = ("unchanged", "within noise", "drifted", "lost its place", "gated")  # from good to bad
UNCHANGED, NOISE, DRIFTED, LOST, GATED = VERDICTS
HELD = (UNCHANGED, NOISE, DRIFTED)

# Of every metric: the classes of the prompts it is a mean over, and its value of a response.
JUDGED_ON: dict[str, tuple[tuple[str, ...], Callable[[Row], float]]] = {
    "refusals": (("harmful",), lambda r: r["refused"]),
    "overrefusals": (("harmless", "borderline"), lambda r: r["refused"]),
    "kl": (("harmless",), lambda r: r["kl"]),
    "degenerate": (("harmful", "harmless", "borderline"), lambda r: r["degenerate"] is not None),
    "mean_tokens": (("harmless",), lambda r: r["n_tokens"]),
}
UNTOLD = ("", "default")  # devices
MEANS = ("kl", "mean_tokens")  # the others are rates
# Another build of a library rounds differently, on all prompts alike, so an interval alone would
# call 1e-7 nats a drift. Four decimals are what rankings show.
RESOLUTION = {"kl": 1e-4}
# A mean needs as many prompts: six that all move alike, one way, are chance in 1 of 32 cases (both
# ways counted), five in 1 of 16; and a bootstrap of one prompt has no width at all.
FEWEST = 6


@stage("drift", version=2, label=lambda **_: "drift of the winner")
def compare_winner(
    *,
    winner: Ref,
    protocol: Ref,
    test_before: Ref,
    test_after: Ref,
    selection_before: Ref,
    selection_after: Ref,
    causes: Sequence[str],
    previous: Ref | None,
) -> Made:
    """The frozen trial and the unedited model, metric by metric, then and now.

    Where nothing had changed, `test_after` is `test_before`: there is no second measurement, so
    differences are 0 and have no interval.
    """
    store, trial = current().store, frozen_trial(winner)
    tests = store.read(test_before), store.read(test_after)
    selections = store.read(selection_before), store.read(selection_after)
    measured = test_after != test_before
    number = store.manifest(previous.kind, previous.key).notes["number"] + 1 if previous else 0
    rows = [
        {"arm": arm, "trial": trial.number if arm == trial.arm else None, **row}
        for arm in (trial.arm, "unedited")
        for row in differences(_responses(tests[0], arm), _responses(tests[1], arm), measured)
        if (arm, row["metric"]) != ("unedited", "kl")  # 0 by definition
    ]
    shared = {
        "protocol": protocol.key,
        "number": number,
        "measured": measured,
        "cause": "; ".join(causes) or None,
        **standing(trial, tests, selections, [r["change"] for r in rows if r["arm"] == trial.arm]),
    }
    frame = pl.DataFrame([shared | row for row in rows], schema=polars_schema(DRIFT))
    return Made(frame, {"number": number, "verdict": shared["verdict"]})


def standing(trial: Trial, tests: Pair, selections: Pair, changes: Sequence[str]) -> dict[str, Any]:
    """A winner's places and gates, then and now, and the verdict on it.

    Args:
        trial: the winner.
        tests, selections: judged trials of the two splits, before and after.
        changes: what became of each of its metrics.
    """
    places = [place_of(trial, selections[0]), place_now(trial, *selections)]
    gates = [gates_of(trial, *judged) for judged in zip(tests, selections, strict=True)]
    return {
        "place_before": places[0],
        "place_after": places[1],
        "candidates": selections[1].height,
        "gated_before": gates[0] is not None,
        "gated_after": gates[1] is not None,
        "gate_reason": gates[1],
        "verdict": verdict_of(changes, places, [gate is not None for gate in gates]),
    }


def differences(
    before: Sequence[Row], after: Sequence[Row], measured: bool
) -> list[dict[str, Any]]:
    """Every metric of an arm's responses, then and now, with the interval of its difference."""
    return [_difference(metric, before, after, measured) for metric in JUDGED_ON]


def _difference(metric: str, before: Sequence[Row], after: Sequence[Row], measured: bool) -> Row:
    samples = match(*(_values(metric, responses) for responses in (before, after)))
    first, second = samples.means
    finite = math.isfinite(first) and math.isfinite(second)
    enough = metric not in MEANS or min(samples.n_before, samples.n_after) >= FEWEST
    low, high = _interval(metric, samples) if measured and finite and enough else (None, None)
    return {
        "metric": metric,
        "before": first,
        "after": second,
        "difference": second - first if finite else None,
        "low": low,
        "high": high,
        "n_before": samples.n_before,
        "n_after": samples.n_after,
        "n_paired": samples.before.size,
        "change": change_of(metric, samples, low, high),
    }


def _values(metric: str, responses: Sequence[Row]) -> dict[Hashable, float]:
    """A metric's value of every response it is a mean over, by class and prompt."""
    classes, value = JUDGED_ON[metric]
    return {
        (r["class"], r["prompt_id"]): float(value(r)) for r in responses if r["class"] in classes
    }


def _interval(metric: str, samples: Samples) -> tuple[float, float]:
    return mean_difference(samples) if metric in MEANS else rate_difference(samples)


def change_of(metric: str, samples: Samples, low: float | None, high: float | None) -> str:
    """Whether a metric is unchanged (to the bit), changed within noise, or drifted."""
    first, second = samples.means
    if samples.same:
        return UNCHANGED
    if not (math.isfinite(first) and math.isfinite(second)):
        return DRIFTED
    if low is None or high is None:
        return NOISE  # too few prompts to tell
    beyond = (low > 0 or high < 0) and abs(second - first) > RESOLUTION.get(metric, 0.0)
    return DRIFTED if beyond else NOISE


def verdict_of(changes: Sequence[str], places: Sequence[int], gated: Sequence[bool]) -> str:
    """The worst of what happened to a winner.

    Args:
        changes: of each of its metrics.
        places: among the candidates, before and after.
        gated: before and after.
    """
    if gated[1] and not gated[0]:
        return GATED
    if places[1] > places[0]:
        return LOST
    return max(changes, key=VERDICTS.index)


def place_of(trial: Trial, selection: pl.DataFrame) -> int:
    """A trial's place among the candidates in the strict order, gates included, from 1."""
    ranked = rank_frame(selection.drop("responses"))
    return int(ranked.filter(arm=trial.arm, trial=trial.number)["rank"][0])


def place_now(trial: Trial, before: pl.DataFrame, after: pl.DataFrame) -> int:
    """A trial's place among the same candidates measured again, from 1.

    Places follow the strict order, but candidates that only KL tells apart, by no more than its
    resolution, stay in the order they were in: rounding costs nobody a place.
    """
    then, now = (rank_frame(judged.drop("responses")).to_dicts() for judged in (before, after))
    own = (trial.arm, trial.number)
    ahead_then, ahead_now = (_ahead_of(own, ranked) for ranked in (then, now))
    (winner,) = [row for row in now if (row["arm"], row["trial"]) == own]
    near = {(row["arm"], row["trial"]) for row in now if _near(row, winner)}
    return 1 + len((ahead_now - near) | (ahead_then & near))


def _ahead_of(own: tuple[str, int | None], ranked: Sequence[Row]) -> set[tuple[str, int | None]]:
    """The trials, by arm and number, before one of a ranking."""
    trials = [(row["arm"], row["trial"]) for row in ranked]
    return set(trials[: trials.index(own)])


def _near(one: Row, other: Row) -> bool:
    """Whether only KL tells two judged trials apart, and by no more than its resolution."""
    same = all(one[name] == other[name] for name in ("gated", "refusals", "overrefusals"))
    values = one["kl"], other["kl"]
    return same and None not in values and abs(values[0] - values[1]) <= RESOLUTION["kl"]


def gates_of(trial: Trial, test: pl.DataFrame, selection: pl.DataFrame) -> str | None:
    """Which gate a trial fails on the test split, or else on the selection split."""
    for split, judged in (("test", test), ("selection", selection)):
        (reason,) = judged.filter(arm=trial.arm, trial=trial.number)["gate_reason"]
        if reason is not None:
            return f"{split}: {reason}"
    return None


def _responses(judged: pl.DataFrame, arm: str) -> list[Row]:
    (responses,) = judged.filter(arm=arm)["responses"].to_list()
    found: list[Row] = responses
    return found


def causes_of(
    test: Manifest,
    selection: Manifest,
    model: Ref,
    prompts: Mapping[str, Mapping[str, Ref]],
    then: Environment,
    now: Environment,
    labeller: str,
) -> list[str]:
    """What differs today from when a winner was measured, each in a few words.

    Args:
        test, selection: its measurements.
        model: today's.
        prompts: today's prompt sets, by split and class.
        then, now: what of the installation is told to have made it, and is there today.
        labeller: the study's.
    """
    judged = {"test": test, "selection": selection}
    return [
        *model_causes(input_of(test, "materials.model"), model),
        *(
            line
            for split, manifest in judged.items()
            for line in prompt_causes(split, prompts_of(manifest), prompts[split])
        ),
        *labeller_causes(labeller, [manifest.ref for manifest in judged.values()]),
        *library_causes(then, now),
    ]


def model_causes(before: Ref, after: Ref) -> list[str]:
    """Which facts of the model differ."""
    if before.digest == after.digest:
        return []
    store = current().store
    old, new = (store.read(ref).row(0, named=True) for ref in (before, after))
    changed = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    return [_model_cause(name, *values) for name, values in changed.items()]


def _model_cause(name: str, old: Any, new: Any) -> str:
    if name != "identity":
        return f"model {name} {old!r} -> {new!r}"
    if old.startswith("sha256:") or new.startswith("sha256:"):
        return f"model content {_short(old)} -> {_short(new)}"
    return f"model revision {_short(old)} -> {_short(new)}"


def _short(identity: str) -> str:
    """A model's identity with its digest or commit cut to 12 digits."""
    for mark in ("sha256:", "@"):
        head, found, tail = identity.rpartition(mark)
        if found:
            return f"{head}{mark if mark == '@' else ''}{tail[:12]}"
    return identity


def prompt_causes(split: str, before: Mapping[str, Ref], after: Mapping[str, Ref]) -> list[str]:
    """How many prompts of a split are new, and how many are gone."""
    old, new = (_prompt_ids(sets) for sets in (before, after))
    told = [(len(new - old), "new"), (len(old - new), "gone")]
    counts = ", ".join(f"{count} {what}" for count, what in told if count)
    return [f"{split} prompts: {counts}"] if counts else []


def _prompt_ids(sets: Mapping[str, Ref]) -> set[tuple[str, str]]:
    store = current().store
    return {
        (name, i) for name, ref in sets.items() for i in store.read(ref, ["prompt_id"])["prompt_id"]
    }


def labeller_causes(labeller: str, judged: Sequence[Ref]) -> list[str]:
    """How many of the stored responses the labeller of today labels otherwise."""
    store = current().store
    labels = [
        (answer["refused"], is_refusal(labeller, answer["response"]))
        for ref in judged
        for answers in store.read(ref, ["responses"])["responses"].to_list()
        for answer in answers
    ]
    otherwise = sum(old != new for old, new in labels)
    return [f"labeller {labeller}: {otherwise} of {len(labels)} labels"] if otherwise else []


def library_causes(then: Environment, now: Environment) -> list[str]:
    """Which versions differ, of those that are told of both times."""
    told = [name for name in now if name in then and name != LABELLERS]
    return [f"{name} {then[name]} -> {now[name]}" for name in told if then[name] != now[name]]


def device_causes(before: Manifest, after: Manifest) -> list[str]:
    """Whether the two measurements are known to be made on different devices.

    Which of several like GPUs it was does not count. "default" names none, nor does "cuda" say
    which model it is.
    """
    old, new = (_hardware(manifest) for manifest in (before, after))
    if old[0] in UNTOLD or new[0] in UNTOLD:
        return []
    differ = old[0] != new[0] or (old[1] and new[1] and old[1] != new[1])
    return [f"device {' '.join(old).strip()} -> {' '.join(new).strip()}"] if differ else []


def _hardware(manifest: Manifest) -> tuple[str, str]:
    """Type and name of the device, as far as they are told, without its number."""
    told = re.sub(r"(?<=[a-z]):\d+", "", str(manifest.provenance.get("device") or ""))
    kind, _, name = told.partition(" ")
    return kind, name


def record_drift(**arguments: Any) -> Ref:
    """The comparison, as the newest link of its winner's chain; the last one, if it says the same.

    Args:
        arguments: those of `compare_winner`, without `previous`.
    """
    last = newest_drift(arguments["winner"])
    if last is None:
        return compare_winner(**arguments, previous=None)
    before = last.inputs.get("previous")
    known = {**arguments, "previous": ref_of(before) if before else None}
    if compare_winner.key(known) == last.key:
        return compare_winner(**known)
    return compare_winner(**arguments, previous=last.ref)


def newest_drift(winner: Ref) -> Manifest | None:
    """The last comparison of a winner, if there is one."""
    links = [
        manifest
        for manifest in current().store.manifests("drift")
        if manifest.inputs["winner"]["key"] == winner.key
    ]
    return max(links, key=lambda link: (link.notes["number"], link.key), default=None)
