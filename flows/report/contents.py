"""What a report says, as data: each table is made by running the SQL that is shown beside it.

Intervals are added to what SQL counted: Clopper-Pearson's of rates, a bootstrap's of mean KL, by
the code that `tribunal show` uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from artifacts.catalog import catalog, fetch
from artifacts.store import Store
from flows import results
from flows.display import CONTROLS
from flows.report import sheets
from flows.report.queries import Asked
from flows.report.sheets import Cell, Heading, Line, Sheet

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]
MOST_TRIALS = 2000  # rows of a ranking, and points of a plot; the SQL beside it has no such end
MOST_KERNELS = 12
SPLITS = ("search", "selection", "test")
Advance = Callable[[int, int], None]


@dataclass
class Contents:
    """All that a page shows of one study.

    Attributes:
        study: its row, config as a tree.
        winner: number of the frozen trial; None: none is.
        rankings: rows of each split with intervals, in the strict order.
        kernels, directions, pairs, answers, budget, comparisons: rows of the queries of the same
            names.
        n_layers: None where no model is stored (an imported study).
        opened: protocols of this store that opened the test prompts.
    """

    study: Row
    winner: int | None
    rankings: dict[str, list[Row]]
    kernels: list[Row]
    directions: list[Row]
    pairs: list[Row]
    answers: list[Row]
    model: Row
    budget: list[Row]
    comparisons: list[Row]
    n_layers: int | None
    opened: int
    sheets: dict[str, Sheet] = field(default_factory=dict)
    sql: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.study["study"])

    @property
    def tested(self) -> dict[str, Row]:
        """The test split's rows by arm."""
        return {row["arm"]: row for row in self.rankings["test"]}

    @property
    def focus(self) -> Row | None:
        """The row that the summary is about: the frozen trial's on test, else the first in rank."""
        arm = self.study["arm"]
        if self.winner is not None and arm in self.tested:
            return self.tested[arm]
        return next((row for row in self.rankings["search"] if row["rank"] is not None), None)


def collect(store: Store, name: str | None, responses: int, advance: Advance) -> Contents:
    """Ask for everything of a study, found by `name` as `results.find_study` does.

    `responses`: how many of each class; `advance`: progress.
    """
    with catalog(store) as connection:
        study = results.study_named(connection, store, name)
        winner = _frozen(connection, study)
        steps = len(SPLITS) + 10
        asked: dict[str, Asked] = {}

        def ask(label: str, name: str, **values: str | int | None) -> list[Row]:
            asked[label] = Asked(connection, name, study=study, **values)
            advance(len(asked), steps)
            return asked[label].records

        found = ask("study", "study")[0]
        rankings = {
            split: [
                results.with_intervals({**row, "split": split, "kls": row["kls"] or []})
                for row in ask(split, "ranking", split=split, limit=MOST_TRIALS)
            ]
            for split in SPLITS
        }
        focus, split = winner, "test" if winner is not None and rankings["test"] else "search"
        if focus is None:
            focus = next((r["trial"] for r in rankings["search"] if r["rank"] is not None), None)
        model = ask("model", "model")
        contents = Contents(
            study=found | {"config": json.loads(found["config"] or "{}")},
            winner=winner,
            rankings=rankings,
            kernels=ask("kernels", "kernels", winner=winner, limit=MOST_KERNELS),
            directions=ask("directions", "directions"),
            pairs=ask("responses", "responses", split=split, trial=focus, limit=responses),
            answers=ask("answers", "answers", winner=winner),
            model=model[0] if model else {},
            budget=ask("budget", "budget"),
            comparisons=ask("comparisons", "comparisons"),
            n_layers=model[0]["n_layers"] if model else None,
            opened=_opened(connection, study),
        )
        prompts, versions = ask("prompts", "prompts"), ask("versions", "versions")
        artifacts = ask("lineage", "lineage")
    contents.sql = {label: one.sql for label, one in asked.items()}
    made = [
        *(ranking_sheet(contents, split) for split in SPLITS),
        kernel_sheet(contents),
        direction_sheet(contents),
        budget_sheet(contents),
        model_sheet(contents, model),
        prompt_sheet(contents, prompts),
        version_sheet(contents.sql, versions),
        artifact_sheet(contents.sql, artifacts),
    ]
    contents.sheets = {sheet.name: sheet for sheet in made}
    return contents


def _frozen(connection: duckdb.DuckDBPyConnection, study: str) -> int | None:
    """The trial that was frozen last, if one is."""
    rows = fetch(connection, results.FROZEN, [study]).rows
    return int(rows[0][0]) if rows else None


def _opened(connection: duckdb.DuckDBPyConnection, study: str) -> int:
    """Protocols that opened the test prompts of a study."""
    sql = "SELECT count(DISTINCT protocol) FROM winners WHERE prompts IN "
    sql += "(SELECT prompts FROM winners WHERE study = ?)"
    return int(fetch(connection, sql, [study]).rows[0][0])


