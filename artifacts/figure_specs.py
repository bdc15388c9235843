"""Configs of the four figures: one TOML file, a model and a table for each figure that is wanted.

As in `artifacts.specs`, every field here can change a number, so every field is part of a key.
"""

from __future__ import annotations

from artifacts.specs import ModelSpec, Name, PromptSource, Seed, Spec


class HeadsSpec(Spec):
    """Safety heads: Ships, Generalized Ships and Sahara (arXiv 2410.13708)."""

    prompts: dict[Name, PromptSource]


class NormsSpec(Spec):
    """Hidden-state norms over layers and token positions (arXiv 2602.11495)."""

    benign: PromptSource
    jailbreak: PromptSource


class ActivitySpec(Spec):
    """A direction's activity over layers and generated tokens (arXiv 2310.01405)."""

    questions: PromptSource


class DivergenceSpec(Spec):
    """Entropy and Jensen-Shannon divergence of generated answers."""

    questions: PromptSource


class FigureConfig(Spec):
    """Everything that changes a figure."""

    name: Name = "figures"
    seed: Seed = 0
    model: ModelSpec
    heads: HeadsSpec | None = None
    norms: NormsSpec | None = None
    activity: ActivitySpec | None = None
    divergence: DivergenceSpec | None = None
