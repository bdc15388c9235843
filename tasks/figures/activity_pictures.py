"""The pictures of activity: surfaces as in the seed, flat maps, and what each layer tells apart."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from artifacts.errors import ConfigError
from artifacts.store import Ref
from tasks.figures import drawing
from tasks.stage import Made, current, stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

LIMIT = 2.0
SURFACE_COLOURS = "RdYlGn_r"  # the seed's: green is low, red is high
AXES = ("Layer", "Generated token position", "Activity score (neutral SD)")
SHOWN = ("false", "true", "generated")
NAMES = {
    "false": "forced, false",
    "true": "forced, true",
    "odd": "forced, true but unusual",
    "generated": "generated",
}
FILES = (
    "activity.png", "activity.svg", "activity.html", "activity-map.png", "activity-map.svg",
    "activity-layers.png", "activity-layers.svg",
)  # fmt: skip


@dataclass(frozen=True)
class _Panel:
    """One answer: scores [layers, tokens], NaN where there is none."""

    condition: str
    prompt: str
    answer: str
    verdict: str | None
    tokens: list[str]
    scores: NDArray[np.float64]

    @property
    def name(self) -> str:
        found = NAMES[self.condition]
        return found if self.verdict is None else f"{found}: {self.verdict}"

    def title(self, width: int) -> str:
        said = [f"User: “{self.prompt}”", f"Assistant ({self.name}): “{self.answer}”"]
        return "\n".join(line for text in said for line in textwrap.wrap(text, width))


@stage(
    "pictures",
    version=1,
    data="picture",
    label=lambda file, **_: f"picture {file}",
)
def draw_activity(
    *,
    scores: Ref,
    answers: Ref,
    layers: Ref,
    file: str,
    example: int,
    direction: str,
    recipe: str,
    pooling: str,
) -> Made:
    """One picture file of FILES.

    Args:
        example: the question whose answers are drawn.
        direction, recipe, pooling: how the direction was had, for the caption.

    Raises:
        ConfigError: there is no such question.
    """
    store = current().store
    stem, form = file.rsplit(".", 1)
    told = _caption(direction, recipe, pooling)
    if stem == "activity-layers":
        name = recipe if direction == "pairs" else direction
        return Made(_layers(store.read(layers), name, told, form))
    panels = _panels(store.read(scores), store.read(answers), example)
    if form == "html":
        return Made(_html(panels, told))
    return Made((_surfaces if stem == "activity" else _maps)(panels, told, form))


def _caption(direction: str, recipe: str, pooling: str) -> str:
    at = "last token" if pooling == "last" else "mean over tokens"
    how = {
        ("pairs", "pca"): f"first principal component of false-minus-true differences ({at}; LAT "
        "of RepE, arXiv 2310.01405)",
        ("pairs", "mean"): f"mean of false-minus-true differences ({at})",
        ("pairs", "probe"): f"logistic regression on false-minus-true differences ({at})",
    }.get((direction, recipe), "refusal direction, difference of means of harmful and harmless")
    return (
        "S[l,t] = clip((<h[l,t], v_l> - m_l) / s_l, -2, 2); h: output of layer l at token t of the "
        f"answer; v_l: {how}; m_l, s_l: mean and SD over tokens of held-out neutral answers. The "
        "score's scale is ours. Forced answers are read by the model, a generated one is its own."
    )


def _panels(scores: pl.DataFrame, answers: pl.DataFrame, example: int) -> list[_Panel]:
    """The answers to one question that there are, in the order of NAMES."""
    own = scores.filter(pl.col("question") == example)
    if not own.height:
        last = int(scores["question"].max())  # type: ignore[arg-type]
        raise ConfigError(f"activity.example is '{example}', but questions go from 0 to {last}")
    texts = {
        row["condition"]: row
        for row in answers.filter(pl.col("question") == example).iter_rows(named=True)
    }
    panels = []
    for condition in (name for name in NAMES if name in texts):
        rows = own.filter((pl.col("condition") == condition) & (pl.col("state") > 0))
        rows = rows.sort("state", "position")
        n_layers, text = rows["state"].n_unique(), texts[condition]
        values = rows["score"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        tokens = rows.filter(pl.col("state") == 1)["token"].to_list()
        panels.append(
            _Panel(
                condition,
                text["text"],
                text["answer"],
                text["verdict"],
                tokens,
                values.reshape(n_layers, -1),
            )
        )
    return panels


def _surfaces(panels: Sequence[_Panel], told: str, form: Any) -> bytes:
    """The seed's picture: one surface per answer, one scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shown = [panel for panel in panels if panel.condition in SHOWN]
    width, height = 4.3 * len(shown) + 1.0, 4.8
    figure = drawing.new_figure(width, height)
    figure.set_layout_engine("none")  # it leaves 3-D axes too small and cuts their labels off
    norm = Normalize(-LIMIT, LIMIT)
    for number, panel in enumerate(shown):
        left, wide = 4.3 * number / width, 4.1 / width
        axes: Any = figure.add_axes((left, 0.1, wide, 0.72), projection="3d")
        x, y, z = _grid(panel.scores)
        axes.plot_surface(
            x, y, z, cmap=SURFACE_COLOURS, norm=norm, rcount=100, ccount=100,
            linewidth=0.25, edgecolor="#00000055", antialiased=True,
        )  # fmt: skip
        axes.set_xlabel(AXES[0], fontsize=8)
        axes.set_ylabel(AXES[1], fontsize=8)
        axes.set_zlabel(AXES[2], fontsize=8, labelpad=2)
        axes.set_zlim(-LIMIT, LIMIT)
        axes.set_zticks([-2, -1, 0, 1, 2])
        axes.tick_params(labelsize=7, pad=0)
        middle = left + wide / 2 + 0.1 / width
        figure.text(middle, 0.985, panel.title(58), fontsize=8, ha="center", va="top")
        axes.view_init(elev=28, azim=-55)
        axes.set_box_aspect((1.0, 1.15, 0.75), zoom=0.95)
    place = figure.add_axes((1 - 0.75 / width, 0.2, 0.15 / width, 0.52))
    bar = figure.colorbar(ScalarMappable(norm, SURFACE_COLOURS), cax=place)
    bar.set_label(AXES[2], fontsize=8)
    bar.ax.tick_params(labelsize=7)
    lines = textwrap.fill(told, int(width * 19))
    figure.text(0.01, 0.015, lines, fontsize=7, color="#444444", va="bottom")
    made = drawing.image(figure, form)
    return _with_palette(made) if form == "png" else made


