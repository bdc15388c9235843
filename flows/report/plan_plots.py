"""The plots of a study plan's report: for every config what its arms' searches had to offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from flows.display import number
from flows.report.contents import finite, n_other
from flows.report.plan_contents import PlanContents, Row
from flows.report.plots import KL, Plot, spans_decades

COLOURS = ("@orange", "@blue", "@green", "@purple", "@gold", "@grey")
DASHES = ("solid", "dash", "dot")
MARKERS = ("circle", "square", "diamond")


def plan_plots(contents: PlanContents) -> dict[str, Plot]:
    """Every plot by name: for each config of the plan, its fronts, its searches, its winners."""
    configs = dict.fromkeys(contents.members[name].config.name for name in contents.points)
    made: list[Plot] = []
    for config in configs:
        names = [n for n in contents.points if contents.members[n].config.name == config]
        if any(contents.points[name] for name in names):
            made += [front(contents, config, names), history(contents, config, names)]
    made.append(winners(contents))
    return {plot.name: plot for plot in made}


def front(contents: PlanContents, config: str, names: Sequence[str]) -> Plot:
    """The fewest refusals that each member's search reached at no more than a KL."""
    traces = []
    points = [p for name in names for p in contents.points[name]]
    for name, look in _looks(contents, names):
        best: list[Row] = []
        for point in sorted(contents.points[name], key=lambda p: (p["kl"], p["refusals"])):
            if not best or point["refusals"] < best[-1]["refusals"]:
                best.append(point)
        traces.append(_steps(look, best, "kl", "refusals"))
    title = f"{config}: fewest refusals at no more than a KL, search split"
    log = spans_decades([point["kl"] for point in points])
    y = f"refusals of {points[0]['n_harmful']} harmful prompts"
    return Plot(f"front-{config}", title, _named_once(traces), KL, y, log_x=log)


def history(contents: PlanContents, config: str, names: Sequence[str]) -> Plot:
    """The KL of the best trial so far of each member that refuses nothing."""
    traces, kls = [], []
    for name, look in _looks(contents, names):
        best: list[Row] = []
        for point in sorted(contents.points[name], key=lambda p: p["trial"] or 0):
            if point["refusals"] == 0 and (not best or point["kl"] < best[-1]["kl"]):
                best.append(point)
        if best:
            config_of = contents.members[name].config
            last = 0 if config_of.explicit else config_of.search.trials - 1
            best.append({**best[-1], "trial": last})
        kls += [point["kl"] for point in best]
        traces.append(_steps(look, best, "trial", "kl"))
    title = f"{config}: least KL so far of a trial that refuses nothing, search split"
    return Plot(
        f"history-{config}", title, _named_once(traces), "trial", KL, log_y=spans_decades(kls)
    )


def winners(contents: PlanContents) -> Plot:
    """The winners on their test prompts."""
    traces = []
    for place, arm in enumerate(_arms(contents)):
        rows = [r for r in _all(contents) if contents.members[r["member"]].config.arm == arm]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [row["kl"] for row in rows],
                "y": [100 * row["refusals"] / row["n_harmful"] for row in rows],
                "name": arm,
                "text": [_hover(row) for row in rows],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {
                    "symbol": MARKERS[place // len(COLOURS) % len(MARKERS)],
                    "size": 9,
                    "color": COLOURS[place % len(COLOURS)],
                    "opacity": 0.85,
                },
            }
        )
    log = spans_decades([row["kl"] for row in _all(contents)])
    shown = _named_once(traces)
    return Plot("winners-plane", "Winners, test split", shown, KL, "refusals, %", log_x=log)


def _arms(contents: PlanContents) -> list[str]:
    """Every arm in the plan's order, which gives it its colour in all plots."""
    return list(dict.fromkeys(member.config.arm for member in contents.members.values()))


def _all(contents: PlanContents) -> list[Row]:
    return [row for row in contents.winners if finite(row["kl"]) and row["n_harmful"]]


def _looks(contents: PlanContents, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every member with how its line looks: an arm has a colour, named once for all its seeds."""
    for name in names:
        arm = contents.members[name].config.arm
        place = _arms(contents).index(arm)
        yield (
            name,
            {
                "name": arm,
                "legendgroup": arm,
                "line": {
                    "color": COLOURS[place % len(COLOURS)],
                    "dash": DASHES[place // len(COLOURS) % len(DASHES)],
                    "width": 1.8,
                    "shape": "hv",
                },
                "hovertemplate": f"{escape(name)}<br>%{{x}}: %{{y}}<extra></extra>",
            },
        )


def _named_once(traces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have points; the first of each arm stands in the legend."""
    named: set[str] = set()
    found = []
    for trace in traces:
        if trace["x"]:
            found.append({**trace, "showlegend": trace["name"] not in named})
            named.add(trace["name"])
    return found


def _steps(look: dict[str, Any], rows: Sequence[Row], x: str, y: str) -> dict[str, Any]:
    """A line of steps with a mark at each."""
    marker = {"symbol": "circle", "size": 5, "color": look["line"]["color"]}
    values = {"x": [row[x] for row in rows], "y": [row[y] for row in rows], "marker": marker}
    return {"type": "scatter", "mode": "lines+markers", **values, **look}


def _hover(row: Row) -> str:
    """What is read under the pointer; plotly takes it for markup, so all of it is escaped."""
    lines = [
        f"{row['member']}, trial {row['trial']}",
        f"refusals {row['refusals']}/{row['n_harmful']}",
        f"overrefusals {row['overrefusals']}/{n_other(row)}",
        f"KL {number(row['kl'])} nats",
    ]
    return "<br>".join(escape(line) for line in lines)
