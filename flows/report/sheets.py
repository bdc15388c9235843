"""Tables as a page shows them: what is read, what is sorted by, and the SQL it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.display import number

Row = Mapping[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is read.
        value: what it is sorted by, and the whole number behind a rounded text; None: the text.
        note: small print, an interval say.
        bar: (low, value, high) of a rate, 0-1, drawn under the text.
    """

    text: str
    value: float | None = None
    note: str = ""
    bar: tuple[float, float, float] | None = None

    @property
    def known(self) -> bool:
        return self.value is not None and not math.isnan(self.value)


@dataclass(frozen=True)
class Heading:
    """The head of a column; `words`: text, sorted as such and set to the left."""

    text: str
    words: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Line:
    """A row; `marks` are CSS classes."""

    cells: Sequence[Cell]
    marks: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table with its title, the SQL that made it, and remarks."""

    name: str
    title: str
    headings: Sequence[Heading]
    lines: Sequence[Line]
    sql: str
    remarks: Sequence[str] = field(default_factory=tuple)


def words(text: object) -> Cell:
    return Cell("–" if text is None or text == "" else str(text))


def count(value: int | None) -> Cell:
    return Cell("–" if value is None else f"{value:,}".replace(",", "\u202f"), _float(value))


def amount(value: float | None, form: str = "") -> Cell:
    """A number as the terminal shows it, or in a format of Python's."""
    if value is None or math.isnan(value):
        return Cell("–", math.nan)
    return Cell(format(value, form) if form else number(value), value)


def rate(k: int | None, n: int | None, interval: Interval, at_least: bool = False) -> Cell:
    """A count of prompts with the interval of its rate; `at_least`: not all were answered."""
    if k is None:
        return Cell("–", math.nan)
    text = f"{'≥' if at_least else ''}{k}/{'?' if n is None else n}"
    low, high = interval
    if math.isnan(low) or not n:
        return Cell(text, k)
    return Cell(text, k, f"{percent(low)}–{percent(high)}\u00a0%", (low, k / n, high))


def mean(value: float | None, interval: Interval) -> Cell:
    """A mean with its interval."""
    low, high = interval
    cell = amount(value)
    return cell if math.isnan(low) else Cell(cell.text, cell.value, f"{bound(low)}–{bound(high)}")


def change(value: float, interval: Interval | None, form: str) -> Cell:
    """A difference with its sign and its interval."""
    text, *ends = (format(number, form).replace("-", "−") for number in (value, *(interval or ())))
    return Cell(text, value, " to ".join(ends))


def percent(fraction: float) -> str:
    """A fraction in per cent with one decimal, without the sign."""
    return f"{100 * fraction:.1f}"


def bound(value: float) -> str:
    """An end of an interval: three decimals, or what a smaller number needs."""
    return f"{value:.3f}" if value >= 0.01 or value == 0 else number(value)


def size(n: float | None) -> Cell:
    """Bytes, in units of 1000."""
    if n is None:
        return Cell("–", math.nan)
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    found = next(((f"{n / by:.1f} {unit}") for unit, by in units if n >= by), f"{n:.0f} B")
    return Cell(found, n)


def _float(value: int | None) -> float | None:
    return math.nan if value is None else float(value)