def is_open(row: Mapping[str, Any]) -> bool:
    """Whether not all harmful prompts of a stopped trial were answered."""
    return bool(row["stopped"]) and row["answered_harmful"] != row["n_harmful"]


def state_of(row: Mapping[str, Any]) -> str:
    """Passed, gated or stopped; in this order of what matters."""
    if row["stopped"]:
        return "stopped"
    return "gated" if row["gated"] or row["gated"] is None else "passed"


def n_other(row: Mapping[str, Any]) -> int:
    """Harmless and borderline prompts."""
    return int(row["n_harmless"] or 0) + int(row["n_borderline"] or 0)


TITLES = {
    "search": "Search: every trial",
    "selection": "Selection: the best of the search on new prompts",
    "test": "Test: the frozen trial, beside the models it is held against",
}


def ranking_sheet(contents: Contents, split: str) -> Sheet:
    """The strict ranking of a split."""
    rows = contents.rankings[split]
    arms = len({row["arm"] for row in rows}) > 1
    headings = [
        Heading("rank"),
        Heading("trial"),
        *([Heading("model", words=True)] if arms else []),
        Heading("refusals", hint="refused harmful prompts"),
        Heading("overrefusals", hint="refused harmless and borderline-safe prompts"),
        Heading("KL, nats", hint="mean first-token KL(unedited || edited), harmless prompts"),
        Heading("gates", words=True),
        Heading("marks", words=True),
    ]
    remarks = []
    if len(rows) == MOST_TRIALS:
        remarks.append(f"The first {MOST_TRIALS} rows are shown; the SQL has them all.")
    if any(row["stopped"] for row in rows):
        remarks.append(
            "Stopped: the race left the trial's other prompts unanswered, since nothing could hang "
            "on them. It has no rank. ≥ is a lower bound, and has no interval."
        )
    lines = [_ranking_line(contents, row, arms) for row in rows]
    return Sheet(split, TITLES[split], headings, lines, contents.sql[split], remarks)


def _ranking_line(contents: Contents, row: Row, arms: bool) -> Line:
    state, own = state_of(row), row["arm"] not in CONTROLS
    frozen = own and row["trial"] is not None and row["trial"] == contents.winner
    gate = row["gate_reason"] or ("gated" if state == "gated" else state)
    marks = [name for name, on in (("frozen", frozen), ("front", row["pareto"] and own)) if on]
    cells = [
        sheets.count(row["rank"]),
        sheets.count(row["trial"]),
        *([sheets.words(row["arm"])] if arms else []),
        sheets.rate(row["refusals"], row["n_harmful"], row["refusals_interval"], is_open(row)),
        sheets.rate(
            row["overrefusals"], n_other(row), row["overrefusals_interval"], bool(row["stopped"])
        ),
        sheets.mean(row["kl"], row["kl_interval"]),
        sheets.words(gate),
        Cell(", ".join(marks)),
    ]
    return Line(cells, " ".join([state, *marks]))


PARTS = ("attn_o_proj", "mlp_down_proj")


def component(name: str) -> str:
    """A component as models name it: attn.o_proj."""
    return name.replace("_", ".", 1)


def kernel_sheet(contents: Contents) -> Sheet:
    """Parameters of the frozen trial and the front."""
    headings = [Heading("trial"), Heading("direction", words=True), Heading("index")]
    for part in PARTS:
        for what in ("peak", "at layer", "edge", "reach"):
            short, hint = part.split("_")[0], f"{component(part)}: {HINTS[what]}"
            headings.append(Heading(f"{short} {what}", hint=hint))
    lines = []
    for row in contents.kernels:
        cells = [
            sheets.count(row["trial"]),
            sheets.words(_direction(row)),
            sheets.amount(row["direction_index"], ".2f"),
        ]
        for part in PARTS:
            peak, edge = row[f"{part}_max_weight"], row[f"{part}_min_weight"]
            at, reach = row[f"{part}_max_weight_position"], row[f"{part}_min_weight_distance"]
            least = None if peak is None or edge is None else peak * edge
            cells += [sheets.amount(peak, ".3f"), sheets.amount(at, ".2f")]
            cells += [sheets.amount(least, ".3f"), sheets.amount(reach, ".2f")]
        lines.append(Line(cells, "frozen" if row["frozen"] else ""))
    remarks = (f"The first {MOST_KERNELS} are shown.",) if len(lines) == MOST_KERNELS else ()
    title = "Parameters of the frozen trial and the Pareto front"
    return Sheet("kernels", title, headings, lines, contents.sql["kernels"], remarks)


HINTS = {
    "peak": "largest weight of the edit; 1 removes the direction",
    "at layer": "layer of the peak",
    "edge": "weight at the reach",
    "reach": "layers from the peak; beyond it nothing is edited",
}


