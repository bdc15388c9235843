"""The pictures of the figure: the seed's scatter, its interactive form, risk-coverage curves."""

from __future__ import annotations

from html import escape
from typing import Any

import polars as pl

from artifacts.store import Ref
from tasks.figures.divergence import MODES, TEST
from tasks.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    caption,
    image,
    new_figure,
    page,
)
from tasks.stage import Made, current, stage

SCATTER = ("divergence.png", "divergence.svg", "divergence.html")
RISK = ("divergence-risk.png", "divergence-risk.svg")
CLASSES = ((True, "Correct (T)", BLUE), (False, "Incorrect (F)", ORANGE))
NAMES = {
    "entropy_sum": "entropy, sum",
    "entropy_mean": "entropy, mean",
    "js_late": "JS, late layers",
    "js_adjacent": "JS, adjacent layers",
    "js_all": "JS, all layers",
    "tokens": "length alone",
    "combined": "all combined",
}
STYLES = {
    "entropy_sum": (BLUE, "-"),
    "entropy_mean": (BLUE, "--"),
    "js_late": (ORANGE, "-"),
    "js_adjacent": (PURPLE, (0, (1, 2))),
    "js_all": (ORANGE, ":"),
    "tokens": (GREY, "-."),
    "combined": (GREEN, "-"),
}
VERTICAL = "Lowest Entropy (Incorrect)"
HORIZONTAL = {
    "lowest-entropy": "JS of that answer",
    "youden": "Youden's cut",
}
MEANING = {
    "late-vs-final": "each late layer (the last quarter or as configured, without the last) and "
    "the last layer",
    "adjacent": "each late layer and the next one",
    "all-vs-final": "every layer but the last and the last layer",
}
X, Y = "Entropy (sum over answer tokens, nats)", "JS Divergence (mean, nats)"


@stage("pictures", version=1, data="picture", label=lambda file, **_: file)
def draw_scatter(
    *, file: str, answers: Ref, lines: Ref, quadrants: Ref, dataset: str, model: str, line: str
) -> Made:
    """A point per test answer, blue if correct and red if not, with both lines and quadrants."""
    store = current().store
    table = store.read(answers).filter(pl.col("split") == TEST)
    cut = store.read(lines).filter(pl.col("line") == line).row(0, named=True)
    counts = store.read(quadrants).filter((pl.col("split") == TEST) & (pl.col("line") == line))
    text = _caption(cut, counts)
    if file.endswith(".html"):
        return Made(_interactive(table, cut, f"{dataset} - {model}", text))
    figure = new_figure(6.4, 4.6)
    axes = figure.add_subplot()
    divergence = MODES[cut["mode"]]
    for correct, label, colour in CLASSES:
        part = table.filter(pl.col("correct") == correct)
        axes.scatter(
            part["entropy_sum"], part[divergence], s=16, c=colour, alpha=0.7, linewidths=0,
            label=f"{label}, n = {part.height}",
        )  # fmt: skip
    _draw_lines(axes, cut)
    axes.set_xlabel(X)
    axes.set_ylabel(Y)
    axes.set_title(f"{dataset} - {model}", loc="left", fontsize=11)
    axes.margins(0.04)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8,
        handletextpad=0.2, columnspacing=0.8, borderaxespad=0.2,
    )  # fmt: skip
    caption(figure, text)
    return Made(image(figure, "svg" if file.endswith(".svg") else "png"))


def _draw_lines(axes: Any, cut: dict[str, Any]) -> None:
    """The dashed lines with their names, where they are set."""
    style: dict[str, Any] = {"color": "#333333", "linestyle": "--", "linewidth": 1}
    words: dict[str, Any] = {"fontsize": 7, "color": "#333333"}
    if cut["entropy"] is not None:
        axes.axvline(cut["entropy"], **style)
        axes.annotate(
            VERTICAL, (cut["entropy"], 0.98), xycoords=("data", "axes fraction"), rotation=90,
            xytext=(3, 0), textcoords="offset points", ha="left", va="top", **words,
        )  # fmt: skip
    if cut["js"] is not None:
        axes.axhline(cut["js"], **style)
        axes.annotate(
            HORIZONTAL[cut["line"]], (0.99, cut["js"]), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", **words,
        )  # fmt: skip


