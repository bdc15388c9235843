"""A trial of another tool in the columns of the store.

The tools keep what a trial is in its user attributes: `parameters` (per component, min_weight in
absolute weight), `direction_index` (null where each layer uses its own direction), `refusals`,
`kl_divergence`. ICONOCLAST adds method, blend, scope, overrefusals and its scores; HERETIC's main
branch keeps its metrics in a list, `scores`. What an attribute should be and is not is left NULL,
never guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from artifacts.schemas import COMPONENTS, PARAMETERS

Json = Mapping[str, Any]
HERETIC, ICONOCLAST = "heretic", "iconoclast"
COMPONENT_NAMES = {name.replace("_", ".", 1): name for name in COMPONENTS}  # attn.o_proj, ...
KERNEL = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
METHODS = ("mean", "median", "variance", "hybrid")
SCOPES = ("global", "per layer")
ONLY_ICONOCLAST = (  # keys of its settings that HERETIC does not know
    *("benign_subspace_rank", "overrefusal_penalty", "harmful_marker_penalty"),
    *("compliance_gap_penalty", "component_specific_directions", "objective_regime"),
    *("direction_variance_floor", "disclaimer_markers", "low_refusal_rate_threshold"),
    *("warm_start_trials", "harmful_evaluation_axes", "exit_after_optimization"),
    *("merged_validation_interval", "merged_consistency_penalty", "reload_local_datasets"),
)
LARGEST_COUNT = 2**53
_SLICE = re.compile(r"[\w.-]*\[(\d{0,18}):(\d{1,18})\]")
_COUNTED = re.compile(r"\s*(\d{1,18})\s*/\s*(\d{1,18})\b")


@dataclass(frozen=True)
class PeerTrial:
    """What a file says of one trial."""

    number: int | None
    state: str
    attributes: Json  # the tool's own
    sampled: Json = field(default_factory=dict)
    system: Json = field(default_factory=dict)
    values: Sequence[float] = ()


@dataclass(frozen=True)
class PeerStudy:
    """Trials of one study of a file; `settings` are the tool's, as far as the file has them."""

    name: str | None
    trials: Sequence[PeerTrial]
    settings: Json = field(default_factory=dict)
    attributes: Json = field(default_factory=dict)
    tool_version: str | None = None

    @property
    def tool(self) -> str | None:
        """Which tool made it; None if nothing tells."""
        attributes = {name for trial in self.trials for name in trial.attributes}
        if self.name == ICONOCLAST or self.settings.keys() & set(ONLY_ICONOCLAST):
            return ICONOCLAST
        if attributes & {"harmful_marker_hits", "harmful_compliance_score", "merge_penalty"}:
            return ICONOCLAST
        known = self.name == HERETIC or {"good_prompts", "bad_prompts"} <= self.settings.keys()
        return HERETIC if known else None

    def rows(self) -> list[dict[str, Any]]:
        """A row per trial, but for the columns that tell of the file."""
        return [self._row(trial) for trial in self.trials]

    def _row(self, trial: PeerTrial) -> dict[str, Any]:
        told = trial.attributes
        sizes = _sizes(told, self.settings)
        refusals, n_scored, base, kl = _metrics(told)
        parameters, unmapped = parameters_of(told, trial.sampled, self.tool)
        return {
            "tool": self.tool,
            "tool_version": self.tool_version,
            "study": _text(self.name),
            "model": _text(self.settings.get("model")),
            "trial": trial.number,
            "listed_as": count(told.get("index")),
            "state": trial.state,
            "n_harmful": sizes["n_harmful"] if n_scored is None else n_scored,
            "refusals": refusals,
            "base_refusals": base,
            "n_harmless": sizes["n_harmless"],
            "overrefusals": count(told.get("overrefusals")),
            "n_from": "recorded" if n_scored is not None else sizes["n_from"],
            "kl": kl,
            "disclaimer_hits": count(told.get("harmful_marker_hits")),
            "compliance": number(told.get("harmful_compliance_score")),
            "objective": as_json(list(trial.values)) if trial.values else None,
            "row_normalization": _text(self.settings.get("row_normalization")),
            **parameters,
            "unmapped": unmapped,
            "sampled": as_json(trial.sampled),
            "attributes": as_json(told),
            "system_attributes": as_json(trial.system),
            "study_attributes": as_json(self.attributes),
        }


def parameters_of(told: Json, sampled: Json, tool: str | None) -> tuple[dict[str, Any], str | None]:
    """A trial's parameters in the columns here, and what of its edit they cannot hold.

    HERETIC has one direction, the difference of means. A negative weight, which its main branch
    samples, edits nothing and is 0 here.
    """
    found: dict[str, Any] = dict.fromkeys(column.name for column in PARAMETERS)
    edits = told.get("parameters")
    if not isinstance(edits, Mapping) or not edits:
        return found, "no parameters" if edits is None else "parameters of no known form"
    faults = _direction(found, told, sampled, tool)
    for component, name in COMPONENT_NAMES.items():
        kernel = edits.get(component)
        if isinstance(kernel, Mapping):
            fraction = sampled.get(f"{component}.min_weight")
            found |= {f"{name}_{k}": v for k, v in kernel_of(kernel, fraction).items()}
        else:
            faults.append(f"no {component}")
    faults += [f"component '{other}'" for other in edits if other not in COMPONENT_NAMES]
    return found, "; ".join(faults) or None


