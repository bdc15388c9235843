"""Pictures of safety heads: the ten best as in the source, the whole map, and groups' refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from artifacts.store import Ref
from tasks.figures.drawing import AMOUNTS, BLUE, GREY, ORANGE, caption, image, new_figure, page
from tasks.figures.heads import ABLATIONS, CONTROL
from tasks.stage import Made, current, stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGES = {"ua": "#6a1b9a", "sc": "#e6b800"}  # purple circles and yellow crosses, as in the source
MARKS: dict[str, tuple[str, float]] = {
    "ua": ("o", 300),
    "sc": ("X", 60),
}  # a cross lies within its circle
DEGREES = "Generalized Ships (degrees)"
SOURCE = "Zhou et al., arXiv 2410.13708"
WHAT = (
    "Generalized Ships: angle between the leading left singular vectors of the last-token states "
    "(after the final norm) of all prompts, intact and with one head silenced"
)


@stage("pictures", version=1, data="picture", label=lambda file, **_: f"picture {file}")
def draw_heads(*, scores: Ref, top: int, file: str) -> Made:
    """One picture of the scores, by its file name: heads or heads-map, png, svg or html."""
    found = current().store.read(scores)
    name, form = file.rsplit(".", 1)
    if form == "html":
        return Made(page(_hover_map(found, top), _map_caption(found, top)))
    figure = _top(found, top) if name == "heads" else _map(found, top)
    return Made(image(figure, "svg" if form == "svg" else "png"))


@stage("pictures", version=1, data="picture", label=lambda file, **_: f"picture {file}")
def draw_refusals(*, refusals: Ref, file: str) -> Made:
    """Refusal rate over group size: greedy groups against random ones."""
    figure = _refusals(current().store.read(refusals))
    return Made(image(figure, "svg" if file.endswith(".svg") else "png"))


def _top(found: pl.DataFrame, top: int) -> Figure:
    """The best heads of every harmful set, a panel each."""
    from matplotlib.lines import Line2D

    shape, harmful = _shape(found), found.filter(pl.col("set") != CONTROL)
    names = harmful["set"].unique(maintain_order=True).to_list()
    figure = new_figure(max(6.0, 4.8 * len(names)), 4.9)
    for axes, name in zip(_panels(figure, 1, len(names))[0], names, strict=True):
        best = harmful.filter((pl.col("set") == name) & (pl.col("angle_rank") <= top))
        limit = float(best["angle"].max())  # type: ignore[arg-type]
        drawn = None
        for ablation in _ablations(found):
            part = best.filter(pl.col("ablation") == ablation)
            marker, size = MARKS[ablation]
            size *= min(1.0, 16 / max(shape))
            drawn = axes.scatter(
                part["layer"],
                part["head"],
                c=part["angle"],
                marker=marker,
                s=size,
                cmap=AMOUNTS,
                vmin=0,
                vmax=limit,
                edgecolors=EDGES[ablation],
                linewidths=1.8 if ablation == "ua" else 0.9,
            )
        _number_axes(axes, shape)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.set_title(f"{name} ({best['prompts'][0]} prompts)")
        if drawn is not None:
            figure.colorbar(drawn, ax=axes, label=DEGREES)
    keys = [
        Line2D([], [], ls="", marker=MARKS[a][0], ms=9, mfc="white", mec=EDGES[a], mew=2, label=n)
        for a, n in ABLATIONS.items()
        if a in _ablations(found)
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=2, frameon=False)
    caption(
        figure,
        f"The {top} heads of highest Generalized Ships under each ablation. {WHAT} ({SOURCE}). "
        "Edge: ablation; fill: degrees, each panel on its own scale as in the source.",
    )
    return figure


def _map(found: pl.DataFrame, top: int) -> Figure:
    """Every head: rows are ablations on one scale each, columns are prompt sets."""
    shape, names = _shape(found), found["set"].unique(maintain_order=True).to_list()
    ablations = _ablations(found)
    figure = new_figure(3.2 * len(names) + 1.2, 2.9 * len(ablations) + 0.5)
    for row, ablation in zip(_panels(figure, len(ablations), len(names)), ablations, strict=True):
        here = found.filter(pl.col("ablation") == ablation)
        limit = float(here["angle"].max())  # type: ignore[arg-type]
        drawn = None
        for axes, name in zip(row, names, strict=True):
            part = here.filter(pl.col("set") == name)
            drawn = axes.pcolormesh(
                np.arange(shape[0] + 1) - 0.5,
                np.arange(shape[1] + 1) - 0.5,
                np.ma.masked_invalid(_grid(part, shape, "angle")),
                cmap=AMOUNTS,
                vmin=0,
                vmax=limit,
            )
            best = part.filter(pl.col("angle_rank") <= top)
            axes.scatter(best["layer"], best["head"], s=16, c="white", edgecolors="black", lw=0.8)
            _number_axes(axes, shape)
            role = "harmless control" if name == CONTROL else f"{name}, harmful"
            axes.set_title(f"{role}\n{ABLATIONS[ablation]}", fontsize=9)
        if drawn is not None:
            figure.colorbar(drawn, ax=row, label="degrees", shrink=0.9)
    caption(figure, _map_caption(found, top))
    return figure


def _map_caption(found: pl.DataFrame, top: int) -> str:
    counts = ", ".join(
        f"{name} {n}"
        for name, n in found.select("set", "prompts").unique(maintain_order=True).rows()
    )
    return (
        f"{WHAT} ({SOURCE}); dots: the {top} highest of a panel; one scale per row. The harmless "
        "control is ours: a head that is as high there is important, not about safety. "
        f"Prompts: {counts}."
    )


def _hover_map(found: pl.DataFrame, top: int) -> Any:
    """The map with every number of a head where the pointer is."""
    from plotly.graph_objects import Heatmap, Scatter
    from plotly.subplots import make_subplots

    shape, names = _shape(found), found["set"].unique(maintain_order=True).to_list()
    ablations = _ablations(found)
    titles = [f"{name}: {ABLATIONS[a]}" for a in ablations for name in names]
    figure: Any = make_subplots(
        len(ablations), len(names), subplot_titles=titles, horizontal_spacing=0.05
    )
    for row, ablation in enumerate(ablations):
        here = found.filter(pl.col("ablation") == ablation)
        limit = float(here["angle"].max())  # type: ignore[arg-type]
        for column, name in enumerate(names):
            part = here.filter(pl.col("set") == name)
            text = np.full((shape[1], shape[0]), "", object)
            for head in part.iter_rows(named=True):
                text[head["head"], head["layer"]] = _words(head)
            place = {"x": 1.02, "len": 1 / len(ablations), "y": 1 - (row + 0.5) / len(ablations)}
            heat = Heatmap(
                z=_grid(part, shape, "angle"),
                text=text,
                hovertemplate="%{text}<extra></extra>",
                colorscale=AMOUNTS,
                zmin=0,
                zmax=limit,
                showscale=column == 0,
                colorbar={"title": "degrees", **place},
            )
            figure.add_trace(heat, row=row + 1, col=column + 1)
            best = part.filter(pl.col("angle_rank") <= top)
            dots = Scatter(
                x=best["layer"].to_list(),
                y=best["head"].to_list(),
                mode="markers",
                marker={"color": "white", "size": 7, "line": {"color": "black", "width": 1}},
                hoverinfo="skip",
                showlegend=False,
            )
            figure.add_trace(dots, row=row + 1, col=column + 1)
    figure.update_xaxes(title_text="Layer", dtick=max(1, shape[0] // 8))
    figure.update_yaxes(title_text="Head", dtick=max(1, shape[1] // 8))
    figure.update_layout(height=340 * len(ablations) + 60, margin={"t": 50})
    figure.update_annotations(font_size=12)
    return figure


def _words(head: dict[str, Any]) -> str:
    return (
        f"layer {head['layer']}, head {head['head']}<br>"
        f"angle {head['angle']:.3f}° ({head['angle_low']:.3f} to {head['angle_high']:.3f}), "
        f"rank {head['angle_rank']}, in the top by {head['angle_top']:.0%} of resamples<br>"
        f"Ships {head['ships']:.4g} nats ({head['ships_low']:.3g} to {head['ships_high']:.3g}), "
        f"rank {head['ships_rank']}<br>"
        f"feature-space angle {head['feature_angle']:.3f}°, rank {head['feature_rank']}<br>"
        f"touches {head['fraction']:.3%} of the parameters, {head['prompts']} prompts"
    )


def _refusals(found: pl.DataFrame) -> Figure:
    """A panel per ablation: greedy groups of every set, and random groups of the same sizes."""
    ablations = found["ablation"].unique(maintain_order=True).to_list()
    figure = new_figure(max(6.0, 4.6 * len(ablations)), 4.2)
    handles: list[Any] = []
    for axes, ablation in zip(_panels(figure, 1, len(ablations))[0], ablations, strict=True):
        here = found.filter(pl.col("ablation") == ablation)
        handles = _refusal_lines(axes, here)
        axes.set_xlabel("Heads silenced")
        axes.set_ylabel(f"Refused of {here['n'][0]} held-out prompts, fraction")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xticks(range(int(here["size"].max()) + 1))  # type: ignore[arg-type]
        axes.set_title(ABLATIONS[ablation])
        axes.grid(alpha=0.25)
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    draws = found["draws"][0]
    caption(
        figure,
        f"Sahara's greedy groups ({SOURCE}) chosen on one prompt set and silenced on others. Bars: "
        f"95 % Clopper-Pearson. Grey (ours): mean of {draws} random groups of the same size with "
        "its 95 % bootstrap interval. Dashed: chosen on harmless prompts (control, ours).",
    )
    return figure


def _refusal_lines(axes: Axes, here: pl.DataFrame) -> list[Any]:
    names = here["set"].unique(maintain_order=True).to_list()
    base, first = here["base_rate"][0], here.filter(pl.col("set") == names[0])
    sizes = [0, *first["size"]]
    low, high = [base, *first["random_low"]], [base, *first["random_high"]]
    axes.fill_between(sizes, low, high, color=GREY, alpha=0.25, lw=0)
    handles: list[Any] = axes.plot(
        sizes, [base, *first["random_rate"]], c=GREY, marker=".", label="random heads"
    )
    colours = [BLUE, ORANGE, "#009e73", "#56b4e9", "#e69f00"]
    shift = 0.07
    for number, name in enumerate(names):
        part = here.filter(pl.col("set") == name)
        rate = part["rate"].to_numpy()
        spread = [rate - part["rate_low"].to_numpy(), part["rate_high"].to_numpy() - rate]
        control = name == CONTROL
        colour = "#222222" if control else colours[number % len(colours)]
        places = part["size"].to_numpy() + shift * (number - (len(names) - 1) / 2)
        style: dict[str, Any] = {"color": colour, "ls": "--" if control else "-", "lw": 1.4}
        axes.plot([0, places[0]], [base, rate[0]], **style)
        label = "chosen on harmless prompts" if control else f"chosen on {name}"
        handles.append(
            axes.errorbar(
                places,
                rate,
                yerr=np.clip(spread, 0, None),
                marker="o",
                ms=4,
                capsize=2,
                label=label,
                **style,
            )
        )
    return handles


def _panels(figure: Figure, rows: int, columns: int) -> Any:
    return figure.subplots(rows, columns, squeeze=False)


def _ablations(found: pl.DataFrame) -> list[str]:
    return [name for name in ABLATIONS if name in set(found["ablation"])]


def _shape(found: pl.DataFrame) -> tuple[int, int]:
    """Layers and heads of the map; layers above the last one with heads do not show."""
    return int(found["layer"].max()) + 1, int(found["head"].max()) + 1  # type: ignore[arg-type]


def _grid(part: pl.DataFrame, shape: tuple[int, int], column: str) -> Any:
    """[heads, layers] of a column; NaN where a layer has no heads."""
    grid = np.full((shape[1], shape[0]), np.nan)
    grid[part["head"].to_numpy(), part["layer"].to_numpy()] = part[column].to_numpy()
    return grid


def _number_axes(axes: Axes, shape: tuple[int, int]) -> None:
    """Whole numbers from 0, as in the source: layers to the right, heads upwards."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("Layer")
    axes.set_ylabel("Head")
    axes.set_xlim(-0.5, shape[0] - 0.5)
    axes.set_ylim(-0.5, shape[1] - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
