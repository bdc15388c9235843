"""What all pictures share: colours, forms and bytes that are the same each time.

PNG and SVG come from matplotlib; HTML from plotly, with its script inside, so that a picture opens
without a network. Equal numbers give equal bytes.
"""

from __future__ import annotations

import io
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Form = Literal["png", "svg", "html"]
FORMS: tuple[Form, ...] = ("png", "svg", "html")
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a"
# For amounts viridis, for differences around zero RdBu_r: both print and suit colour-blind readers.
AMOUNTS, DIFFERENCES = "viridis", "RdBu_r"
DPI = 144


def new_figure(width: float, height: float) -> Figure:
    """An empty matplotlib figure of so many inches; nothing of pyplot's state is used."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def caption(figure: Figure, text: str) -> None:
    """Words under a picture: what is drawn, by which definition, and whose."""
    figure.supxlabel(text, fontsize=7, color="#444444", wrap=True, x=0.01, ha="left")


def image(figure: Figure, form: Literal["png", "svg"]) -> bytes:
    """A matplotlib figure as the bytes of a file."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    facts = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    with mpl.rc_context({"svg.hashsalt": "tribunal", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=form, metadata=facts)
    return buffer.getvalue()


STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;max-width:70rem;margin:1rem auto;padding:0 1rem}"
    "p{color:#444}"
)


def page(figure: Any, caption: str) -> bytes:
    """A plotly figure as one HTML file that needs nothing else, with words under it."""
    body = figure.to_html(
        full_html=False, include_plotlyjs=True, div_id="figure", config={"displaylogo": False}
    )
    head = f'<meta charset="utf-8"><title>Tribunal</title><style>{STYLE}</style>'
    inside = f"<head>{head}</head><body>{body}<p>{escape(caption)}</p></body>"
    return f'<!doctype html><html lang="en">{inside}</html>'.encode()