def _with_palette(png: bytes) -> bytes:
    """The same picture in 256 colours: a shaded surface takes three times the bytes otherwise."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    # by coverage: the default spends the palette on frequent colours, and the bar's ends are rare
    few = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    few.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _grid(scores: NDArray[np.float64]) -> tuple[Any, Any, Any]:
    """x (layer), y (position), z of a surface; one layer or one token is drawn two wide."""
    n_layers, n_tokens = scores.shape
    wide = np.repeat(np.repeat(scores, 2 if n_layers == 1 else 1, 0), 2 if n_tokens == 1 else 1, 1)
    x, y = np.meshgrid(np.arange(wide.shape[0]), np.arange(wide.shape[1]), indexing="ij")
    return x, y, wide


def _maps(panels: Sequence[_Panel], told: str, form: Any) -> bytes:
    """Every answer as a flat map, tokens written out, one scale."""
    figure = drawing.new_figure(9.6, 0.6 + 2.05 * len(panels))
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        shown = axes.imshow(
            panel.scores, cmap=drawing.DIFFERENCES, vmin=-LIMIT, vmax=LIMIT,
            aspect="auto", origin="lower", interpolation="nearest",
        )  # fmt: skip
        axes.set_title(f"{panel.name} (user: “{panel.prompt}”)", fontsize=8, loc="left")
        axes.set_ylabel("Layer", fontsize=8)
        labels = [token.strip() or repr(token)[1:-1] for token in panel.tokens]
        axes.set_xticks(range(len(labels)), labels, rotation=60, fontsize=6, ha="right")
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
        axes.tick_params(axis="y", labelsize=7)
    grid[-1].set_xlabel("Token of the answer", fontsize=8)
    bar = figure.colorbar(shown, ax=list(grid), shrink=0.6, pad=0.02, aspect=30)
    bar.set_label(AXES[2], fontsize=8)
    bar.ax.tick_params(labelsize=7)
    drawing.caption(figure, told)
    return drawing.image(figure, form)


def _layers(layers: pl.DataFrame, direction: str, told: str, form: Any) -> bytes:
    """Pair accuracy and AUROC by layer, with intervals and controls."""
    figure = drawing.new_figure(9.6, 4.6)
    both = figure.subplots(1, 2, sharex=True)
    whole = layers.filter(pl.col("kind") == "all")
    for axes, measure, label in (
        (both[0], "accuracy", "Pair accuracy (fraction of questions)"),
        (both[1], "auroc", "AUROC of the mean score"),
    ):
        _curve(axes, whole, measure, direction, ("false", "true"), drawing.BLUE, "-", "o")
        _curve(axes, whole, measure, direction, ("odd", "true"), drawing.ORANGE, "--", "s")
        if direction != "probe":
            _curve(axes, whole, measure, "probe", ("false", "true"), "#000000", "--", "^")
        _curve(axes, whole, measure, "random", ("false", "true"), drawing.GREY, ":", "")
        _curve(axes, whole, measure, "shuffled", ("false", "true"), drawing.PURPLE, "-.", "")
        surprise = _of(whole, "surprise", ("false", "true"))
        if surprise.height:
            value = surprise[measure][0]
            axes.axhline(value, color=drawing.GREEN, lw=1, ls=(0, (6, 2)),
                         label="mean surprise of the tokens, false against true")  # fmt: skip
        axes.axhline(0.5, color="#000000", lw=0.5)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("Layer (E: embedding output)", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    states = sorted(set(whole["state"].drop_nulls()))
    step = max(len(states) // 16, 1)
    ticks = [0, *states[1::step]]
    both[0].set_xticks(ticks, ["E", *(str(state - 1) for state in ticks[1:])])
    n = int(whole["n"].max())  # type: ignore[arg-type]
    both[0].set_title(f"{n} held-out questions", fontsize=8, loc="left")
    both[1].set_title("Bands: 95 % intervals; of controls, 95 % of draws", fontsize=8, loc="left")
    handles, labels = both[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    drawing.caption(figure, told)
    return drawing.image(figure, form)


def _of(layers: pl.DataFrame, direction: str, pair: tuple[str, str]) -> pl.DataFrame:
    asked = (pl.col("direction") == direction) & (pl.col("higher") == pair[0])
    return layers.filter(asked & (pl.col("lower") == pair[1]))


def _curve(
    axes: Axes,
    layers: pl.DataFrame,
    measure: str,
    direction: str,
    pair: tuple[str, str],
    colour: str,
    line: str,
    marker: str,
) -> None:
    rows = _of(layers, direction, pair).filter(pl.col(measure).is_not_null()).sort("state")
    if not rows.height:
        return
    words = {
        "probe": "logistic regression",
        "random": "random directions",
        "shuffled": "labels and pairs shuffled",
    }
    against = "true but unusual" if pair[0] == "odd" else pair[0]
    label = f"{words.get(direction, 'the direction')}, {against} against {pair[1]}"
    x = rows["state"].to_numpy()
    axes.plot(x, rows[measure], color=colour, ls=line, marker=marker, ms=3.5, lw=1.4, label=label)
    low, high = (rows[f"{measure}_{end}"].to_numpy() for end in ("low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)


def _html(panels: Sequence[_Panel], told: str) -> bytes:
    """The same surfaces, to turn, with each token's text under the pointer."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = [panel.title(60).replace("\n", "<br>") for panel in panels]
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = make_subplots(
        rows=lines, cols=columns, subplot_titles=titles, horizontal_spacing=0.02,
        vertical_spacing=0.1, specs=[[{"type": "scene"}] * columns] * lines,
    )  # fmt: skip
    for number, panel in enumerate(panels):
        x, y, z = _grid(panel.scores)
        words = np.array(panel.tokens, dtype=object)[np.minimum(y, len(panel.tokens) - 1)]
        figure.add_trace(
            go.Surface(
                x=x.tolist(), y=y.tolist(), z=_without_nan(z), customdata=words.tolist(),
                coloraxis="coloraxis", name=panel.name,
                hovertemplate="layer %{x}<br>token %{y}: “%{customdata}”<br>score %{z:.2f}",
            ),
            row=number // columns + 1, col=number % columns + 1,
        )  # fmt: skip
    figure.update_scenes(
        xaxis_title=AXES[0], yaxis_title=AXES[1], zaxis_title="Activity score",
        zaxis_range=[-LIMIT, LIMIT], camera_eye={"x": 1.5, "y": -1.7, "z": 0.9},
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    figure.update_layout(
        coloraxis={
            "colorscale": SURFACE_COLOURS, "cmin": -LIMIT, "cmax": LIMIT,
            "colorbar": {"title": {"text": AXES[2]}},
        },
        height=560 * lines, margin={"l": 0, "r": 0, "t": 90, "b": 0},
    )  # fmt: skip
    return drawing.page(figure, told)


def _without_nan(values: NDArray[np.float64]) -> list[list[float | None]]:
    """Rows for JSON; rounded, so that the page stays small."""
    return [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in values]
