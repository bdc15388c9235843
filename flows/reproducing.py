"""An edit from elsewhere, or a trial here, rebuilt and measured: every artifact, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import ConfigError, PeerError
from artifacts.paths import exists
from artifacts.specs import Config
from artifacts.store import Ref, Store
from flows.pipeline import check_prompts, prepare
from flows.results import WINNER, find_trial, trial_rows
from flows.settings import validate_stored
from tasks.peers.files import read_peer_file
from tasks.peers.found import number
from tasks.peers.recipes import NUMBERS, Recipe, checked, of_row, printed, rows_of
from tasks.probe import read_card
from tasks.reproduce import judge_reproduction, points_of
from tasks.stage import planning
from tasks.stored_trials import StoredTrial, stored_trial

OURS = "tribunal"
STDIN = "-"
LARGEST = 1_000_000  # bytes of a printed list
SETTINGS = {  # of a tool: where it is in a config here
    "row_normalization": ("edit", "row_normalization"),
    "orthogonalize_direction": ("directions", "orthogonalize"),
    "winsorization_quantile": ("directions", "winsorization"),
    "benign_subspace_rank": ("directions", "benign_subspace_rank"),
    "max_response_length": ("judging", "max_new_tokens"),
    "model": ("model", "id"),
}


@dataclass(frozen=True)
class Wanted:
    """What is to be rebuilt, and on what. `stored`: a trial here, on its own model and prompts."""

    recipe: Recipe
    config: Config
    stored: StoredTrial | None
    missing: tuple[str, ...]
    differences: tuple[str, ...]


def recipe_of(store: Store, source: str, trial: int | None, text: str | None) -> Recipe | None:
    """The edit of a file or of what was read from standard input; None for a trial here.

    Args:
        store: where trials are.
        source: a path, '-', or a trial here as `tribunal show` takes it.
        trial: which trial of a file that has several; None: its best.
        text: standard input, if that is the source.

    Raises:
        PeerError: it tells no edit.
    """
    if text is not None:
        return printed(text, "standard input")
    path = Path(source)
    if exists(path) and path.is_file():
        return _from_file(path, trial)
    named = source.rpartition("/")[2]
    if named == WINNER or named.isdigit():
        return None
    raise PeerError(f"no file '{source}'; give a file, '-', STUDY/NUMBER or 'winner'")


def _from_file(path: Path, trial: int | None) -> Recipe:
    try:
        found = read_peer_file(path)
    except PeerError as refused:
        return _printed_or(path, refused)
    rows = [row for study in found.studies for row in rows_of(study, found.name)]
    settings = found.studies[0].settings
    if trial is None:
        return of_row(rows[0], settings)
    wanted = [row for row in rows if trial in (row["listed_as"], row["trial"])]
    shown = [row for row in wanted if row["listed_as"] == trial] or wanted
    if not shown:
        raise PeerError(f"no finished trial '{trial}' in '{path.name}', which has {len(rows)}")
    return of_row(shown[0], settings)


def _printed_or(path: Path, refused: PeerError) -> Recipe:
    """A text file's list of parameters; the first refusal if it is no text."""
    if path.stat().st_size > LARGEST:
        raise refused
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise refused from None
    if not text.strip() or text.lstrip().startswith("{"):
        raise refused
    return printed(text, path.name)


def own_recipe(
    store: Store, name: str, config: Config | None
) -> tuple[Recipe, Config, StoredTrial | None]:
    """A trial here, its config or the one to put it on, and itself where it is its own.

    Raises:
        ConfigError: no such study or trial.
    """
    study, chosen = find_trial(store, name)
    trial_rows(store, study, chosen)  # which says what the study has instead
    found = stored_trial(store, study, chosen, validate_stored)
    row = found.row
    whole = not row["stopped"]
    counts = {
        "refusals": row["refusals"] if whole else None,
        "n_harmful": row["n_harmful"],
        "overrefusals": row["overrefusals"] if whole else None,
        "n_harmless": row["n_harmless"] + row["n_borderline"],
        "kl": row["kl"],
    }
    recipe = Recipe(f"{study}/{chosen}", OURS, chosen, dict(found.trial.parameters), counts)
    same = config is None
    return recipe, config or found.config, found if same else None


def wanted(recipe: Recipe, config: Config, stored: StoredTrial | None) -> Wanted:
    """What a recipe needs beside what it says.

    Raises:
        PeerError: it is no edit of this family.
    """
    checked(recipe)
    return Wanted(recipe, config, stored, recipe.missing, tuple(_differences(recipe, config)))


