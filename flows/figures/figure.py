"""What a figure is to commands and flows: its artifacts in order, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from artifacts.figure_specs import FigureConfig
from artifacts.store import Ref, Store

ABOUT = {  # here, so that --help loads no figure
    "heads": "Safety heads: which attention heads carry refusal, and what random ones would.",
    "norms": "Hidden-state norms over layers and positions: benign, jailbreak, difference.",
    "activity": "A direction's activity over layers and generated tokens, as a surface and a map.",
    "divergence": "Entropy against Jensen-Shannon divergence of answers, right and wrong.",
}


@dataclass(frozen=True)
class FigureRun:
    """References to what a figure is made of.

    Attributes:
        tables: the numbers, by name.
        pictures: PNG, SVG and HTML, by file name.
    """

    tables: Mapping[str, Ref]
    pictures: Mapping[str, Ref]


@dataclass(frozen=True)
class Section:
    """A table of an answer: rows as data, in columns that fit 80 characters.

    `note` is a line under it: the definition, whose it is, what a control says.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """One of the figures.

    Attributes:
        name: command, flow and table of the config.
        run: asks for every artifact.
        sections: what a finished run says; reads the store alone.
    """

    name: str
    run: Callable[[FigureConfig], FigureRun]
    sections: Callable[[Store, FigureRun], Sequence[Section]]


def figure_named(name: str) -> Figure:
    """The figure of a command: FIGURE of the module of this name."""
    found: Figure = import_module(f"flows.figures.{name}").FIGURE
    return found
