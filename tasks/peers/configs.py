"""A config.toml of HERETIC or ICONOCLAST as a config here that runs the same protocol.

Defaults are written out, since a tool's default is part of its protocol. What cannot be mapped is
said with the reason; what only decides how the tool runs has no meaning here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from artifacts.errors import PeerError
from tasks.numerics.labels import DISCLAIMER_MARKERS, HERETIC_MARKERS, ICONOCLAST_MARKERS
from tasks.peers.found import HERETIC, ICONOCLAST, ONLY_ICONOCLAST

Tree = dict[str, Any]
PRESETS = {HERETIC: "heretic-1.4.0", ICONOCLAST: "iconoclast"}
LABELLER = {HERETIC: "heretic-33", ICONOCLAST: "iconoclast-32"}
MARKERS = {"heretic-33": HERETIC_MARKERS, "iconoclast-32": ICONOCLAST_MARKERS}
SEEDS = {HERETIC: 0, ICONOCLAST: 42}
SYSTEM_PROMPT = "You are a helpful assistant."  # both tools' default
DTYPES = ("auto", "float16", "bfloat16", "float32")  # likewise
CLASSES = {"harmful": "bad", "harmless": "good"}
DEFAULT_PROMPTS = {
    "bad_prompts": {"dataset": "mlabonne/harmful_behaviors", "split": "train[:400]"},
    "good_prompts": {"dataset": "mlabonne/harmless_alpaca", "split": "train[:400]"},
    "bad_evaluation_prompts": {"dataset": "mlabonne/harmful_behaviors", "split": "test[:100]"},
    "good_evaluation_prompts": {"dataset": "mlabonne/harmless_alpaca", "split": "test[:100]"},
}
PENALTIES = {  # of ICONOCLAST, by its defaults, in the order of search.objective_weights
    "overrefusal_penalty": 0.25,
    "harmful_marker_penalty": 0.05,
    "compliance_gap_penalty": 0.35,
}
RUNNING = "how the tool runs; here TRIBUNAL_DEVICE, _DEVICE_MAP and _ROWS"
SHOWING = "what the tool prints or plots"
AFTERWARDS = "what the tool does after its search; here tribunal export"
MEANINGLESS = {
    **dict.fromkeys(
        (
            *("batch_size", "max_batch_size", "device_map", "max_memory"),
            *("offload_outputs_to_cpu", "reload_local_datasets"),
        ),
        RUNNING,
    ),
    **dict.fromkeys(
        (
            *("print_responses", "print_residual_geometry", "plot_residuals"),
            *("residual_plot_path", "residual_plot_title", "residual_plot_style", "benchmarks"),
        ),
        SHOWING,
    ),
    **dict.fromkeys(("export_strategy", "max_shard_size", "exit_after_optimization"), AFTERWARDS),
    "study_checkpoint_dir": "where the tool keeps its study; here TRIBUNAL_STORE",
    "full_normalization_lora_rank": "the edit of row_normalization 'full' is exact here",
    **dict.fromkeys(
        (
            *("merged_validation_subset_size", "merged_consistency_penalty"),
            *("merged_validation_refusal_tolerance", "merged_validation_overrefusal_tolerance"),
            *("merged_validation_disclaimer_tolerance", "merged_validation_compliance_tolerance"),
        ),
        "belongs to merged_validation_interval",
    ),
}
ONLY_DEFAULTS: dict[str, tuple[Any, str]] = {  # keys that can be mapped at one value alone
    "kl_divergence_scale": (1.0, "the objective here has no scale of KL; the tool's is 1"),
    "low_refusal_rate_threshold": (0.15, "the objective here switches at 0.15"),
    "objective_regime": ("auto", "the objective here chooses its regime itself"),
    "direction_variance_floor": (1e-6, "the variance direction here has the floor 1e-6"),
    "disclaimer_markers": (list(DISCLAIMER_MARKERS), "the objective here has a fixed list"),
    "merged_validation_interval": (0, "edits are exact here, merged or not"),
    "warm_start_trials": ([], "a search here takes no trials of another's choice"),
    "harmful_evaluation_axes": ([], "there is one set of harmful prompts per split"),
    "evaluate_model": (None, "a finished model is no search"),
    "chain_of_thought_skips": (None, "reasoning openers here are those of the tool's defaults"),
    "scorers": (None, "judging here is refusals, overrefusals and first-token KL"),
    "constraints": (None, "gates here are those of [gates]"),
}
_SPLIT = re.compile(r"(?P<name>\w[\w.-]*)?(?:\[(-?\d+%?)?:(-?\d+%?)?(?::(\d+))?\])?")


@dataclass
class Mapped:
    """A config here, and what became of each key of the tool's."""

    tool: str
    tree: Tree
    unmapped: dict[str, str] = field(default_factory=dict)  # key: why
    meaningless: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def tool_of(settings: Mapping[str, Any], name: str) -> str:
    """Which tool a config is for: ICONOCLAST where a key or the file's name says so."""
    if settings.keys() & set(ONLY_ICONOCLAST) or ICONOCLAST in name.lower():
        return ICONOCLAST
    return HERETIC


