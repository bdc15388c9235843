"""Pictures of results. Axes carry units; colours print and suit colour-blind readers."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8a8a"  # Okabe and Ito


def plot_trials(leaderboard: pl.DataFrame) -> bytes:
    """Refusals against KL of a study's search trials, the Pareto front and the first in rank."""
    from matplotlib.figure import Figure

    search = leaderboard.filter(pl.col("split") == "search").sort("rank", nulls_last=True)
    judged, stopped = search.filter(~pl.col("stopped")), search.filter(pl.col("stopped"))
    passed, gated = judged.filter(~pl.col("gated")), judged.filter(pl.col("gated"))
    front, best = passed.filter(pl.col("pareto")).sort("kl"), search.row(0, named=True)
    figure = Figure(figsize=(7.2, 4.4), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    if gated.height:
        axes.scatter(gated["kl"], gated["refusals"], c=GREY, marker="x", label="gated")
    known = pl.col("answered_harmful") == pl.col("n_harmful")
    for part, marker, label in (
        (stopped.filter(known), ".", "stopped: overrefusals not known"),
        (stopped.filter(~known), "^", "stopped: at least so many refusals"),
    ):
        if part.height:
            axes.scatter(part["kl"], part["refusals"], c=GREY, s=18, marker=marker, label=label)
    axes.step(front["kl"], front["refusals"], where="post", c=BLUE, lw=1, label="Pareto front")
    axes.scatter(passed["kl"], passed["refusals"], c=BLUE, s=26, label="passed the gates")
    first = f"first in rank: trial {best['trial']}"
    axes.scatter([best["kl"]], [best["refusals"]], marker="*", s=220, c=ORANGE, label=first)
    _scale_kl(axes, search["kl"])
    axes.set_xlabel("first-token KL(unedited || edited) on harmless prompts, nats")
    axes.set_ylabel(f"refusals of {best['n_harmful']} harmful prompts")
    axes.set_title(f"{search.height} trials of arm {best['arm']}, search split")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _scale_kl(axes: Axes, kl: pl.Series) -> None:
    """A logarithmic KL axis where the values span more than a decade, a linear one elsewhere."""
    found = kl.filter(kl.is_finite() & (kl > 0))
    if found.len() and float(found.max()) > 10 * float(found.min()):  # type: ignore[arg-type]
        axes.set_xscale("log")