def kernel_of(told: Json, fraction: Any = None) -> dict[str, float | None]:
    """The four numbers of a kernel, min_weight as a fraction of max_weight.

    `fraction`: as it was sampled; else it is the quotient of the two weights, whose rounding in a
    printed list may carry it past 1.
    """
    kernel = {name: number(told.get(name)) for name in KERNEL}
    peak, edge = kernel["max_weight"], kernel["min_weight"]
    sampled = number(fraction)
    if sampled is not None:
        kernel["min_weight"] = sampled
    elif peak is not None and edge is not None:
        kernel["min_weight"] = min(max(edge / peak, 0.0), 1.0) if peak > 0 else 0.0
    kernel["max_weight"] = None if peak is None else max(peak, 0.0)
    return kernel


def _direction(found: dict[str, Any], told: Json, sampled: Json, tool: str | None) -> list[str]:
    """Fill in scope, index, method and blend; what could not be."""
    if isinstance(told.get("component_direction_scopes"), Mapping):
        return _own_directions(found, told)
    index = number(told.get("direction_index"))
    scope = told.get("direction_scope", sampled.get("direction_scope"))
    if scope is None and "direction_index" in told:
        scope = "per layer" if told["direction_index"] is None else "global"
    found["direction_scope"] = scope if scope in SCOPES else None
    found["direction_index"] = None if scope == "per layer" else index
    plain = "mean" if tool == HERETIC else None
    method = told.get("direction_method", sampled.get("direction_method", plain))
    found["direction_method"] = method if method in METHODS else None
    found["direction_blend"] = number(told.get("direction_blend", sampled.get("direction_blend")))
    if method == "mean" and found["direction_blend"] is None:
        found["direction_blend"] = 0.0
    return []


def _own_directions(found: dict[str, Any], told: Json) -> list[str]:
    """Of each component its own; the first one's is the shared one here."""

    def of(what: str, component: str) -> Any:
        table = told.get(f"component_direction_{what}")
        return table.get(component) if isinstance(table, Mapping) else None

    for component, name in COMPONENT_NAMES.items():
        prefix = "direction" if name == COMPONENTS[0] else f"{name}_direction"
        scope, method = of("scopes", component), of("methods", component)
        found[f"{prefix}_scope"] = scope if scope in SCOPES else None
        found[f"{prefix}_method"] = method if method in METHODS else None
        found[f"{prefix}_blend"] = number(of("blends", component))
    indices = {number(of("indices", component)) for component in COMPONENT_NAMES} - {None}
    if len(indices) > 1:
        return [f"components with directions of layers {sorted(map(str, indices))}"]
    found["direction_index"] = indices.pop() if indices else None
    return []


def _metrics(told: Json) -> tuple[int | None, int | None, int | None, float | None]:
    """Refusals, prompts they were counted among, the unedited model's, KL."""
    refusals, n = count(told.get("refusals")), count(told.get("n_bad_prompts"))
    base, kl = count(told.get("base_refusals")), number(told.get("kl_divergence"))
    records = told.get("scores")
    for record in records if isinstance(records, Sequence) else ():
        if not isinstance(record, Mapping):
            continue
        name, score = str(record.get("name")).lower(), record.get("score")
        if not isinstance(score, Mapping):
            continue
        shown = _COUNTED.match(str(score.get("md_display")))
        if kl is None and "kl" in name:
            kl = number(score.get("value"))
        elif refusals is None and shown and ("refus" in name or "keyword" in name):
            refusals, n = int(shown[1]), int(shown[2])
            unedited = record.get("baseline")
            was = _COUNTED.match(
                str(unedited.get("md_display")) if isinstance(unedited, Mapping) else ""
            )
            base = int(was[1]) if was else base
    return refusals, n, base, kl


def _sizes(told: Json, settings: Json) -> dict[str, Any]:
    """Prompts judged by the slices that the settings ask for."""
    harmful, harmless = (
        slice_size(settings.get(f"{c}_evaluation_prompts")) for c in ("bad", "good")
    )
    known = harmful is not None or harmless is not None
    return {"n_harmful": harmful, "n_harmless": harmless, "n_from": "slice" if known else None}


def slice_size(source: Any) -> int | None:
    """Rows that a prompt source's slice asks for; None if it does not say both ends."""
    split = source.get("split") if isinstance(source, Mapping) else None
    match = _SLICE.fullmatch(split) if isinstance(split, str) else None
    return max(int(match[2]) - int(match[1] or 0), 0) if match else None


def number(value: Any) -> float | None:
    """A number (NaN and infinity are some); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < LARGEST_COUNT or isinstance(value, float) else None


def count(value: Any) -> int | None:
    """A whole number, at least zero."""
    found = number(value)
    if found is None or not 0 <= found < LARGEST_COUNT or found != int(found):
        return None
    return int(found)


def as_json(value: Any) -> str:
    """Strict JSON: what is no finite number is null."""
    return json.dumps(_strict(value), default=str)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _text(value: Any) -> str | None:
    """A text as a table can hold it, half surrogate pairs replaced; None for anything else."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
