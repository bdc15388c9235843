"""Pictures of norms: the seed's three panels, as a still and as a page, and what layers tell.

Position 0 stands apart, behind a gap: in many models its norm is an outlier ("massive
activations") that would decide the colours of all others, so the colours ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from artifacts.store import Ref
from tasks.figures.drawing import (
    AMOUNTS,
    BLUE,
    DIFFERENCES,
    GREEN,
    GREY,
    ORANGE,
    caption,
    image,
    new_figure,
    page,
)
from tasks.figures.norms import ALL, MATCHED
from tasks.figures.norms_detection import (
    CONTROLLED,
    FACTORS,
    LENGTH,
    RANDOM,
    SHUFFLED,
    SUSCEPTIBLE,
)
from tasks.stage import Made, current, stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
PANELS = ("benign", "jailbreak", "difference")
TITLES = {"benign": "Benign", "jailbreak": "Jailbreak", "difference": "Difference"}
UNITS = {"benign": "mean ln ‖h‖₂", "jailbreak": "mean ln ‖h‖₂", "difference": "jailbreak − benign"}
BLANK = "#e8e8e8"
DEFINITION = (
    "Mean over prompts of ln ‖h‖₂, in nats, of the residual stream at a token position; state 0 "
    "enters layer 0, state l leaves layer l − 1, before the final norm. Grey: fewer than {least} "
    "prompts reach the cell. Position 0 stands apart and does not count for the colours. Panels "
    "after Kadali and Papalexakis 2026 (arXiv 2602.11495); the logarithm is inferred from its "
    "colour bars; the length-matched row is ours."
)


@dataclass(frozen=True)
class Panel:
    """One heatmap: values and counts [states, columns], its colours' ends."""

    values: Floats
    counts: Floats
    ends: tuple[float, float]


@stage("pictures", version=1, data="picture", label=lambda file, **_: f"picture {file}")
def draw_norms(*, maps: Ref, name: str, least: int, file: str) -> Made:
    """The three panels of the seed, and the same of equally long prompts below, as one file."""
    frame = current().store.read(maps)
    rows = {v: _panels(frame, v) for v in (ALL, MATCHED) if (frame["variant"] == v).any()}
    sizes = {v: _size(frame, v) for v in rows}
    words = DEFINITION.format(least=least)
    if file.endswith(".html"):
        return Made(page(_page(rows, sizes, name), words))
    figure = new_figure(12.0, 0.9 + 2.9 * len(rows))
    grid: Any = figure.subplots(len(rows), len(PANELS), squeeze=False)
    for line, (variant, panels) in zip(grid, rows.items(), strict=True):
        for axes, panel in zip(line, PANELS, strict=True):
            _heatmap(figure, axes, panels[panel], panel)
        line[0].set_ylabel(f"{variant}, {sizes[variant]}\n\nlayer (state)")
    for axes, panel in zip(grid[0], PANELS, strict=True):
        axes.set_title(TITLES[panel])
    for axes in grid[-1]:
        axes.set_xlabel("token position")
    figure.suptitle(name, x=0.01, ha="left", fontsize=11)
    caption(figure, words)
    return Made(image(figure, _form(file)))


