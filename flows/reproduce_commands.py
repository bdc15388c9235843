"""`tribunal reproduce` rebuilds an edit from elsewhere, or a trial here, and measures it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from artifacts.errors import ConfigError
from flows import display
from flows.options import PairOption, SetOption, TableOrJson, open_store
from flows.peer_commands import share
from flows.settings import load_config

if TYPE_CHECKING:
    from rich.console import Console

    from artifacts.store import Ref, Store
    from flows.reproducing import Wanted
    from tasks.peers.recipes import Recipe

Row = Mapping[str, Any]
POINTS = 16
SHOWN = 5  # points of a search

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="printed list of parameters ('-': standard input), a file as for import, or "
        "a trial as in show",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="CONFIG",
        help="config whose model and prompts are used; a trial here has its own",
    ),
]
TrialOption = Annotated[
    int | None,
    typer.Option("--trial", min=0, help="of a file, as its tool numbers it; default: the best"),
]
SearchOption = Annotated[
    bool, typer.Option("--search-missing", help="look for what the source leaves out")
]
PointsOption = Annotated[
    int | None,
    typer.Option("--trials", min=1, max=1024, help=f"of that search; default: {POINTS}"),
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Examples: tribunal reproduce organism/17; tribunal reproduce reproduce.json "
        "--model mine.toml; tribunal reproduce card.txt --model mine.toml --search-missing"
    )(reproduce)


def reproduce(
    source: SourceArgument,
    model: ModelOption = None,
    trial: TrialOption = None,
    search_missing: SearchOption = False,
    trials: PointsOption = None,
    overrides: SetOption = None,
    form: PairOption = TableOrJson.table,
) -> None:
    """Rebuild an edit, judge it on a config's search prompts, and print it beside its source.

    What the source leaves out is named, and searched if asked; the test split stays shut.
    """
    from flows.reproducing import refuse_missing

    if trials and not search_missing:
        raise ConfigError(f"--trials '{trials}' is for --search-missing, which is not given")
    if overrides and model is None:
        raise ConfigError("--set changes the config of --model, which is not given")
    store = open_store()
    what = _wanted(store, source, model, trial, overrides or ())
    if not search_missing:
        refuse_missing(what)
    points = (trials or POINTS) if what.missing else 1
    made = _measure(store, what, points)
    if form is TableOrJson.json:
        typer.echo(json.dumps(display.plain(_as_data(store, what, made)), indent=1))
    else:
        _print(display.console(), store, what, made)


def _wanted(
    store: Store, source: str, model: str | None, trial: int | None, overrides: Sequence[str]
) -> Wanted:
    """The edit of the source, and the config to put it on."""
    from flows.reproducing import STDIN, own_recipe, recipe_of, wanted

    config = load_config(model, overrides) if model else None
    text = sys.stdin.read() if source == STDIN else None
    recipe = recipe_of(store, source, trial, text)
    if recipe is None:
        return wanted(*own_recipe(store, source, config))
    if config is None:
        raise ConfigError(
            f"'{recipe.source}' says nothing of prompts: name a config with --model CONFIG, "
            "whose model and prompts are used"
        )
    return wanted(recipe, config, None)


def _measure(store: Store, what: Wanted, points: int) -> Ref:
    """Make what is missing, in this process, with progress."""
    from artifacts.catalog import write_database
    from flows.logs import with_log
    from flows.progress import Progressing
    from flows.reproducing import rebuild, work_of
    from flows.settings import Settings

    settings = Settings.from_environment()
    bar = Progressing(display.console(stderr=True), work_of(what, points, store))
    with bar, settings.running(store, with_log(settings.log, store, bar)):
        made = rebuild(what, points, store)
    write_database(store)
    return made


def _as_data(store: Store, what: Wanted, made: Ref) -> dict[str, Any]:
    from flows.reproducing import measured, same_to_the_bit

    rows = [_with_intervals(row) for row in measured(store, made)]
    recipe = what.recipe
    answer: dict[str, Any] = {
        "source": recipe.source,
        "tool": recipe.tool,
        "trial": recipe.trial,
        "numbers": {**recipe.numbers, **_source_intervals(recipe.numbers)},
        "left_out": list(what.missing),
        "assumed": list(recipe.assumed),
        "differences": list(what.differences),
        "measured": [{k: v for k, v in row.items() if k != "responses"} for row in rows],
        "compared": _compared(recipe, rows[0]),
        "artifact": made.key,
    }
    if what.stored is not None:
        same, of = same_to_the_bit(rows[0], what.stored.row)
        answer["same_to_the_bit"] = {"answers": same, "of": of}
    return answer


def _with_intervals(row: Row) -> dict[str, Any]:
    """A measured point with 95 % intervals."""
    from tasks.numerics.intervals import bootstrap_mean, clopper_pearson

    kls = [r["kl"] for r in row["responses"] if r["kl"] is not None]
    finite = bool(kls) and all(map(math.isfinite, kls))
    return {
        **row,
        "refusals_interval": clopper_pearson(row["refusals"], row["n_harmful"]),
        "overrefusals_interval": clopper_pearson(
            row["overrefusals"], row["n_harmless"] + row["n_borderline"]
        ),
        "kl_interval": bootstrap_mean(kls) if finite else (math.nan, math.nan),
    }


def _source_intervals(numbers: Row) -> dict[str, Any]:
    """95 % intervals of the source's rates; None where it does not tell both counts."""
    from tasks.numerics.intervals import clopper_pearson

    found: dict[str, Any] = {}
    for name, of in (("refusals", "n_harmful"), ("overrefusals", "n_harmless")):
        k, n = numbers.get(name), numbers.get(of)
        found[f"{name}_interval"] = None
        if k is not None and n is not None and k <= n:
            found[f"{name}_interval"] = clopper_pearson(k, n)
    return found


