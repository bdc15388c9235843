"""What the trials so far tell the next generation: the sampler, the race and the drafts.

All of it is read from stored generations and from nothing else. So a search that goes on in another
process, or elsewhere, goes on exactly as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts.schemas import PARAMETERS
from artifacts.specs import GatesSpec, SearchSpec
from artifacts.store import Ref
from tasks.hearing import Lost
from tasks.judging import Bench, Row, mean_tokens, metrics, outcome
from tasks.numerics.objective import Outcome, objective_values
from tasks.numerics.racing import LARGEST_BEST_GROUP, Place, Race, place_of
from tasks.stage import current

ROWS_KEPT = 64  # labelled responses per prompt, on average
PARAMETER_NAMES = tuple(column.name for column in PARAMETERS)


def told(
    previous: Ref | None, search: SearchSpec, base: Outcome
) -> list[tuple[dict[str, Any], tuple[float, ...]]]:
    """Parameters and objective values of every earlier trial, in order.

    A stopped trial is told at its best. Either that is all the objective looks at, or enough others
    are ahead of it for it to be in no best group, of which the sampler reads the parameters alone.
    """
    return [
        ({name: row[name] for name in PARAMETER_NAMES}, values_of(outcome(row), search, base))
        for row in _judged(previous)
    ]


@dataclass(frozen=True)
class _Lost:
    """A race in a search's own values."""

    race: Race
    values: Callable[[Outcome], tuple[float, ...]]

    @property
    def early(self) -> bool:
        return self.race.early

    def __call__(self, best: Outcome, worst: Outcome) -> bool:
        known = best.refusals == worst.refusals
        values = self.values(best), self.values(worst)
        return self.race.lost(*values, place_of(best), harmful_known=known)


def race(previous: Ref | None, search: SearchSpec, base: Outcome) -> Lost | None:
    """Tells whether a trial of the next generation is lost; None if none is raced."""
    if not search.racing:
        return None
    earlier = list(_judged(previous))
    run = new_race(
        search,
        [values_of(outcome(row), search, base) for row in earlier if _is_final(row, search)],
        [place_of(outcome(row)) for row in earlier],
    )
    return _Lost(run, lambda found: values_of(found, search, base))


def new_race(
    search: SearchSpec, values: Sequence[tuple[float, ...]], places: Sequence[Place]
) -> Race:
    """What a newcomer to a search races against: values that are final, places at best."""
    group = 0 if search.sampler == "random" else search.best_group or LARGEST_BEST_GROUP
    return Race(values, places, group, search.finalists, reads_refusals=search.sampler == "gp")


def _is_final(row: Mapping[str, Any], search: SearchSpec) -> bool:
    """Whether the objective's values of a trial are known, not only bounded."""
    harmful_known = bool(row["answered_harmful"] == row["n_harmful"])
    return not row["stopped"] or (search.objective == "heretic" and harmful_known)


def values_of(found: Outcome, search: SearchSpec, base: Outcome) -> tuple[float, ...]:
    """What a search minimises of an outcome; for a model of it, gate, counts and KL apart."""
    if search.sampler == "gp":
        return tuple(float(value) for value in place_of(found))
    return objective_values(
        search.objective,
        found,
        base,
        target_kl=search.target_kl,
        weights=search.objective_weights,
    )


def base_outcome(rows: Sequence[Row], gates: GatesSpec) -> Outcome:
    """The unedited model's outcome, from its answers."""
    return outcome(metrics(rows, mean_tokens(rows), gates))


def learn_drafts(bench: Bench, baseline: Ref, previous: Ref | None) -> None:
    """Tell the bench's drafts what the unedited model and every earlier trial answered."""
    known, wanted = bench.known, [baseline, *chain(previous)]
    if not known.learnt or known.learnt != [ref.digest for ref in wanted[: len(known.learnt)]]:
        known.drafts.forget()
        known.learnt.clear()
    if len(known.rows) > ROWS_KEPT * bench.prompts.height:
        known.rows.clear()
    for ref in wanted[len(known.learnt) :]:
        known.drafts.learn(_responses(bench, ref))
        known.learnt.append(ref.digest)


def recall(
    bench: Bench, previous: Ref | None, trials: Sequence[int | None]
) -> list[dict[int, Row]]:
    """What each of these earlier trials answered, by prompt."""
    places = _places(bench)
    found: dict[int, dict[int, Row]] = {}
    for ref in chain(previous):
        numbers = {row["trial"] for row in _rows(ref)}
        if numbers.isdisjoint(trials):
            continue
        for row in current().store.read(ref, ["trial", "responses"]).to_dicts():
            told = {places[each["class"], each["prompt_id"]]: each for each in row["responses"]}
            found[row["trial"]] = told
    return [found[number] for number in trials if number is not None]


def chain(last: Ref | None) -> Sequence[Ref]:
    """All generations up to `last`, oldest first."""
    found = []
    while last is not None:
        found.append(last)
        if last not in _before:
            told = current().store.manifest(last.kind, last.key).inputs.get("previous")
            _before[last] = Ref(told["kind"], told["key"], told["digest"]) if told else None
        last = _before[last]
    return found[::-1]


_before: dict[Ref, Ref | None] = {}


def _judged(previous: Ref | None) -> Iterator[Mapping[str, Any]]:
    """Rows of every earlier trial, in order, each read once per process: artifacts never change."""
    for ref in chain(previous):
        yield from _rows(ref)


def _rows(ref: Ref) -> list[dict[str, Any]]:
    if ref.digest not in _read:
        _read[ref.digest] = current().store.read(ref).drop("responses").to_dicts()
    return _read[ref.digest]


_read: dict[str, list[dict[str, Any]]] = {}


def _responses(bench: Bench, ref: Ref) -> list[tuple[int, list[int]]]:
    """Prompt and tokens of every stored response of an artifact."""
    from tasks.models.rendering import encode

    frame = current().store.read(ref)
    answers = [
        answer
        for trial in (frame["responses"].to_list() if "responses" in frame else [frame.to_dicts()])
        for answer in trial
    ]
    places = _places(bench)
    texts = sorted({answer["response"] for answer in answers})
    tokens = dict(zip(texts, encode(bench.loaded.tokenizer, texts), strict=True))
    end = sorted(bench.engine.eos)[:1]
    return [
        (
            places[answer["class"], answer["prompt_id"]],
            tokens[answer["response"]] + (end if answer["ended"] else []),
        )
        for answer in answers
    ]


def _places(bench: Bench) -> dict[tuple[str, str], int]:
    """Where each prompt of a split is, by class and prompt_id."""
    names = bench.prompts.select("class", "prompt_id").iter_rows()
    return {(prompt_class, name): index for index, (prompt_class, name) in enumerate(names)}
