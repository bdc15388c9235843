"""The leaderboard: every trial of a study in the strict order, as one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence

from artifacts.catalog import leaderboard_frame
from artifacts.schemas import LEADERBOARD
from artifacts.store import Ref
from tasks.stage import Made, current, stage
from tasks.trials import read_trials


@stage("leaderboards", version=2, label=lambda **_: "leaderboard")
def rank_trials(*, generations: Sequence[Ref], selection: Ref, test: Ref) -> Made:
    """The strict ranking of every split."""
    ranked = leaderboard_frame(read_trials([*generations, selection, test]))
    return Made(ranked.select([column.name for column in LEADERBOARD]))


@stage("figures", version=2, data="figure.png", label=lambda **_: "figure")
def draw_trials(*, leaderboard: Ref) -> Made:
    """Refusals against KL of every trial, with the Pareto front: a PNG."""
    from tasks.plots import plot_trials

    return Made(plot_trials(current().store.read(leaderboard)))