def map_config(
    settings: Mapping[str, Any],
    name: str,
    held_out: Mapping[str, Mapping[str, Any]],
    *,
    move: bool,
    place: Callable[[str], str],
) -> Mapped:
    """The config here of a tool's settings.

    Args:
        settings: the tree of its config.toml.
        name: of the file.
        held_out: selection and test sources by class, since the tools have none.
        move: whether held-out slices may be moved behind rows that the tool uses.
        place: a path of the tool's as the new config has to say it; other names as they are.

    Raises:
        PeerError: there is no model, or held-out rows are rows that the tool uses.
    """
    model = settings.get("model")
    if not isinstance(model, str) or not model:
        raise PeerError(f"'{name}' names no model; it is no config of HERETIC or ICONOCLAST")
    tool = tool_of(settings, name)
    mapped = Mapped(tool, _plain(settings, tool, place(model)))
    mapped.tree["prompts"] = _prompts(settings, held_out, move, place, mapped)
    mapped.tree["name"] = _slug(model)
    _labeller(settings, tool, mapped)
    _account(settings, tool, mapped)
    return mapped


def _plain(settings: Mapping[str, Any], tool: str, model: str) -> Tree:
    """Everything but prompts: one value, one place."""
    of = settings.get
    spec: Tree = {"id": model, "dtype": list(of("dtypes", DTYPES))}
    spec["system_prompt"] = of("system_prompt", SYSTEM_PROMPT)
    spec["quantization"] = str(of("quantization", "none")).replace("_", "-")
    optional = {"revision": "model_commit", "response_prefix": "response_prefix"}
    spec |= {ours: of(theirs) for ours, theirs in optional.items() if of(theirs) is not None}
    if of("trust_remote_code"):
        spec["trust_remote_code"] = True
    search: Tree = {
        "preset": "heretic-main" if "scorers" in settings else PRESETS[tool],
        "trials": of("n_trials", 200),
        "startup": of("n_startup_trials", 60),
        "target_kl": of("kl_divergence_target", 0.01),
    }
    directions: Tree = {
        "winsorization": of("winsorization_quantile", 1.0),
        "orthogonalize": of("orthogonalize_direction", tool == HERETIC),
    }
    if tool == ICONOCLAST:
        directions["benign_subspace_rank"] = of("benign_subspace_rank", 0)
        search["objective_weights"] = [of(key, value) for key, value in PENALTIES.items()]
        if of("component_specific_directions"):
            search["space"] = {"per_component_direction": True}
    return {
        "name": "",
        "seed": SEEDS[tool] if of("seed") is None else of("seed"),
        "model": spec,
        "search": search,
        "directions": directions,
        "edit": {
            "row_normalization": of("row_normalization", "full" if tool == HERETIC else "none")
        },
        "judging": {
            "labeller": LABELLER[tool],
            "max_new_tokens": of("max_response_length", 100),
        },
    }


def _prompts(
    settings: Mapping[str, Any],
    held_out: Mapping[str, Mapping[str, Any]],
    move: bool,
    place: Callable[[str], str],
    mapped: Mapped,
) -> Tree:
    """The four splits of both classes."""
    found: Tree = {}
    for ours, theirs in CLASSES.items():
        uses = {"direction": f"{theirs}_prompts", "search": f"{theirs}_evaluation_prompts"}
        own = {split: _source(settings, key, place, mapped) for split, key in uses.items()}
        others = {split: dict(held_out[ours][split]) for split in ("selection", "test")}
        _keep_apart(ours, own, others, move, mapped)
        found[ours] = own | others
    return found


def _source(
    settings: Mapping[str, Any], key: str, place: Callable[[str], str], mapped: Mapped
) -> Tree:
    """A prompt source. The tools put a space between a prompt and its prefix or suffix."""
    told = settings.get(key)
    default = DEFAULT_PROMPTS[key] | {"column": "text"}
    of: Mapping[str, Any] = told if isinstance(told, Mapping) else default
    source: Tree = {"source": place(str(of.get("dataset", default["dataset"])))}
    split = of.get("split")
    if split is not None:
        source["split"] = f"train{split}" if str(split).startswith("[") else str(split)
    for ours, theirs in (("revision", "commit"), ("config", "name"), ("column", "column")):
        if of.get(theirs) is not None:
            source[ours] = of[theirs]
    if source["source"].endswith(".txt"):
        source.pop("column", None)  # the tools ignore it too
    if of.get("prefix"):
        source["prefix"] = f"{of['prefix']} "
    if of.get("suffix"):
        source["suffix"] = f" {of['suffix']}"
    if of.get("system_prompt") is not None:
        source["system_prompt"] = of["system_prompt"]
    known = {"dataset", "split", "commit", "name", "column", "prefix", "suffix", "system_prompt"}
    for name in of.keys() - known:
        mapped.meaningless[f"{key}.{name}"] = SHOWING
    return source