def _caption(cut: dict[str, Any], counts: pl.DataFrame) -> str:
    """The definition, whose it is, and how many are right on each side of the lines."""
    text = (
        "A point per generated answer of the test split. Entropy: full-vocabulary entropy of the "
        "next token, summed over the answer. JS: Jensen-Shannon divergence (natural log, at most "
        f"ln 2) between the logit lenses of {MEANING[cut['mode']]}, mean over layers and tokens. "
        f"Lines from {cut['n']} calibration answers, {cut['incorrect']} of them incorrect. "
    )
    sides = [
        f"{row['entropy']} / {row['js']} {row['correct']}/{row['n']}"
        for row in counts.iter_rows(named=True)
    ]
    if sides:
        text += f"Correct at entropy / JS: {', '.join(sides)}. "
    return text + "The form of the plot is the seed's; its definition is not known, this is ours."


def _interactive(table: pl.DataFrame, cut: dict[str, Any], title: str, text: str) -> bytes:
    """The same with question, answer and gold answer where the pointer is."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for correct, label, colour in CLASSES:
        part = table.filter(pl.col("correct") == correct)
        figure.add_trace(
            graph_objects.Scatter(
                x=part["entropy_sum"].to_list(),
                y=part[MODES[cut["mode"]]].to_list(),
                mode="markers",
                name=f"{label}, n = {part.height}",
                marker={"color": colour, "size": 8, "opacity": 0.6},
                hovertext=[_hover(row) for row in part.iter_rows(named=True)],
                hoverinfo="text",
            )
        )
    dash = {"line_dash": "dash", "line_color": "#333333", "line_width": 1}
    if cut["entropy"] is not None:
        figure.add_vline(cut["entropy"], annotation_text=VERTICAL, **dash)
    if cut["js"] is not None:
        figure.add_hline(cut["js"], annotation_text=HORIZONTAL[cut["line"]], **dash)
    figure.update_layout(
        title=title, xaxis_title=X, yaxis_title=Y, template="plotly_white", height=640,
        legend={"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "orientation": "h"},
    )  # fmt: skip
    return page(figure, text)


def _hover(row: dict[str, Any]) -> str:
    """What is shown of one answer; texts are escaped, because plotly reads them as HTML."""
    told = {
        "question": row["question"],
        "answer": row["answer"],
        "gold": row["gold"],
        "says": row["prediction"] or "nothing that can be told",
        "kind": row["kind"],
        "entropy": f"{row['entropy_sum']:.3f} nats in {row['tokens']} tokens",
        "JS": f"late {row['js_late']:.4f}, adjacent {row['js_adjacent']:.4f}, "
        f"all {row['js_all']:.4f} nats",
    }
    return "<br>".join(f"<b>{name}</b> {_wrapped(text)}" for name, text in told.items() if text)


def _wrapped(text: str, width: int = 80) -> str:
    from textwrap import wrap

    return "<br>".join(escape(line) for line in wrap(text, width)[:12])


@stage("pictures", version=1, data="picture", label=lambda file, **_: file)
def draw_risk_curves(
    *, file: str, risk: Ref, scores: Ref, kinds: Ref, dataset: str, model: str
) -> Made:
    """Risk against coverage on the test split, a curve per score."""
    store = current().store
    curves = store.read(risk)
    areas = {
        row["score"]: row["aurc"]
        for row in store.read(scores).filter(pl.col("split") == TEST).iter_rows(named=True)
    }
    figure = new_figure(6.4, 4.6)
    axes = figure.add_subplot()
    for score, (colour, style) in STYLES.items():
        curve = curves.filter(pl.col("score") == score)
        if curve.height:
            axes.plot(
                curve["coverage"], curve["risk"], color=colour, linestyle=style, linewidth=1.4,
                label=f"{NAMES[score]}, {areas[score]:.3f}",
            )  # fmt: skip
    everyone = store.read(kinds).filter((pl.col("split") == TEST) & (pl.col("kind") == "all"))
    wrong = 1 - everyone["accuracy"].item()
    axes.axhline(wrong, color=GREY, linewidth=1, label=f"no score, {wrong:.3f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Coverage (fraction of answers accepted)")
    axes.set_ylabel("Risk (fraction of accepted answers incorrect)")
    axes.set_title(f"{dataset} - {model}", loc="left", fontsize=11)
    figure.legend(
        loc="outside right upper", frameon=False, fontsize=8, title="score, area",
        title_fontsize=8,
    )  # fmt: skip
    caption(
        figure,
        f"Answers of the test split (n = {everyone['n'].item()}) are accepted from the lowest "
        "score up; answers with equal scores together. Area: risk averaged over coverage, "
        "smaller is better (AURC, "
        "Geifman and El-Yaniv 2017). All combined: logistic regression fitted on the calibration "
        "split. Intervals are in the table divergence_risk.",
    )
    return Made(image(figure, "svg" if file.endswith(".svg") else "png"))
