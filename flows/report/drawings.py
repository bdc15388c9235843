"""The same plots without a script: matplotlib's SVG, for readers that run none."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from flows.report.plots import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#767676"  # to be read on white and on black
COLOURS = {
    "@blue": "#3a8fc7", "@orange": "#d9702a", "@green": "#1f9e78", "@purple": "#bb5fae",
    "@gold": "#b08d1e", "@grey": "#8a8a8a",
}  # fmt: skip
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "x": "x", "triangle-up": "^", "star": "*"}
DASHES = {"dot": ":", "dash": "--"}


def drawing(plot: Plot) -> str:
    """A plot as an <svg> element that scales with the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": f"tribunal-{plot.name}",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.2, 3.4))
        figure.subplots_adjust(left=0.1, right=0.98, bottom=0.15, top=0.97)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for trace in plot.traces:
            _draw(axes, trace)
        if plot.log_x:
            axes.set_xscale("log")
        if plot.log_y:
            axes.set_yscale("log")
        axes.set_xlabel(plot.x)
        axes.set_ylabel(plot.y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, labelcolor=INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    found = re.search(r"<svg\b.*</svg>", buffer.getvalue(), flags=re.DOTALL)
    if found is None:
        raise ValueError(f"matplotlib drew no SVG of '{plot.name}'")
    # Names inside an SVG are those of the whole page: each drawing gets its own.
    own = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", found[0])
    return re.sub(
        r'<svg\b[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', own, count=1
    )


def _draw(axes: Axes, trace: dict[str, Any]) -> None:
    line, marker = trace.get("line", {}), trace.get("marker", {})
    lines, markers = "lines" in trace["mode"], "markers" in trace["mode"]
    named = trace.get("showlegend", True)
    axes.plot(
        trace["x"],
        [float("nan") if y is None else y for y in trace["y"]],
        linestyle=DASHES.get(line.get("dash", ""), "-") if lines else "none",
        linewidth=line.get("width", 1),
        drawstyle="steps-post" if line.get("shape") == "hv" else "default",
        marker=MARKERS[marker["symbol"]] if markers else None,
        markersize=0.7 * marker.get("size", 6),
        color=COLOURS[line.get("color") or marker["color"]],
        alpha=trace.get("opacity", 1),
        label=trace["name"] if named else None,
    )
