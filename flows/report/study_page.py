"""The report of one study as an HTML file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from flows.report.comparisons import statistics_section
from flows.report.contents import Contents
from flows.report.html_file import drawn, fill
from flows.report.plots import Plot, all_plots
from flows.report.summary import figures, headline, unseen

SECTIONS = (
    ("leaderboard", "Leaderboard"),
    ("plane-section", "Refusals and KL"),
    ("edits", "Where it is edited"),
    ("separation-section", "Directions"),
    ("responses", "Responses"),
    ("statistics", "Statistics"),
    ("budget-section", "Budget"),
    ("provenance", "Provenance"),
)


def page(contents: Contents, advance: Callable[[int, int], None]) -> str:
    """The whole file. `advance`: progress over the plots."""
    plots = all_plots(contents)
    return render(contents, plots, drawn(plots, advance))


def render(contents: Contents, plots: Mapping[str, Plot], drawings: Mapping[str, str]) -> str:
    """The file from its parts. `drawings`: SVG by a plot's name, trusted as it is."""
    pairs, focus = _pairs(contents), contents.focus or {}
    return fill(
        "study.html.jinja",
        plots,
        drawings,
        c=contents,
        title=contents.name,
        facts=_facts(contents),
        sections=SECTIONS,
        headline=headline(contents),
        figures=figures(contents),
        unseen=unseen(contents, len(pairs)),
        statistics=statistics_section(contents),
        pairs=pairs,
        trial=focus.get("trial"),
        split=focus.get("split"),
        config=json.dumps(contents.study["config"], indent=1, ensure_ascii=False),
    )


def _facts(contents: Contents) -> list[str]:
    study, model = contents.study, contents.model
    facts = [
        study["model"],
        *(model[name] for name in ("architecture", "dtype") if model.get(name)),
        f"{contents.n_layers} layers" if contents.n_layers else None,
        f"arm {study['arm']}",
        None if study["seed"] is None else f"seed {study['seed']}",
        f"labeller {study['labeller']}",
    ]
    return [str(fact) for fact in facts if fact]


def _pairs(contents: Contents) -> list[dict[str, Any]]:
    """Responses with a verdict in words."""

    def said(refused: bool | None) -> str:
        return "not judged" if refused is None else "refused" if refused else "answered"

    def told(row: Mapping[str, Any]) -> dict[str, Any]:
        before, after = row["refused_before"], row["refused_after"]
        changed = before != after
        verdict = f"{said(before)} → {said(after)}" if changed else said(after)
        odd = f", {row['degenerate']}" if row["degenerate"] else ""
        texts = {name: row[name] or "(empty)" for name in ("before", "after")}
        prompt = row["prompt"] or f"prompt {row['prompt_id']}"
        shown = {"class": row["class"], "prompt": prompt, "changed": changed}
        return shown | {"verdict": verdict + odd} | texts

    return [told(row) for row in contents.pairs]
