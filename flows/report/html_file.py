"""An HTML file that loads nothing and trusts nothing that a model wrote.

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
from flows.report.plots import Plot

MARK = '<meta name="generator" content="tribunal report">'  # what says that a file is a report
# Controls but tab and line breaks; marks that turn or hide text; halves of surrogate pairs.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def drawn(plots: Mapping[str, Plot], advance: Callable[[int, int], None]) -> dict[str, str]:
    """Every plot as SVG, by name. `advance`: progress."""
    from flows.report.drawings import drawing

    drawings = {}
    for done, (name, plot) in enumerate(plots.items(), 1):
        drawings[name] = drawing(plot)
        advance(done, len(plots))
    return drawings


def fill(template: str, plots: Mapping[str, Plot], drawings: Mapping[str, str], **own: Any) -> str:
    """The file from a template of this folder.

    `drawings`: SVG by a plot's name, trusted as it is; `own`: the template's own values, among them
    title, facts and sections, all of them escaped.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    script, plotly = _text("page.js"), _plotly() if plots else ""
    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template(template).render(
        policy=Markup(_policy([plotly, script] if plots else [script])),
        style=Markup(_text("page.css")),
        script=Markup(script),
        plotly=Markup(plotly),
        data=Markup(_embedded(plots)) if plots else "",
        plots=plots,
        drawings={name: Markup(svg) for name, svg in drawings.items()},
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=metadata.version("tribunal"),
        **own,
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


def _text(name: str) -> str:
    """A file of this folder."""
    return resources.files("flows.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The script of the installed plotly, with the line breaks that a browser digests."""
    text = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text("utf-8")
    return text.replace("\r\n", "\n")
