"""A report as one HTML file that loads nothing and trusts nothing that a model wrote.

Jinja escapes whatever it is given; data for the plots has no "<" in it; and the page's policy lets
run only the scripts whose digests it names, so that markup which slipped through would do nothing.
Characters that cannot be seen, or that turn the reading direction, are shown by name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from typing import Any

from flows.display import plain
from flows.report.comparisons import statistics_section
from flows.report.contents import Contents
from flows.report.plots import Plot, all_plots
from flows.report.summary import figures, headline, unseen

MARK = '<meta name="generator" content="tribunal report">'  # what says that a file is a report
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
# Controls but tab and line breaks; marks that turn or hide text; halves of surrogate pairs.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def page(contents: Contents, advance: Callable[[int, int], None]) -> str:
    """The whole file. `advance`: progress over the plots."""
    from flows.report.drawings import drawing

    plots = all_plots(contents)
    drawings = {}
    for done, (name, plot) in enumerate(plots.items(), 1):
        drawings[name] = drawing(plot)
        advance(done, len(plots))
    return render(contents, plots, drawings)


def render(contents: Contents, plots: Mapping[str, Plot], drawings: Mapping[str, str]) -> str:
    """The file from its parts. `drawings`: SVG by a plot's name, trusted as it is."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    script, plotly = _own("page.js"), _plotly() if plots else ""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    pairs, focus = _pairs(contents), contents.focus or {}
    return environment.from_string(_own("page.html.jinja")).render(
        c=contents,
        policy=Markup(_policy([plotly, script] if plots else [script])),
        style=Markup(_own("page.css")),
        script=Markup(script),
        plotly=Markup(plotly),
        data=Markup(_embedded(plots)) if plots else "",
        plots=plots,
        drawings={name: Markup(svg) for name, svg in drawings.items()},
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
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=metadata.version("tribunal"),
    )


def visible(text: str) -> str:
    """Text in which what cannot be seen, or turns the reading direction, has its code point."""
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n"))


def _embedded(plots: Mapping[str, Plot]) -> str:
    """JSON that ends no script and opens no comment."""
    told = {name: plain(plot.figure()) for name, plot in plots.items()}
    text = json.dumps(told, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy: no network, and no script but these."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _own(name: str) -> str:
    return resources.files("flows.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The script of the installed plotly, with the line breaks that a browser digests."""
    text = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text("utf-8")
    return text.replace("\r\n", "\n")


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
