"""Hidden-state norms by state and token position: measured once per prompt, then averaged.

The classes are "benign", "jailbreak" and, where a config has one, "control": benign requests in the
jailbreaks' own templates, so that what a wrapper does to norms is told from what harm does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from artifacts.figure_schemas import NORMS_MAPS, NORMS_PROMPTS, NORMS_STATES
from artifacts.schemas import polars_schema
from artifacts.specs import ModelSpec
from artifacts.store import Ref
from tasks.numerics.norm_maps import CellMeans, cell_means, match_lengths, state_differences
from tasks.probe import encode_prompts, open_model, read_card
from tasks.stage import Made, current, stage

Floats = NDArray[np.float64]
Row = dict[str, Any]
ALL, MATCHED, TEMPLATES = "all", "length matched", "templates"


@stage(
    "norms_prompts",
    version=1,
    ignore=("spec",),  # where the model lies
    label=lambda name, **_: f"norms of {name} prompts",
    work=lambda **_: 1,
)
def measure_norms(*, name: str, spec: ModelSpec, model: Ref, prompts: Ref, tokens: int) -> Made:
    """Log norms of every prompt of a class at every state and its first `tokens` positions.

    Raises:
        ModelError: a state is not finite.
    """
    from tasks.models.position_states import log_norms

    runtime, card = current(), read_card(model)
    loaded, table = open_model(spec, [card.dtype]), runtime.store.read(prompts)
    encoded = encode_prompts(loaded, card, table)
    width = min(tokens, max(map(len, encoded)))
    found = log_norms(
        loaded,
        encoded,
        rows=runtime.rows,
        positions=width,
        on_progress=runtime.reporter.advanced,
    )
    rows = [
        {
            "class": name,
            "prompt_id": prompt_id,
            "n_tokens": len(prompt),
            "state": state,
            "log_norms": [None if np.isnan(v) else v for v in values[: len(prompt)].tolist()],
        }
        for prompt_id, prompt, of_prompt in zip(table["prompt_id"], encoded, found, strict=True)
        for state, values in enumerate(of_prompt)
    ]
    frame = pl.DataFrame(rows, schema=polars_schema(NORMS_PROMPTS))
    zeros = int(frame["log_norms"].list.eval(pl.element().is_null().sum()).list.first().sum())
    return Made(frame, {"zero_states": zeros, "longest": max(map(len, encoded))})


@stage("norms_maps", version=1, label=lambda **_: "maps of norms")
def map_norms(
    *, measured: Mapping[str, Ref], tokens: int, least: int, length_bin: int, seed: int
) -> Made:
    """The map of every class and the difference of jailbreak and benign, twice.

    Once of all prompts, once of as many jailbreaks as benign prompts of every length.
    """
    classes = {name: read_norms(ref, tokens) for name, ref in measured.items()}
    rows: list[Row] = []
    for variant, chosen in _variants(classes, length_bin, seed).items():
        maps = {name: cell_means(values) for name, values in chosen.items()}
        for panel, cells in [*maps.items(), *_difference(maps)]:
            rows += _cells(variant, panel, cells, least)
    return Made(pl.DataFrame(rows, schema=polars_schema(NORMS_MAPS)))


@stage("norms_states", version=1, label=lambda **_: "differences of norms by state")
def compare_states(
    *, measured: Mapping[str, Ref], tokens: int, least: int, length_bin: int, seed: int
) -> Made:
    """Jailbreak minus benign by state, over shown positions from 1 on, with intervals.

    Of all prompts, of equally long ones, and of jailbreaks against the control.
    """
    classes = {name: read_norms(ref, tokens) for name, ref in measured.items()}
    pairs = {
        variant: (chosen["jailbreak"][0], chosen["benign"][0])
        for variant, chosen in _variants(classes, length_bin, seed, lengths=True).items()
        if {"jailbreak", "benign"} <= chosen.keys()
    }
    if "control" in classes:
        pairs[TEMPLATES] = (classes["jailbreak"][0], classes["control"][0])
    rows: list[Row] = []
    for comparison, (jailbreak, other) in pairs.items():
        rows += _state_rows(comparison, jailbreak, other, least, seed)
    return Made(pl.DataFrame(rows, schema=polars_schema(NORMS_STATES)))


def read_norms(measured: Ref, tokens: int) -> tuple[Floats, list[int]]:
    """Log norms [prompts, states, positions], NaN where there is none, and lengths in tokens."""
    frame = current().store.read(measured, ["prompt_id", "n_tokens", "state", "log_norms"])
    n_states = frame["state"].n_unique()
    width = min(tokens, int(frame["n_tokens"].max()))  # type: ignore[arg-type]
    flat = np.full((frame.height, width), np.nan)
    for row, values in zip(flat, frame["log_norms"].to_list(), strict=True):
        row[: len(values)] = np.array(values[:width], dtype=np.float64)
    lengths: list[int] = frame["n_tokens"].to_list()[::n_states]
    return flat.reshape(-1, n_states, width), lengths


def _variants(
    classes: Mapping[str, tuple[Floats, list[int]]],
    length_bin: int,
    seed: int,
    lengths: bool = False,
) -> dict[str, dict[str, Any]]:
    """Log norms by class, of equal width, of all prompts and of equally long ones."""
    width = max(values.shape[-1] for values, _ in classes.values())
    wide = {
        name: np.pad(
            values, ((0, 0), (0, 0), (0, width - values.shape[-1])), constant_values=np.nan
        )
        for name, (values, _) in classes.items()
    }
    jailbreak, benign = match_lengths(
        classes["jailbreak"][1], classes["benign"][1], length_bin, seed
    )
    found: dict[str, dict[str, Any]] = {ALL: dict(wide)}
    if jailbreak:
        found[MATCHED] = {
            "benign": wide["benign"][benign],
            "jailbreak": wide["jailbreak"][jailbreak],
        }
    if lengths:
        return {k: {n: (v,) for n, v in chosen.items()} for k, chosen in found.items()}
    return found


def _difference(maps: Mapping[str, CellMeans]) -> Iterator[tuple[str, CellMeans]]:
    jailbreak, benign = maps["jailbreak"], maps["benign"]
    yield (
        "difference",
        CellMeans(
            jailbreak.mean - benign.mean,
            np.hypot(jailbreak.error, benign.error),
            np.minimum(jailbreak.count, benign.count),
        ),
    )


def _cells(variant: str, panel: str, cells: CellMeans, least: int) -> Iterator[Row]:
    """A row per cell that a prompt reaches."""
    for state, position in np.argwhere(cells.count > 0):
        at = (state, position)
        error, n = float(cells.error[at]), int(cells.count[at])
        yield {
            "variant": variant,
            "panel": panel,
            "state": int(state),
            "position": int(position),
            "value": float(cells.mean[at]),
            "error": None if np.isnan(error) else error,
            "n": n,
            "shown": n >= least,
        }


def _state_rows(
    comparison: str, jailbreak: Floats, other: Floats, least: int, seed: int
) -> Iterator[Row]:
    width = max(jailbreak.shape[-1], other.shape[-1])
    pair = [
        np.pad(v, ((0, 0), (0, 0), (0, width - v.shape[-1])), constant_values=np.nan)
        for v in (jailbreak, other)
    ]
    counts = [(~np.isnan(values)).sum(axis=0) for values in pair]
    shown = np.minimum(*counts) >= least
    shown[:, 0] = False
    columns = zip(*state_differences(pair[0], pair[1], shown, seed=seed), strict=True)
    for state, (difference, low, high) in enumerate(columns):
        yield {
            "comparison": comparison,
            "state": state,
            "difference": _number(difference),
            "low": _number(low),
            "high": _number(high),
            "positions": int(shown[state].sum()),
            "n_jailbreak": len(jailbreak),
            "n_other": len(other),
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
