"""What a study cost: trials, tokens and seconds, from the artifacts' manifests and responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from artifacts.store import Ref, Store

NEW = ["class", "prompt_id", "response"]  # what tells a response from another


def budget_of(
    store: Store, own: Mapping[str, Sequence[Ref]], shared: Sequence[Ref], baseline: Ref
) -> dict[str, Any]:
    """The cost of one member of a study plan.

    Args:
        store: where all of it lies.
        own: artifacts of judged trials that this member alone needed, by what they were for:
            search (of a trial that is in two, the last one counts), selection, test.
        shared: what every arm of its model needs: prompts, activations, directions, baseline.
        baseline: of these, the unedited model's answers.

    Returns:
        trials: judged in the search; stopped: of them, by the race.
        tokens_judged: of all responses that were labelled.
        tokens_generated: of those, in responses that neither the unedited model nor an earlier
            trial had given to the prompt: a known one is verified in one pass, not decoded.
        seconds: that making the member's own artifacts took, whenever they were made; with several
            workers of the time that passed, not the sum over devices.
        seconds_shared: the same of what is shared.
        devices: where the trials were judged.
    """
    tables = [store.read(ref, ["trial", "stopped", "responses"]) for ref in own["search"]]
    trials = pl.concat(tables).unique("trial", keep="last", maintain_order=True)
    said, known = _said(trials), store.read(baseline, NEW)
    elsewhere = [
        _said(store.read(ref, ["responses"]))
        for name, refs in own.items()
        if name != "search"
        for ref in refs
    ]
    first = said.unique(NEW).join(known, on=NEW, how="anti")
    new = [first, *(table.unique(NEW) for table in elsewhere)]
    manifests = [store.manifest(ref.kind, ref.key) for refs in own.values() for ref in refs]
    return {
        "trials": trials.height,
        "stopped": trials.filter(pl.col("stopped").fill_null(False)).height,
        "tokens_judged": sum(int(table["n_tokens"].sum()) for table in (said, *elsewhere)),
        "tokens_generated": sum(int(table["n_tokens"].sum()) for table in new),
        "seconds": seconds_of(manifest.provenance for manifest in manifests),
        "seconds_shared": seconds_of(store.manifest(r.kind, r.key).provenance for r in shared),
        "devices": sorted({str(m.provenance.get("device", "unknown")) for m in manifests}),
    }


def seconds_of(provenances: Iterable[Mapping[str, Any]]) -> float:
    """Seconds that artifacts took, as their manifests tell."""
    return round(sum(float(told.get("seconds", 0.0)) for told in provenances), 3)


def _said(table: pl.DataFrame) -> pl.DataFrame:
    """Every response of a table of judged trials: class, prompt_id, response, n_tokens."""
    answers = table.select(pl.col("responses").explode()).drop_nulls().unnest("responses")
    return answers.select(*NEW, "n_tokens")
