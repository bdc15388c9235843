"""What activity tells apart, layer by layer: the direction, its controls, and surprise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from artifacts.figure_schemas import ACTIVITY_LAYERS
from artifacts.schemas import polars_schema
from artifacts.store import Ref
from tasks.figures.activity import RANDOM, SHUFFLED, products_of
from tasks.numerics import activity as numerics
from tasks.numerics.intervals import clopper_pearson
from tasks.stage import Made, current, stage

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array = numerics.Array
Row = dict[str, Any]
_Column = tuple[Array, Array, Array, Array]  # scores of both answers, projections of both
ABOUT_TRUTH = ("false", "true")
COMPARISONS = (ABOUT_TRUTH, ("odd", "true"), ("false", "odd"))
SURPRISE, ALL = "surprise", "all"
_TAILS = (0.025, 0.975)


@stage("activity_layers", version=1, label=lambda **_: "what the scores tell apart, and controls")
def compare_answers(
    *, projections: Ref, scales: Ref, answers: Ref, pooling: str, resamples: int, seed: int
) -> Made:
    """Pair accuracy and AUROC of every state, of the direction, its controls, and surprise.

    A pair is right if the projection of `higher`, pooled as the pairs were, exceeds that of
    `lower`. The AUROC is of the answers' mean scores.
    """
    store = current().store
    table = store.read(answers, ["question", "condition", "kind", "n_tokens"])
    measured = _Measured(store.read(projections), store.read(scales), table, pooling)
    compare = _Comparer(resamples, seed)
    rows = [
        {"higher": higher, "lower": lower, "kind": kind, "n": len(up)} | row
        for (higher, lower), kind, up, down in _comparisons(table)
        for row in measured.rows(compare, up, down, kind == ALL and (higher, lower) == ABOUT_TRUTH)
    ]
    return Made(pl.DataFrame(rows, schema=polars_schema(ACTIVITY_LAYERS)))


def _comparisons(
    table: pl.DataFrame,
) -> Iterator[tuple[tuple[str, str], str, NDArray[np.int64], NDArray[np.int64]]]:
    """Which conditions are compared over which questions, and their answers' places by question."""
    placed = table.with_row_index("at").sort("question")
    there, kinds = set(table["condition"]), sorted(set(table["kind"]))
    for pair in COMPARISONS:
        if there.issuperset(pair):
            for kind in (ALL, *(kinds if len(kinds) > 1 else ())):
                own = placed if kind == ALL else placed.filter(pl.col("kind") == kind)
                up, down = (
                    own.filter(pl.col("condition") == name)["at"].cast(pl.Int64).to_numpy()
                    for name in pair
                )
                yield pair, kind, up, down


class _Measured:
    """What there is of every answer: mean scores, pooled projections, and mean surprise.

    `scores` and `projections` are [answers, states, directions], `surprise` is [answers].
    """

    def __init__(
        self, frame: pl.DataFrame, scale: pl.DataFrame, table: pl.DataFrame, pooling: str
    ) -> None:
        products = products_of(frame)
        shape = products.shape[:0:-1]
        mean, self.deviation = (
            scale[name].to_numpy().reshape(shape).T for name in ("mean", "deviation")
        )
        counts = table["n_tokens"].to_numpy()
        ends = np.cumsum(counts)

        def averaged(values: Array) -> Array:
            total = np.add.reduceat(values, ends - counts, axis=0)
            found: Array = total / counts.reshape(-1, *[1] * (values.ndim - 1))
            return found

        self.scores = averaged(numerics.activity_scores(products, mean, self.deviation))
        self.projections = products[ends - 1] if pooling == "last" else averaged(products)
        self.surprise = averaged(frame.filter(pl.col("state") == 0)["surprise"].to_numpy())
        names = scale.filter(pl.col("state") == 0)["direction"].to_list()
        self.places = {
            name: [at for at, other in enumerate(names) if other == name]
            for name in dict.fromkeys(names)
        }

    def rows(
        self,
        compare: _Comparer,
        up: NDArray[np.int64],
        down: NDArray[np.int64],
        with_controls: bool,
    ) -> Iterator[Row]:
        """Surprise, then every direction and state; control directions where they are wanted."""
        nats = (self.surprise[up], self.surprise[down])
        yield {"direction": SURPRISE, "state": None, "draws": 1} | compare.one(*nats, *nats)
        for name, draws in self.places.items():
            control = name in (RANDOM, SHUFFLED)
            if control and not with_controls:
                continue
            for state in range(self.scores.shape[1]):
                there = [at for at in draws if self.deviation[state, at] > 0]
                columns = [self._column(up, down, state, at) for at in there]
                found = compare.draws(columns) if control else compare.only(columns)
                yield {"direction": name, "state": state, "draws": len(there)} | found

    def _column(
        self, up: NDArray[np.int64], down: NDArray[np.int64], state: int, direction: int
    ) -> _Column:
        scores = self.scores[:, state, direction]
        along = self.projections[:, state, direction]
        return scores[up], scores[down], along[up], along[down]


class _Comparer:
    """Compares two answers to the same questions along one direction, or along draws of one."""

    def __init__(self, resamples: int, seed: int) -> None:
        self._resamples, self._seed = resamples, seed

    def only(self, columns: Sequence[_Column]) -> Row:
        """The one direction, if the state has a scale along it."""
        return self.one(*columns[0]) if columns else {}

    def one(self, up: Array, down: Array, up_along: Array, down_along: Array) -> Row:
        """Counts with exact intervals, AUROC with a bootstrap one."""
        right, n = int((up_along > down_along).sum()), len(up)
        pairs = clopper_pearson(right, n) if (up_along != down_along).any() else None
        ends = numerics.auroc_interval(up, down, resamples=self._resamples, seed=self._seed)
        return _row(right, n, pairs, numerics.auroc(up, down), ends)

    def draws(self, columns: Sequence[_Column]) -> Row:
        """Means over the draws of a control, and the range that 95 % of them lie in."""
        if not columns:
            return {}
        right = np.array([(up > down).sum() for _, _, up, down in columns])
        areas = np.array([numerics.auroc(up, down) for up, down, _, _ in columns])
        n, tied = len(columns[0][0]), all((up == down).all() for _, _, up, down in columns)
        pairs = None if tied else np.quantile(right / n, _TAILS)
        return _row(float(right.mean()), n, pairs, float(areas.mean()), np.quantile(areas, _TAILS))


def _row(right: float, n: int, pairs: Any, area: float, areas: Any) -> Row:
    """A row's numbers; `pairs` is None where every pair is a tie, as it is in a state that has
    seen one token only."""
    found = {"auroc": float(area), "auroc_low": float(areas[0]), "auroc_high": float(areas[1])}
    if pairs is None:
        return found
    ends = {"accuracy_low": float(pairs[0]), "accuracy_high": float(pairs[1])}
    return found | {"right": float(right), "accuracy": float(right) / n} | ends