@stage("pictures", version=1, data="picture", label=lambda file, **_: f"picture {file}")
def draw_layers(*, detection: Ref, bypass: Ref, name: str, file: str) -> Made:
    """AUROC by layer with its baselines, and what bypassing layers does, as one file."""
    store = current().store
    figure = new_figure(11.0, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    scores = store.read(detection)
    _aurocs(left, scores)
    _outcomes(right, store.read(bypass), int(scores["layer"].max()) + 1)  # type: ignore[arg-type]
    figure.suptitle(name, x=0.01, ha="left", fontsize=11)
    words = (
        "Left: logistic regression on CP prompt factors of each layer's output (arXiv 2602.11495), "
        "scored on held-out prompts; bands: 95 % bootstrap intervals over prompts, of shuffled "
        "labels the middle 95 % of permutations. Control: benign requests in the jailbreaks' own "
        "templates; it, length and shuffled labels are ours. Right: of prompts that the "
        "unedited model answered, the share refused (jailbreaks) or still answered (benign) while "
        "layers of high probability are bypassed; "
        "bars: Clopper-Pearson; random: as many layers per prompt at random."
    )
    caption(figure, words)
    return Made(image(figure, _form(file)))


def _form(file: str) -> Literal["png", "svg"]:
    return "svg" if file.endswith(".svg") else "png"


def _panels(frame: pl.DataFrame, variant: str) -> dict[str, Panel]:
    of_variant = frame.filter(pl.col("variant") == variant)
    shape = int(frame["state"].max()) + 1, int(frame["position"].max()) + 1  # type: ignore[arg-type]
    found = {}
    for panel in PANELS:
        cells = of_variant.filter(pl.col("panel") == panel)
        at = cells["state"].to_numpy(), cells["position"].to_numpy()
        values, counts = np.full(shape, np.nan), np.zeros(shape)
        values[at] = np.where(cells["shown"], cells["value"].to_numpy(), np.nan)
        counts[at] = cells["n"].to_numpy()
        found[panel] = values, counts
    reached = np.flatnonzero((~np.isnan([v for v, _ in found.values()])).any(axis=(0, 1)))
    width = int(reached[-1]) + 1 if reached.size else shape[1]
    found = {panel: (v[:, :width], c[:, :width]) for panel, (v, c) in found.items()}
    amounts = _ends(found["benign"][0], found["jailbreak"][0])
    widest = max(map(abs, _ends(found["difference"][0])))
    ends = {"benign": amounts, "jailbreak": amounts, "difference": (-widest, widest)}
    return {name: Panel(*both, ends[name]) for name, both in found.items()}


def _ends(*maps: Floats) -> tuple[float, float]:
    """Least and largest value at positions from 1 on; (0, 1) if there is none."""
    values = np.concatenate([each[:, 1:].ravel() for each in maps])
    values = values[~np.isnan(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _size(frame: pl.DataFrame, variant: str) -> str:
    """How many prompts stand behind a row of panels."""
    first = frame.filter((pl.col("variant") == variant) & (pl.col("position") == 0))
    n = {p: max(first.filter(pl.col("panel") == p)["n"].to_list()) for p in PANELS[:2]}
    return f"n = {n['benign']} + {n['jailbreak']}"


def _gap(width: int) -> int:
    """Columns between position 0 and the others."""
    return max(1, width // 24)


def _apart(values: Floats) -> Floats:
    """Position 0, a gap, and the other positions."""
    gap = np.full((len(values), _gap(values.shape[1])), np.nan)
    return np.concatenate([values[:, :1], gap, values[:, 1:]], axis=1)


def _heatmap(figure: Figure, axes: Axes, panel: Panel, name: str) -> None:
    from matplotlib import colormaps

    colours = colormaps[DIFFERENCES if name == "difference" else AMOUNTS].with_extremes(bad=BLANK)
    n_states, width = panel.values.shape
    gap = _gap(width)
    shown = axes.imshow(
        _apart(panel.values),
        cmap=colours,
        vmin=panel.ends[0],
        vmax=panel.ends[1],
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, width + gap - 0.5, n_states - 0.5, -0.5),
    )
    axes.axvspan(0.5, gap + 0.5, color="white", lw=0)
    step = _step(width)
    ticks = [0, *range(step, width, step)]
    axes.set_xticks([0, *(t + gap for t in ticks[1:])], [str(t) for t in ticks])
    axes.set_yticks(range(0, n_states, max(1, -(-n_states // 9))))
    bar = figure.colorbar(shown, ax=axes, extend="both", pad=0.02)
    bar.set_label(f"{UNITS[name]}, nats", fontsize=8)


def _step(width: int) -> int:
    """Token positions between ticks: the seed's 64 at its 512."""
    return next((step for step in (2, 4, 8, 16, 32) if width / step <= 8), 64)


def _page(rows: Mapping[str, Mapping[str, Panel]], sizes: Mapping[str, str], name: str) -> Any:
    """The panels with state, position, value and count under the pointer."""
    from plotly.subplots import make_subplots

    titles = [f"{TITLES[p]}: {v}, {sizes[v]}" for v in rows for p in PANELS]
    figure = make_subplots(
        rows=len(rows), cols=3, subplot_titles=titles, horizontal_spacing=0.09, shared_yaxes=True
    )
    for line, panels in enumerate(rows.values(), start=1):
        for column, name_of in enumerate(PANELS, start=1):
            across = figure.get_subplot(line, column).yaxis.domain
            figure.add_trace(_trace(panels[name_of], name_of, column, across), line, column)
            figure.update_xaxes(title_text="token position", row=line, col=column)
        figure.update_yaxes(title_text="layer (state)", row=line, col=1)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(title=name, height=130 + 320 * len(rows), template="plotly_white")
    figure.update_layout(plot_bgcolor=BLANK)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return figure


def _trace(panel: Panel, name: str, column: int, across: tuple[float, float]) -> Any:
    from plotly.graph_objects import Heatmap

    n_states, width = panel.values.shape
    places = np.array([0, *range(1 + _gap(width), width + _gap(width))])
    positions = np.broadcast_to(np.arange(width), (n_states, width))
    return Heatmap(
        z=panel.values,
        x=places,
        y=list(range(n_states)),
        customdata=np.stack([positions, panel.counts], axis=-1),
        zmin=panel.ends[0],
        zmax=panel.ends[1],
        colorscale="RdBu_r" if name == "difference" else "Viridis",
        hoverongaps=False,
        hovertemplate="state %{y}, position %{customdata[0]}<br>%{z:.3f} nats, "
        "n = %{customdata[1]}<extra></extra>",
        colorbar={
            "len": across[1] - across[0],
            "thickness": 10,
            "x": (0.27, 0.635, 1.0)[column - 1],
            "y": (across[0] + across[1]) / 2,
        },
    )


def _aurocs(axes: Axes, frame: pl.DataFrame) -> None:
    """Colour: what jailbreaks are told from. Line: which detector."""
    found = frame.filter((pl.col("metric") == "auroc") & (pl.col("jailbreaks") == "all"))
    lines = (
        (FACTORS, "benign", BLUE, "-o", "factors, against benign"),
        (FACTORS, "control", ORANGE, "-o", "factors, against the control"),
        (CONTROLLED, "control", ORANGE, "--^", "fitted on a control too, against the control"),
        (SHUFFLED, "benign", GREY, ":", "shuffled labels, against benign"),
    )
    for detector, against, colour, style, label in lines:
        of = found.filter((pl.col("detector") == detector) & (pl.col("against") == against))
        if of.height:
            axes.plot(of["layer"], of["value"], style, c=colour, ms=4, label=label)
            axes.fill_between(of["layer"], of["low"], of["high"], color=colour, alpha=0.13, lw=0)
    for against, colour in (("benign", BLUE), ("control", ORANGE)):
        of = found.filter((pl.col("detector") == LENGTH) & (pl.col("against") == against))
        for row in of.iter_rows(named=True):
            word = "benign" if against == "benign" else "the control"
            label = f"length alone, against {word}"
            axes.axhline(row["value"], color=colour, ls="-.", lw=1, label=label)
    axes.set_xlabel("layer whose output is decomposed")
    axes.set_ylabel("AUROC, held-out jailbreaks")
    axes.set_ylim(0.2, 1.02)
    layers = found["layer"].drop_nulls()
    if layers.len():
        last = int(layers.max())  # type: ignore[arg-type]
        axes.set_xticks(range(0, last + 1, max(1, -(-last // 8))))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def _cap(cap: int, n_layers: int) -> str:
    return "all above the threshold" if cap >= n_layers else f"at most {cap}"


def _outcomes(axes: Axes, frame: pl.DataFrame, n_layers: int) -> None:
    """Bars per cap: blocked jailbreaks and kept benign prompts, for both arms."""
    caps = sorted(frame["at_most"].unique())
    bars: Sequence[tuple[str, str, str, str, str]] = (
        ("jailbreak", "refused", SUSCEPTIBLE, BLUE, "jailbreaks now refused"),
        ("jailbreak", "refused", RANDOM, "#9ecae1", "the same, random layers"),
        ("benign", "answered", SUSCEPTIBLE, ORANGE, "benign still answered"),
        ("benign", "answered", RANDOM, "#fdbe85", "the same, random layers"),
        ("control", "answered", SUSCEPTIBLE, GREEN, "control still answered"),
        ("control", "answered", RANDOM, "#a6dba0", "the same, random layers"),
    )
    bars = [bar for bar in bars if (frame["class"] == bar[0]).any()]
    width = 0.8 / len(bars)
    for number, (prompts, outcome, arm, colour, label) in enumerate(bars):
        of = frame.filter(
            (pl.col("class") == prompts) & (pl.col("outcome") == outcome) & (pl.col("arm") == arm)
        ).sort("at_most")
        rates = of["rate"].fill_null(0.0).to_numpy()
        ends = np.abs(np.stack([rates - of["low"].to_numpy(), of["high"].to_numpy() - rates]))
        places = np.arange(of.height) + (number - (len(bars) - 1) / 2) * width
        axes.bar(places, rates, width, color=colour, label=label)
        axes.errorbar(places, rates, yerr=ends, fmt="none", ecolor="#333333", lw=0.8, capsize=2)
    axes.set_xticks(range(len(caps)), [_cap(cap, n_layers) for cap in caps])
    axes.set_xlabel("layers bypassed per prompt")
    axes.set_ylabel("share of prompts that were answered")
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.25, axis="y")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
