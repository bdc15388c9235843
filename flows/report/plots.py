"""The plots of a report, as data for plotly: one description, drawn by the page and by matplotlib.

Colours are words ("@blue"): the page gives them values for a light and a dark ground, and on paper.
A text under the pointer is markup to plotly, so what is not ours is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from flows.report.contents import PARTS, Contents, Row, component, finite, n_other, state_of

Trace = dict[str, Any]
STATES = {  # marker, colour, words
    "gated": ("x", "@grey", "gated"),
    "stopped": ("triangle-up", "@grey", "stopped early"),
    "passed": ("circle", "@blue", "passed the gates"),
}


@dataclass(frozen=True)
class Plot:
    """One plot with the words that stand for it where it cannot be seen."""

    name: str
    title: str
    traces: Sequence[Trace]
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False

    def figure(self) -> dict[str, Any]:
        """Data and layout for plotly."""
        axes = {"x": (self.x, self.log_x), "y": (self.y, self.log_y)}
        layout: dict[str, Any] = {
            f"{axis}axis": {
                "title": {"text": text, "standoff": 8},
                "type": "log" if log else "linear",
                "gridcolor": "@grid",
                "linecolor": "@grid",
                "zeroline": False,
                "automargin": True,
                **({"dtick": 1} if log else {}),
            }
            for axis, (text, log) in axes.items()
        }
        layout |= {
            "font": {"color": "@ink", "size": 12},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "hoverlabel": {"align": "left"},
            "hovermode": "closest",
            "modebar": {
                "bgcolor": "rgba(0,0,0,0)",
                "color": "@grey",
                "activecolor": "@ink",
                "orientation": "v",
            },
        }
        return {"data": list(self.traces), "layout": layout}


def all_plots(contents: Contents) -> dict[str, Plot]:
    """Every plot that the study has numbers for, by name."""
    search = contents.rankings["search"]
    made: list[Plot] = []
    if any(finite(row["kl"]) for row in search):
        made += [plane(contents), history(contents, "refusals"), history(contents, "kl")]
    if contents.n_layers:
        made += [kernels(contents, part) for part in PARTS if _has(contents.kernels, part)]
    if contents.directions:
        made += [separation(contents), norms(contents)]
    return {plot.name: plot for plot in made}


def plane(contents: Contents) -> Plot:
    """Refusals against KL, with the Pareto front and the gate."""
    rows = [row for row in contents.rankings["search"] if finite(row["kl"])]
    traces = [_points(rows, state, "kl", "refusals") for state in STATES]
    front = sorted((r for r in rows if r["pareto"]), key=lambda r: (r["kl"], r["refusals"]))
    if front:
        line = {"color": "@blue", "width": 1.5, "shape": "hv"}
        traces.append(_line(front, "kl", "refusals", "Pareto front", line))
    log = spans_decades([row["kl"] for row in rows])
    frozen = [row for row in rows if row["trial"] == contents.winner]
    if frozen:
        traces.append(_star(frozen, "kl", "refusals"))
    gate = contents.study["config"].get("gates", {}).get("max_kl")
    most = max((row["refusals"] or 0 for row in rows), default=0)
    if finite(gate) and 0 < gate <= 2 * max(row["kl"] for row in rows):
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [gate, gate],
                "y": [0, most],
                "name": f"gate: KL {gate:g}",
                "hoverinfo": "skip",
                "line": {"color": "@grey", "width": 1, "dash": "dot"},
            }
        )
    n = rows[0]["n_harmful"]
    y = f"refusals of {n} harmful prompts"
    return Plot("plane", "Refusals against KL", _filled(traces), KL, y, log_x=log)


KL = "first-token KL, nats"


def history(contents: Contents, metric: str) -> Plot:
    """Every trial in the order it was asked for, and the best so far by the strict order."""
    rows = sorted(
        (r for r in contents.rankings["search"] if finite(r["kl"]) and r["trial"] is not None),
        key=lambda r: r["trial"],
    )
    traces = [_points(rows, state, "trial", metric) for state in STATES]
    best: list[Row] = []
    for row in rows:
        leads = state_of(row) == "passed" and (not best or _place(row) < _place(best[-1]))
        if leads or best:
            best.append({**(row if leads else best[-1]), "trial": row["trial"]})
    if best:
        line = {"color": "@orange", "width": 1.5, "shape": "hv"}
        traces.append(_line(best, "trial", metric, "best so far", line))
    is_kl = metric == "kl"
    log = is_kl and spans_decades([row["kl"] for row in rows])
    title = "KL by trial" if is_kl else "Refusals by trial"
    return Plot(
        f"history-{metric}", title, _filled(traces), "trial", KL if is_kl else metric, log_y=log
    )


def _place(row: Row) -> tuple[float, float, float]:
    unknown = math.inf
    counts = (row["refusals"], row["overrefusals"])
    refusals, overrefusals = (unknown if count is None else count for count in counts)
    return refusals, overrefusals, row["kl"]


def kernels(contents: Contents, part: str) -> Plot:
    """Weights over layers of one component, of the front and the frozen trial."""
    from tasks.numerics.kernel import Kernel

    names = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
    layers, traces, told = list(range(contents.n_layers or 0)), [], False
    for row in sorted(contents.kernels, key=lambda r: bool(r["frozen"])):
        values = [row[f"{part}_{name}"] for name in names]
        if not all(map(finite, values)):
            continue
        frozen = bool(row["frozen"])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if frozen else "lines",
                "x": layers,
                "y": Kernel(*values).weights(len(layers)),
                "name": f"frozen: trial {row['trial']}" if frozen else "Pareto front",
                "legendgroup": "frozen" if frozen else "front",
                "showlegend": frozen or not told,
                "opacity": 1 if frozen else 0.7,
                "line": {
                    "color": "@orange" if frozen else "@blue",
                    "width": 2.5 if frozen else 1.5,
                },
                "marker": {"symbol": "circle", "size": 6, "color": "@orange"},
                "hovertemplate": f"trial {row['trial']}<br>layer %{{x}}: %{{y:.3f}}<extra></extra>",
            }
        )
        told = told or not frozen
    title = f"Weights on {component(part)}"
    return Plot(f"kernel-{part}", title, traces, "layer", "weight of the edit")


def separation(contents: Contents) -> Plot:
    """Cosine and silhouette by state."""
    colours = (("cosine", "@orange", "circle"), ("silhouette", "@blue", "square"))
    traces = _by_state(contents, colours)
    return Plot("separation", "Cosine and silhouette by state", traces, STATE, "cosine, silhouette")


def norms(contents: Contents) -> Plot:
    """Norms of mean residuals by state."""
    colours = (
        ("harmful_norm", "@orange", "circle"),
        ("harmless_norm", "@blue", "square"),
        ("difference_norm", "@green", "diamond"),
    )
    traces = _by_state(contents, colours)
    return Plot("norms", "Norms of mean residuals by state", traces, STATE, "Euclidean norm")


STATE = "residual state"


def _by_state(contents: Contents, colours: Sequence[tuple[str, str, str]]) -> list[Trace]:
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [row["state"] for row in contents.directions],
            "y": [row[name] if finite(row[name]) else None for row in contents.directions],
            "name": name.replace("_norm", " mean" if name != "difference_norm" else " of means"),
            "line": {"color": colour, "width": 2},
            "marker": {"symbol": symbol, "size": 6, "color": colour},
            "hovertemplate": "state %{x}: %{y:.4g}<extra></extra>",
        }
        for name, colour, symbol in colours
    ]


def _points(rows: Sequence[Row], state: str, x: str, y: str) -> Trace:
    part = [row for row in rows if state_of(row) == state]
    symbol, colour, words = STATES[state]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [row[x] for row in part],
        "y": [row[y] for row in part],
        "name": words,
        "text": [_hover(row) for row in part],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": symbol, "size": 8, "color": colour, "opacity": 0.85},
    }


def _star(rows: Sequence[Row], x: str, y: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [row[x] for row in rows],
        "y": [row[y] for row in rows],
        "name": f"frozen: trial {rows[0]['trial']}",
        "text": [_hover(row) for row in rows],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": "star", "size": 16, "color": "@orange"},
    }


def _line(rows: Sequence[Row], x: str, y: str, name: str, line: Mapping[str, Any]) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [row[x] for row in rows],
        "y": [row[y] for row in rows],
        "name": name,
        "hoverinfo": "skip",
        "line": dict(line),
    }


def _hover(row: Row) -> str:
    """What is read under the pointer; plotly takes it for markup, so all of it is escaped."""
    stopped = "≥" if row["stopped"] else ""
    lines = [
        f"trial {row['trial']}" + (f", rank {row['rank']}" if row["rank"] else ""),
        f"refusals {stopped}{row['refusals']}/{row['n_harmful']}",
        f"overrefusals {stopped}{row['overrefusals']}/{n_other(row)}",
        f"KL {row['kl']:.4g} nats",
        row["gate_reason"] or state_of(row),
    ]
    return "<br>".join(escape(line) for line in lines)


def _filled(traces: Sequence[Trace]) -> list[Trace]:
    return [trace for trace in traces if trace["x"]]


def _has(rows: Sequence[Row], part: str) -> bool:
    return any(finite(row[f"{part}_max_weight"]) for row in rows)


def spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more: all positive, and over more than a decade."""
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)
