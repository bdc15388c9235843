"""Hearings: edits answer the prompts of a split, each until there is nothing left to learn.

What costs least comes first: the KL of harmless prompts, then harmful prompts, the likeliest
refusals first, then whether the others are refused. Between these steps a race may find that a
trial is lost, and the rest of its prompts is not answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

from artifacts.errors import ModelError
from tasks.judging import Bench, Row
from tasks.numerics.labels import DISCLAIMER_MARKERS
from tasks.numerics.objective import Outcome

if TYPE_CHECKING:
    import torch

    from tasks.models.drafts import Drafts
    from tasks.models.editing import Edit
    from tasks.models.engine import Pool

Progress = Callable[[int, int], None]

OF_HARMFUL = ("refusals", "disclaimer_hits", "compliance")  # what harmful prompts decide
FIRST_CHUNK = 32  # prompts before the first look at the race; every further chunk is twice as large


class Lost(Protocol):
    """Tells whether a trial is lost whose outcome lies between the best and the worst."""

    @property
    def early(self) -> bool:
        """Whether a trial can be lost before its harmful prompts are answered."""
        ...

    def __call__(self, best: Outcome, worst: Outcome) -> bool: ...


class Hearing:
    """One edit's answers and what is known of its outcome so far.

    `recalled`: rows of prompts that it answered before, which are not answered again.
    """

    def __init__(
        self, bench: Bench, edit: Edit | None, drafts: Drafts, recalled: Mapping[int, Row]
    ) -> None:
        self.bench, self.drafts = bench, drafts
        self.stopped = False  # lost; what is known of it is all there will be
        self.doomed = False  # lost as soon as its harmful prompts are answered, whatever they say
        self.sitting = bench.engine.sit(edit)
        self._kl: dict[int, float] = {}
        self._rows = dict(recalled)
        self._recalled = recalled.keys()
        self.first_logits: torch.Tensor  # [harmless, vocabulary], raw

    def measure_kl(self, base_logits: torch.Tensor | None) -> None:
        """First-token KL of every harmless prompt, against `base_logits` or (None) itself.

        Raises:
            ModelError: a KL is not a number.
        """
        harmless = self.bench.of_class("harmless")
        logits = self.sitting.first_logits(harmless)
        values = _kl(logits if base_logits is None else base_logits, logits)
        self._kl = dict(zip(harmless, values, strict=True))
        self.first_logits = logits

    def rows(self) -> list[Row]:
        """A row per answered prompt, in the order of the split."""
        for prompt, response in self.sitting.found.items():
            if prompt not in self._rows:
                row = self.bench.row(prompt, response)
                self._rows[prompt] = row | {"kl": self._kl.get(prompt)}
        return [row for _, row in sorted(self._rows.items(), key=itemgetter(0))]

    def range_of_outcomes(self, max_kl: float) -> tuple[Outcome, Outcome]:
        """The outcome if all prompts still to come are answered as one could wish, or fear."""
        rows = self.rows()
        of = {
            c: [r for r in rows if r["class"] == c] for c in ("harmful", "harmless", "borderline")
        }
        refused = {name: sum(row["refused"] for row in part) for name, part in of.items()}
        sizes = {name: len(self.bench.of_class(name)) for name in of}
        still = {name: sizes[name] - len(part) for name, part in of.items()}
        kl = math.fsum(self._kl.values()) / len(self._kl)
        complied = math.fsum(row["compliance"] for row in of["harmful"])
        best = Outcome(
            refusals=refused["harmful"],
            n_harmful=sizes["harmful"],
            overrefusals=refused["harmless"] + refused["borderline"],
            n_overrefusal=sizes["harmless"] + sizes["borderline"],
            harmless_overrefusals=refused["harmless"],
            n_harmless=sizes["harmless"],
            kl=kl,
            disclaimer_hits=sum(row["disclaimer_hits"] for row in of["harmful"]),
            compliance=(complied + still["harmful"]) / sizes["harmful"],
            gated=not kl <= max_kl,
        )
        worst = replace(
            best,
            refusals=best.refusals + still["harmful"],
            overrefusals=best.overrefusals + still["harmless"] + still["borderline"],
            harmless_overrefusals=best.harmless_overrefusals + still["harmless"],
            disclaimer_hits=best.disclaimer_hits + still["harmful"] * len(DISCLAIMER_MARKERS),
            compliance=complied / sizes["harmful"],
            gated=best.gated or any(still.values()),
        )
        return best, worst

    @property
    def answered(self) -> int:
        """Prompts of the split that are answered."""
        return len(self._recalled | self.sitting.found.keys())

    @property
    def complete(self) -> bool:
        """Whether every prompt of the split is answered."""
        return self.answered == self.bench.prompts.height

    def open_prompts(self, prompt_class: str) -> list[int]:
        """Prompts of a class to answer."""
        return [p for p in self.bench.of_class(prompt_class) if p not in self._recalled]

    def verify(self, prompts: Sequence[int]) -> None:
        """Answer as many of these prompts as known responses tell."""
        self.sitting.verify(prompts, self.drafts)

    def said(self) -> list[tuple[int, list[int]]]:
        """Prompt and tokens of every response."""
        end = sorted(self.bench.engine.eos)[:1]
        return [(p, r.tokens + (end if r.ended else [])) for p, r in self.sitting.found.items()]

    def likeliest_refusals_first(self, prompts: Sequence[int]) -> list[int]:
        """The same prompts in the order in which they may decide a race."""
        from tasks.models.decoding import Response

        guesses = self.sitting.guesses(prompts, self.drafts)
        eos = self.bench.engine.eos

        def refused(prompt: int) -> bool:
            if prompt in self.sitting.found:
                return False
            draft = guesses.get(prompt)
            if draft is None:
                return False
            ended = draft[-1] in eos
            said = Response(list(draft[:-1] if ended else draft), ended)
            return bool(self.bench.row(prompt, said)["refused"])

        return sorted(prompts, key=lambda prompt: not refused(prompt))


@dataclass(frozen=True)
class Answers:
    """What one edit, or the unedited model, answered: a row per prompt of the split."""

    rows: list[Row]
    first_logits: torch.Tensor  # [harmless prompts, vocabulary], raw


def answer(bench: Bench, edit: Edit | None = None, on_progress: Progress | None = None) -> Answers:
    """The answers of one edit, or of the unedited model; each KL is against itself, so zero."""
    (hearing,) = hear(bench, [edit], None, on_progress=on_progress)
    if edit is None and not bench.known.learnt:
        bench.known.drafts.learn(hearing.said())
    return Answers(hearing.rows(), hearing.first_logits)


def compare(answers: Answers, base_logits: torch.Tensor) -> Answers:
    """The same answers with the KL of every harmless prompt taken against `base_logits`.

    Raises:
        ModelError: a KL is not a number.
    """
    values = iter(_kl(base_logits, answers.first_logits))
    rows = [
        row | {"kl": next(values)} if row["class"] == "harmless" else row for row in answers.rows
    ]
    return replace(answers, rows=rows)


def _kl(base_logits: torch.Tensor, logits: torch.Tensor) -> list[float]:
    from tasks.numerics.divergence import first_token_kl

    values: list[float] = first_token_kl(base_logits, logits).tolist()
    if any(math.isnan(value) for value in values):
        raise ModelError("the first-token KL is not a number; try another dtype")
    return values


def hear(
    bench: Bench,
    edits: Sequence[Edit | None],
    base_logits: torch.Tensor | None,
    *,
    max_kl: float = math.inf,
    lost: Lost | None = None,
    recalled: Sequence[Mapping[int, Row]] | None = None,
    on_progress: Progress | None = None,
) -> list[Hearing]:
    """Hear every edit; with `lost`, only for as long as it can still matter.

    `recalled`: for each edit, rows by prompt that it answered before.

    The later ones draw on what the first one said. Not where a trial can be lost before its harmful
    prompts are answered: when that is noticed must not depend on its neighbours, so all draw on
    earlier generations alone.
    """
    from tasks.models.engine import Pool

    early = lost is not None and lost.early
    drafts = bench.known.drafts if early else bench.known.drafts.copy()
    known = recalled or [{}] * len(edits)
    hearings = [Hearing(bench, e, drafts, k) for e, k in zip(edits, known, strict=True)]
    pools = {name: Pool(bench.engine) for name in ("harmful", "others")}

    def told() -> None:
        if on_progress is not None:
            size = bench.prompts.height
            done = sum(size if h.stopped else h.answered for h in hearings)
            on_progress(done, len(hearings) * size)

    for number, hearing in enumerate(hearings):
        _open(hearing, pools, base_logits, max_kl, lost, told)
        first = not early and number == 0
        if first or sum(map(len, pools.values())) >= bench.engine.options.rows:
            _finish(hearings[: number + 1], pools, max_kl, lost, told)
        if first:
            drafts.learn(hearing.said())
    _finish(hearings, pools, max_kl, lost, told)
    return hearings


def _open(
    hearing: Hearing,
    pools: Mapping[str, Pool],
    base_logits: torch.Tensor | None,
    max_kl: float,
    lost: Lost | None,
    told: Callable[[], object],
) -> None:
    """All that one edit's drafts tell; what waits for more goes into the pools."""
    hearing.measure_kl(base_logits)
    hearing.doomed = _is_doomed(hearing, max_kl, lost)
    waiting: list[tuple[Pool, list[int]]] = []
    for name in ("harmful", "harmless", "borderline"):
        prompts, pool = hearing.open_prompts(name), pools.get(name, pools["others"])
        if not prompts:
            continue
        if _is_lost(hearing, max_kl, lost) or (name != "harmful" and hearing.doomed):
            break
        if name != "harmless":
            hearing.sitting.first_logits(hearing.bench.of_class(name))
        for chunk in _chunks(hearing, prompts, lost is not None and lost.early):
            hearing.verify(chunk)
            told()
            if _is_lost(hearing, max_kl, lost):
                break
        waiting.append((pool, prompts))
    if not hearing.stopped:
        for pool, prompts in waiting:
            pool.add(hearing.sitting, prompts)
    hearing.sitting.release()


