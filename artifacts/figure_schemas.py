"""The tables of the four figures: every stored column with its type, meaning and unit.

A kind listed in FIGURES is typed, checked and shown as a view of the same name.
"""

from __future__ import annotations

from artifacts.columns import Column

# --- heads

# --- norms

# --- activity

# --- divergence

FIGURES: dict[str, tuple[Column, ...]] = {
    # heads
    # norms
    # activity
    # divergence
}
