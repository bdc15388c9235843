"""Every labeller over the distinct responses of a study, and how far each two of them agree.

Keyword labellers are computed on the spot; what judges said is read from the store. The unit is a
distinct response to a prompt, however many trials gave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from artifacts.store import Store
from tasks.judges.asking import Item, Pair, read_judgements
from tasks.numerics.agreement import Agreement, agreement
from tasks.numerics.labels import LABELLERS, is_refusal

Labels = Mapping[Pair, bool | None]
ALL = "all"
CLASSES = ("harmful", "harmless", "borderline")


@dataclass(frozen=True)
class Compared:
    """Two labellers on the responses of one class, or of all; `unclear` ones are left out."""

    labeller_a: str
    labeller_b: str
    prompt_class: str
    unclear: int
    found: Agreement


def labels_of(store: Store, items: Sequence[Item]) -> dict[str, Labels]:
    """What each labeller says of the responses, by labeller and pair; None where it is unclear."""
    found: dict[str, dict[Pair, bool | None]] = {
        name: {item.pair: is_refusal(name, item.response) for item in items} for name in LABELLERS
    }
    pairs = {item.pair for item in items}
    for labeller, answers in read_judgements(store).items():
        of = {pair: answer.verdict.refused for pair, answer in answers.items() if pair in pairs}
        if of:
            found[labeller] = of
    return dict(found)


def compare_all(
    items: Sequence[Item], labels: Mapping[str, Labels], among: Sequence[str] = ()
) -> Iterator[Compared]:
    """Every two labellers, on all responses and per class that both labelled something of.

    Args:
        among: if given, one of the two is always among these.
    """
    for a, b in combinations(labels, 2):
        if among and not {a, b} & set(among):
            continue
        for name in (ALL, *CLASSES):
            of = [item for item in items if name in (ALL, item.prompt_class)]
            compared = _compare(a, b, name, of, labels)
            if compared.found.responses or compared.unclear:
                yield compared


def _compare(
    a: str, b: str, name: str, items: Sequence[Item], labels: Mapping[str, Labels]
) -> Compared:
    met = [item for item in items if item.pair in labels[a] and item.pair in labels[b]]
    said = [(item, labels[a][item.pair], labels[b][item.pair]) for item in met]
    clear = [(item, x, y) for item, x, y in said if x is not None and y is not None]
    found = agreement(
        np.array([x for _, x, _ in clear], dtype=bool),
        np.array([y for _, _, y in clear], dtype=bool),
        np.array([item.prompt_id for item, _, _ in clear], dtype=np.str_),
    )
    return Compared(a, b, name, len(said) - len(clear), found)