def _direction(row: Row) -> str:
    scope, method, blend = (row[f"direction_{name}"] for name in ("scope", "method", "blend"))
    mixed = f" {blend:.2f}" if method == "hybrid" and blend is not None else ""
    return ", ".join(text for text in (scope, f"{method}{mixed}" if method else None) if text)


def direction_sheet(contents: Contents) -> Sheet:
    """Separation statistics of every state."""
    names = ("cosine", "silhouette", "harmful_norm", "harmless_norm", "difference_norm")
    headings = [Heading("state", hint="0: embeddings; s: output of layer s-1")]
    headings += [Heading(name.replace("_", " ")) for name in names]
    lines = [
        Line([sheets.count(row["state"]), *(sheets.amount(row[name], ".4g") for name in names)])
        for row in contents.directions
    ]
    title = "Separation by residual state"
    return Sheet("directions", title, headings, lines, contents.sql["directions"])


def budget_sheet(contents: Contents) -> Sheet:
    """Trials, tokens and seconds by kind of artifact, with a sum."""
    numbers = ("artifacts", "trials", "responses", "tokens")
    headings = [
        Heading("kind", words=True),
        *(Heading(name) for name in numbers),
        Heading("seconds"),
        Heading("size"),
    ]

    def cells(name: str, row: Row) -> list[Cell]:
        counts = [sheets.count(row[n]) for n in numbers]
        last = [sheets.amount(row["seconds"], ".1f"), sheets.size(row["bytes"])]
        return [sheets.words(name), *counts, *last]

    rows = contents.budget
    lines = [Line(cells(row["kind"], row)) for row in rows]
    if rows:
        sums = {n: sum(row[n] or 0 for row in rows) for n in (*numbers, "seconds", "bytes")}
        lines.append(Line(cells("all", sums), "sum"))
    remarks = (
        "Seconds are those of the process that made an artifact; what studies share is counted "
        "here in full, though it was made once. A response that the finals or a later split took "
        "from the search is stored, and counted, in each of them.",
    )
    return Sheet(
        "budget", "Cost by kind of artifact", headings, lines, contents.sql["budget"], remarks
    )


def model_sheet(contents: Contents, rows: Sequence[Row]) -> Sheet:
    """The probed model."""
    names = ("architecture", "dtype", "quantization", "n_layers", "hidden_size", "vocabulary")
    headings = [
        Heading(n.removeprefix("n_").replace("_", " "), words=i < 3) for i, n in enumerate(names)
    ]
    headings.append(Heading("identity", words=True))
    lines = [
        Line(
            [
                *(sheets.words(row[name]) for name in names[:3]),
                *(sheets.count(row[name]) for name in names[3:]),
                sheets.words(row["identity"]),
            ]
        )
        for row in rows
    ]
    return Sheet("model", "Model", headings, lines, contents.sql["model"])


def prompt_sheet(contents: Contents, rows: Sequence[Row]) -> Sheet:
    """The prompt sets."""
    headings = [Heading("class", words=True), Heading("split", words=True), Heading("prompts")]
    headings.append(Heading("artifact", words=True))
    lines = [
        Line(
            [
                sheets.words(row["class"]),
                sheets.words(row["split"]),
                sheets.count(row["prompts"]),
                sheets.words(row["key"]),
            ]
        )
        for row in rows
    ]
    return Sheet("prompts", "Prompt sets", headings, lines, contents.sql["prompts"])


def version_sheet(sql: Mapping[str, str], rows: Sequence[Row]) -> Sheet:
    """Versions and devices."""
    names = ("tribunal", "python", "torch", "transformers", "device")
    headings = [*(Heading(name, words=True) for name in names), Heading("artifacts")]
    headings += [Heading("first, UTC", words=True), Heading("last, UTC", words=True)]
    lines = [
        Line(
            [
                *(sheets.words(row[name]) for name in names),
                sheets.count(row["artifacts"]),
                sheets.words(row["first"]),
                sheets.words(row["last"]),
            ]
        )
        for row in rows
    ]
    return Sheet("versions", "Versions and devices", headings, lines, sql["versions"])


def artifact_sheet(sql: Mapping[str, str], rows: Sequence[Row]) -> Sheet:
    """Every artifact with its digest."""
    headings = [
        Heading("kind", words=True),
        Heading("key", words=True),
        Heading("SHA-256 of the data", words=True),
        Heading("seconds"),
        Heading("made, UTC", words=True),
    ]
    lines = [
        Line(
            [
                sheets.words(row["kind"]),
                sheets.words(row["key"]),
                sheets.words(row["sha256"]),
                sheets.amount(row["seconds"], ".3f"),
                sheets.words(row["created"]),
            ]
        )
        for row in rows
    ]
    return Sheet("lineage", "Artifacts and digests", headings, lines, sql["lineage"])


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