def refuse_missing(what: Wanted) -> None:
    """Say what a source leaves out, and the two ways out.

    Raises:
        PeerError: it leaves out anything.
    """
    if what.missing:
        names = ", ".join(what.missing)
        example = f"{_shown(what.missing[0])} = ..."
        raise PeerError(
            f"'{what.recipe.source}' leaves out {names}, without which there is no edit; add to "
            f"it (a line '{example}'), or let --search-missing look for it"
        )


def _shown(name: str) -> str:
    """A parameter as a printed list names it."""
    for component in ("attn_o_proj", "mlp_down_proj"):
        if name.startswith(component):
            return f"{component.replace('_', '.', 1)}.{name.removeprefix(component + '_')}"
    return name


def _differences(recipe: Recipe, config: Config) -> list[str]:
    """Settings of the tool that the config here has otherwise."""
    found = []
    for theirs, (section, field) in SETTINGS.items():
        told, here = recipe.settings.get(theirs), getattr(getattr(config, section), field)
        if told is None or told == here or (number(told) is not None and number(told) == here):
            continue
        found.append(f"{theirs} is '{told}' in the source and '{here}' here")
    return found


def work_of(what: Wanted, points: int, store: Store) -> int:
    """What `rebuild` has to do at most, counted in judged trials."""
    if what.stored is not None:
        return points
    with planning(store) as steps:
        prepare(what.config)
    return points + sum(step.work for step in steps if not step.cached)


def rebuild(what: Wanted, points: int, store: Store) -> Ref:
    """Ask for every artifact that the measurement needs; stages have to run.

    Args:
        what: the edit and where.
        points: how many points a search of what is missing looks at.
        store: where prompts are checked to be readable before anything is made.

    Raises:
        PeerError: something missing cannot be searched.
    """
    recipe, config = what.recipe, what.config
    if what.stored is not None:
        protocol, materials = what.stored.protocol, what.stored.materials
        prompts = what.stored.prompts
        spec = what.stored.spec
        config = config.model_copy(update={"model": spec})
    else:
        check_prompts(config, store)
        made = prepare(config)
        protocol, materials, prompts = made.protocol, made.materials, made.search
    n_layers = read_card(materials["model"]).n_layers
    beyond(recipe, n_layers)
    chosen = points_of(checked(recipe), what.missing, config.search.space, n_layers, points)
    return judge_reproduction(
        source=_source(recipe),
        points=chosen,
        searched=what.missing,
        protocol=protocol,
        config=config,
        materials=materials,
        prompts=prompts,
    )


def _source(recipe: Recipe) -> dict[str, Any]:
    """What a source says of itself, as it is stored."""
    numbers = {f"source_{name}": recipe.numbers.get(name) for name in NUMBERS}
    kl = numbers["source_kl"]
    if isinstance(kl, float) and (kl != kl or kl in (float("inf"), float("-inf"))):
        numbers["source_kl"] = None
    return {
        "source": recipe.source,
        "source_tool": recipe.tool,
        "source_trial": recipe.trial,
        **numbers,
    }


def measured(store: Store, made: Ref) -> list[dict[str, Any]]:
    """The points of a reproduction, best first, responses included."""
    import polars as pl

    from artifacts.catalog import rank_frame
    from artifacts.schemas import TRIALS

    frame = store.read(made)
    columns = [column.name for column in TRIALS]
    order = rank_frame(frame.select(columns))["trial"].to_list()
    rows = {row["trial"]: row for row in frame.filter(pl.col("point").is_not_null()).to_dicts()}
    return [rows[number] for number in order]


def same_to_the_bit(row: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[int, int]:
    """How many stored answers of a trial the new measurement repeats, response and KL, and of."""
    now = {(r["class"], r["prompt_id"]): r for r in row["responses"]}
    same = [
        (then["response"], then["kl"]) == (here["response"], here["kl"])
        for then in stored["responses"]
        if (here := now.get((then["class"], then["prompt_id"]))) is not None
    ]
    return sum(same), len(stored["responses"])


def beyond(recipe: Recipe, n_layers: int) -> Sequence[str]:
    """Positions of kernels that lie beyond the model's last layer, in words.

    Raises:
        ConfigError: the direction is that of a layer which this model does not have.
    """
    found = []
    for name, value in recipe.parameters.items():
        if name.endswith("_max_weight_position") and value is not None and value > n_layers - 1:
            found.append(
                f"{_shown(name)} is {value:g}, but the last layer here is {n_layers - 1}; was it "
                "made on another model?"
            )
    index = recipe.parameters.get("direction_index")
    if index is not None and index > n_layers - 1:
        raise ConfigError(
            f"'{recipe.source}' has direction_index '{index:g}', but the last layer of this model "
            f"is {n_layers - 1}; was it made on another model?"
        )
    return found