def _keep_apart(
    group: str, own: Mapping[str, Tree], others: Mapping[str, Tree], move: bool, mapped: Mapped
) -> None:
    """See that no held-out row is one that the tool uses.

    Raises:
        PeerError: it is, and must not or cannot be moved.
    """
    for split, source in others.items():
        for used in own.values():
            if _table(source) != _table(used) or not _meet(_rows(source), _rows(used)):
                continue
            there, taken = _rows(source), _rows(used)
            if not move or there is None or taken is None:
                raise PeerError(
                    f"the {split} split of {group} prompts would hold rows of '{used['source']}' "
                    "that the tool uses; name a config whose selection and test splits hold "
                    "others: --held-out CONFIG"
                )
            _move(others, _table(source), taken.stop)
            mapped.notes.append(
                f"{group}: selection and test moved behind row {taken.stop} of "
                f"'{used['source']}', whose first rows the tool uses"
            )


def _move(others: Mapping[str, Tree], table: tuple[str, ...], first: int) -> None:
    """Put the slices of a table one after the other, from row `first`."""
    for source in others.values():
        rows = _rows(source)
        if _table(source) == table and rows is not None:
            name = source["split"].partition("[")[0]
            size = (rows.stop - rows.start) // rows.step
            source["split"] = f"{name}[{first}:{first + size}]"
            first += size


def _table(source: Mapping[str, Any]) -> tuple[str, ...]:
    """What rows are counted in: a file, or a split of a data set. Revisions may share rows."""
    name, split = str(source["source"]), str(source.get("split", "train"))
    local = re.search(r"\.(txt|csv|jsonl|parquet)$", name)
    return (name,) if local else (name, str(source.get("config")), split.partition("[")[0])


def _rows(source: Mapping[str, Any]) -> range | None:
    """The rows of a slice that says both ends; None for all rows, or where it does not."""
    match = _SPLIT.fullmatch(str(source.get("split", "train")))
    start, stop, step = (match[2], match[3], match[4]) if match else (None, None, None)
    if stop is None or not stop.isdigit() or not (start or "0").isdigit():
        return None
    return range(int(start or 0), int(stop), int(step or 1))


def _meet(one: range | None, other: range | None) -> bool:
    """Whether two slices of a table share a row; all rows share some with any."""
    if one is None or other is None:
        return True
    return not set(one).isdisjoint(other)


def _labeller(settings: Mapping[str, Any], tool: str, mapped: Mapped) -> None:
    """The labeller with the same markers, if there is one."""
    markers = settings.get("refusal_markers")
    if markers is None:
        return
    wanted = {str(marker).lower() for marker in markers}
    for name, known in MARKERS.items():
        if wanted == set(known):
            mapped.tree["judging"]["labeller"] = name
            return
    mapped.unmapped["refusal_markers"] = (
        f"its {len(wanted)} markers are those of no labeller here; {LABELLER[tool]} is used"
    )


def _account(settings: Mapping[str, Any], tool: str, mapped: Mapped) -> None:
    """Say of every other key what became of it."""
    taken = {
        *("model", "model_commit", "dtypes", "system_prompt", "quantization", "response_prefix"),
        *("trust_remote_code", "n_trials", "n_startup_trials", "kl_divergence_target", "seed"),
        *("winsorization_quantile", "orthogonalize_direction", "row_normalization"),
        *("max_response_length", "refusal_markers", *DEFAULT_PROMPTS),
        *(("benign_subspace_rank", "component_specific_directions") if tool == ICONOCLAST else ()),
        *(PENALTIES if tool == ICONOCLAST else ()),
    }
    for key, value in settings.items():
        if key in taken:
            continue
        if key in MEANINGLESS:
            mapped.meaningless[key] = MEANINGLESS[key]
        elif key in ONLY_DEFAULTS:
            default, why = ONLY_DEFAULTS[key]
            if value != default:
                mapped.unmapped[key] = why
        else:
            mapped.unmapped[key] = "no key of HERETIC 1.4.0 or ICONOCLAST that is known here"
    if settings.get("component_specific_directions"):
        mapped.unmapped["component_specific_directions"] = (
            "in part: each component has its scope, method and blend, but direction_index is shared"
        )
    if tool == HERETIC and settings.get("seed") is None:
        mapped.notes.append("seed: the tool draws one at random; 0 is written")
    mapped.notes.append(
        "direction and search splits are the tool's two uses of prompts; it has no selection and "
        "no test split, so those hold other prompts, which its search never sees"
    )


def _slug(model: str) -> str:
    """A config's name from a model's."""
    name = re.sub(r"[^a-z0-9.-]+", "-", model.rstrip("/").rpartition("/")[2].lower())
    return name.strip("-.")[:64] or "imported"