def _compared(recipe: Recipe, row: Row) -> dict[str, Any]:
    """Fisher's exact test of both rates; whether the source's KL lies in the interval here."""
    import numpy as np
    from scipy.stats import fisher_exact

    numbers = recipe.numbers
    here = {
        "refusals": (row["refusals"], row["n_harmful"]),
        "overrefusals": _overrefusals(row, recipe),
    }
    found: dict[str, Any] = {}
    for name, of in (("refusals", "n_harmful"), ("overrefusals", "n_harmless")):
        k, n = numbers.get(name), numbers.get(of)
        found[f"{name}_p"] = None
        if k is not None and n is not None and k <= n:
            (mine, size) = here[name]
            table = np.array([[k, n - k], [mine, size - mine]])
            found[f"{name}_p"] = float(fisher_exact(table).pvalue)
    kl, (low, high) = numbers.get("kl"), row["kl_interval"]
    known = kl is not None and not math.isnan(low)
    found["kl_within"] = (low <= kl <= high) if known else None
    return found


def _print(out: Console, store: Store, what: Wanted, made: Ref) -> None:
    from flows.reproducing import beyond, measured

    recipe = what.recipe
    rows = [_with_intervals(row) for row in measured(store, made)]
    best = rows[0]
    where = f"{what.config.model.id}, search split"
    number = "" if recipe.trial is None or what.stored else f", trial {recipe.trial}"
    display.heading(out, f"{recipe.source}{number}, rebuilt on {where}")
    for line in (*recipe.assumed, *what.differences, *beyond(recipe, _layers(store, made))):
        out.print(Text(f"  note: {line}"))
    if what.missing:
        names = ", ".join(what.missing)
        out.print(Text(f"  the source leaves out {names}: searched, {len(rows)} points"))
    _print_parameters(out, best, what.missing)
    display.heading(out, "The source's own numbers, and those measured here")
    display.print_rows(
        out,
        ("", "refusals", "overrefusals", "KL, nats"),
        [_source_cells(recipe.numbers), ["here", *_cells(best, recipe)]],
    )
    out.print(Text("in brackets: 95 % intervals, of rates Clopper-Pearson, of KL bootstrap", "dim"))
    for line in _verdicts(_compared(recipe, best)):
        out.print(Text(f"  {line}"))
    if best["gated"]:
        out.print(Text(f"  gated here: {best['gate_reason']}"))
    _print_bits(out, what, best)
    if len(rows) > 1:
        display.heading(out, f"The search of what is left out, best {min(SHOWN, len(rows))}")
        columns = (*what.missing, "refusals", "overrefusals", "KL, nats")
        display.print_rows(
            out,
            columns,
            [
                [*(_plain(row[m]) for m in what.missing), *_counts(row, recipe)]
                for row in rows[:SHOWN]
            ],
        )
    out.print(Text("  tribunal sql 'SELECT * FROM reproductions'   all of it", style="dim"))


