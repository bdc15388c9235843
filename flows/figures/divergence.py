"""The figure `divergence`: its artifacts in order, and what they say."""

from __future__ import annotations

from collections.abc import Sequence

from artifacts.figure_specs import FigureConfig
from artifacts.store import Store
from flows.figures.figure import Figure, FigureRun, Section


def run(config: FigureConfig) -> FigureRun:
    """Ask for every artifact of the figure."""
    return FigureRun({}, {})


def sections(store: Store, found: FigureRun) -> Sequence[Section]:
    """What a finished run says."""
    return []


FIGURE = Figure("divergence", run, sections)