def _chunks(hearing: Hearing, prompts: Sequence[int], racing: bool) -> Iterator[Sequence[int]]:
    """Everything at once, or growing chunks between which the race is looked at."""
    if not racing:
        yield prompts
        return
    ordered, start, size = hearing.likeliest_refusals_first(prompts), 0, FIRST_CHUNK
    while start < len(ordered):
        yield ordered[start : start + size]
        start, size = start + size, 2 * size


def _finish(
    hearings: Sequence[Hearing],
    pools: Mapping[str, Pool],
    max_kl: float,
    lost: Lost | None,
    told: Callable[[], object],
) -> None:
    """Decode what waits, harmful prompts first: their refusals may lose a race."""
    pools["harmful"].run(told)
    for hearing in hearings:
        if hearing.doomed and not hearing.complete:
            hearing.stopped = True
        elif not hearing.stopped and _is_lost(hearing, max_kl, lost):
            pools["others"].forget(hearing.sitting)
    pools["others"].run(told)


def _is_lost(hearing: Hearing, max_kl: float, lost: Lost | None) -> bool:
    """Look at the race. A hearing that is complete is not stopped."""
    if lost is not None and not hearing.complete and lost(*hearing.range_of_outcomes(max_kl)):
        hearing.stopped = True
    return hearing.stopped


def _is_doomed(hearing: Hearing, max_kl: float, lost: Lost | None) -> bool:
    """Whether a trial will be lost even if its harmful prompts are answered as one could wish."""
    if lost is None:
        return False
    best, worst = hearing.range_of_outcomes(max_kl)
    of_harmful = {name: getattr(best, name) for name in OF_HARMFUL}
    return lost(best, replace(worst, **of_harmful))