def _layers(store: Store, made: Ref) -> int:
    """Layers of the model that a reproduction was measured on."""
    entry = store.manifest(made.kind, made.key).inputs["materials.model"]
    model = store.manifest(entry["kind"], entry["key"]).ref
    return int(store.read(model, ["n_layers"])["n_layers"][0])


def _print_parameters(out: Console, row: Row, missing: Sequence[str]) -> None:
    """The direction on one line, then a line per component."""
    from artifacts.specs import COMPONENTS

    index = row["direction_index"]
    per_layer = row["direction_scope"] == "per layer"
    which = "" if per_layer or index is None else f", index {index:.4g}"
    star = " (searched)" if {"direction_index", "direction_scope"} & set(missing) else ""
    out.print(
        Text(f"  direction: {row['direction_scope']}, {row['direction_method']}{which}{star}")
    )
    out.print(Text(f"  edit: row normalization {row['row_normalization']}, frame {row['frame']}"))
    for component in COMPONENTS:
        weight, position, edge, distance = (
            row[f"{component}_{name}"]
            for name in ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
        )
        out.print(
            Text(
                f"  {component.replace('_', '.', 1)}: {weight:.4g} at layer {position:.4g}, "
                f"{weight * edge:.4g} at distance {distance:.4g}"
            )
        )


def _source_cells(numbers: Row) -> list[str]:
    told = _source_intervals(numbers)
    return [
        "source",
        share(numbers.get("refusals"), numbers.get("n_harmful"))
        + _percent(told["refusals_interval"]),
        share(numbers.get("overrefusals"), numbers.get("n_harmless"))
        + _percent(told["overrefusals_interval"]),
        display.number(numbers.get("kl")),
    ]


def _overrefusals(row: Row, recipe: Recipe) -> tuple[int, int]:
    """Overrefusals here among the prompts that the source counts too.

    A trial here counts harmless and borderline prompts; the other tools have harmless ones alone.
    """
    if recipe.tool == "tribunal":
        return row["overrefusals"], row["n_harmless"] + row["n_borderline"]
    return row["overrefusals_harmless"], row["n_harmless"]


def _cells(row: Row, recipe: Recipe) -> list[str]:
    """The three numbers with intervals."""
    from tasks.numerics.intervals import clopper_pearson

    counts = (row["refusals"], row["n_harmful"]), _overrefusals(row, recipe)
    rates = [share(*pair) + _percent(clopper_pearson(*pair)) for pair in counts]
    low, high = row["kl_interval"]
    bounds = "" if math.isnan(low) else f" ({display.number(low)}-{display.number(high)})"
    return [*rates, display.number(row["kl"]) + bounds]


def _counts(row: Row, recipe: Recipe) -> list[str]:
    """The three numbers alone."""
    over = share(*_overrefusals(row, recipe))
    return [share(row["refusals"], row["n_harmful"]), over, display.number(row["kl"])]


def _percent(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f} %)"


def _verdicts(compared: Row) -> list[str]:
    """What the tests say, in words; nothing where the source tells no number."""
    found = []
    for name in ("refusals", "overrefusals"):
        p = compared[f"{name}_p"]
        if p is not None:
            word = "differ" if p < 0.05 else "show no difference"
            found.append(f"{name} {word} (Fisher's exact test, p = {p:.3g})")
    if compared["kl_within"] is not None:
        inside = "inside" if compared["kl_within"] else "outside"
        found.append(f"the source's KL lies {inside} the interval here")
    return found


def _print_bits(out: Console, what: Wanted, row: Row) -> None:
    """For a trial on its own model: whether it came out the same."""
    from flows.reproducing import same_to_the_bit

    if what.stored is None:
        return
    same, of = same_to_the_bit(row, what.stored.row)
    word = "the same to the bit" if same == of else f"NOT all the same: {of - same} differ"
    out.print(Text(f"  {of} stored answers and their KL: {word}"))


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
