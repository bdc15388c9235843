"""Judges are asked about stored responses, each distinct one once, and every answer is kept.

A response is known by its prompt and a digest of its text, so two trials that answer alike cost one
question. Answers are stored in small artifacts while a judge is still being asked: what interrupts
it loses nothing that was answered, and the next call asks about the rest alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import polars as pl

from artifacts.catalog import ask, query_text
from artifacts.errors import CorruptArtifact, StoreError
from artifacts.keys import Json, digest
from artifacts.schemas import JUDGEMENTS, polars_schema
from artifacts.store import Store
from tasks.stage import Made, Runtime, running, stage

Progress = Callable[[int, int], None]
Pair = tuple[str, str]  # prompt_id and response_digest
VERDICT = ("refused", "score", "truncated", "reply")


@dataclass(frozen=True)
class Item:
    """A prompt and one response to it.

    `prompt` is None where the store has lost the prompt's text.
    """

    prompt_class: str
    prompt_id: str
    response_digest: str
    prompt: str | None
    response: str

    @property
    def pair(self) -> Pair:
        """What tells it from all others."""
        return self.prompt_id, self.response_digest


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a response: `refused` is None where it cannot tell."""

    refused: bool | None
    score: float | None = None
    truncated: bool = False
    reply: str | None = None


@dataclass(frozen=True)
class Answer:
    """A stored verdict, and the number of times its labeller had answered before."""

    verdict: Verdict
    number: int


class Judge(Protocol):
    """What can be asked.

    Attributes:
        labeller: its name beside those of other labellers; two judges that could differ in any
            verdict have different ones.
        identity: all that decides its verdicts.
        kept_together: answers that are stored as one artifact.
    """

    @property
    def labeller(self) -> str: ...
    @property
    def identity(self) -> Mapping[str, Json]: ...
    @property
    def kept_together(self) -> int: ...

    def derived(self, stored: Mapping[str, Mapping[Pair, Answer]]) -> dict[Pair, Verdict]:
        """Verdicts that follow from answers stored under names that differ after '>'."""
        ...

    def ask(self, items: Sequence[Item]) -> Generator[tuple[Item, Verdict]]:
        """The verdict on each item, in any order, as soon as it is there."""
        ...


@dataclass(frozen=True)
class Asked:
    """What became of one call: responses of the study, how many were asked about, and faults."""

    responses: int
    asked: int
    truncated: int
    unclear: int


def response_digest(response: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a response, as views compute it."""
    return hashlib.sha256(response.encode()).hexdigest()[:16]


def distinct_responses(store: Store, study: str) -> list[Item]:
    """Every distinct response of a study, in a fixed order."""
    rows = ask(store, query_text("distinct_responses"), [study]).rows
    return [Item(*row) for row in rows]


def judge_responses(
    store: Store, judge: Judge, items: Sequence[Item], on_progress: Progress = lambda *_: None
) -> Asked:
    """Ask a judge about each item that it has not been asked about, and keep its answers.

    One process at a time asks a judge; another waits and finds the answers.

    Raises:
        JudgeError: it cannot be asked; what it answered until then is kept.
        StoreError: the store cannot be written.
    """
    with store.lock("judges", digest([judge.labeller])[:32]):
        stored = read_judgements(store, judge.labeller)
        done = {pair: answer.verdict for pair, answer in stored.get(judge.labeller, {}).items()}
        todo = [item for item in items if item.pair not in done]
        derived = judge.derived(stored) if todo else {}
        follow = [(item, derived[item.pair]) for item in todo if item.pair in derived]
        if follow:
            keep_verdicts(store, judge.labeller, judge.identity, follow)
        ask = [item for item in todo if item.pair not in derived]
        done |= derived | _ask(store, judge, ask, on_progress)
    told = [done[item.pair] for item in items]
    return Asked(
        responses=len(items),
        asked=len(ask),
        truncated=sum(verdict.truncated for verdict in told),
        unclear=sum(verdict.refused is None for verdict in told),
    )


def _ask(
    store: Store, judge: Judge, items: list[Item], on_progress: Progress
) -> dict[Pair, Verdict]:
    """Ask about all items; whatever ends this, what was answered is stored."""
    if not items:
        return {}
    on_progress(0, len(items))
    told: dict[Pair, Verdict] = {}
    unkept: list[tuple[Item, Verdict]] = []

    def keep() -> None:
        if unkept:
            keep_verdicts(store, judge.labeller, judge.identity, unkept)
            unkept.clear()

    answers = judge.ask(items)
    try:
        for item, verdict in answers:
            unkept.append((item, verdict))
            told[item.pair] = verdict
            if len(unkept) >= judge.kept_together:
                keep()
            on_progress(len(told), len(items))
    finally:
        keep()
        answers.close()
    return told


def keep_verdicts(
    store: Store,
    labeller: str,
    identity: Mapping[str, Json],
    answers: Sequence[tuple[Item, Verdict]],
    number: int = 0,
) -> None:
    """Store answers as one artifact. `number` tells a later answer to the same from an earlier."""
    rows = [
        {
            "prompt_id": item.prompt_id,
            "response_digest": item.response_digest,
            "labeller": labeller,
            **asdict(verdict),
            "number": number,
        }
        for item, verdict in sorted(answers, key=lambda answer: answer[0].pair)
    ]
    with running(Runtime(store)):
        judgements(judge={"labeller": labeller, **identity}, rows=rows)


@stage(
    "judgements",
    version=1,
    identify={"rows": lambda rows: digest(rows)},
    label=lambda judge, rows: f"{len(rows)} answers of {judge['labeller']}",
)
def judgements(*, judge: Mapping[str, Json], rows: list[dict[str, Any]]) -> Made:
    """Answers of a judge, as they came."""
    table = pl.DataFrame(rows, schema=polars_schema(JUDGEMENTS))
    return Made(table, {"labeller": judge["labeller"]})


def read_judgements(store: Store, name: str | None = None) -> dict[str, dict[Pair, Answer]]:
    """Each labeller's last answer to each pair; what is damaged is in none of them.

    Args:
        name: what a labeller is called, or begins with before '>'; None: all labellers.
    """
    found: dict[str, dict[Pair, Answer]] = {}
    for manifest in store.manifests("judgements"):
        labeller = str(manifest.notes["labeller"])
        if name is not None and labeller.split(">")[0] != name.split(">")[0]:
            continue
        with suppress(CorruptArtifact):
            of = found.setdefault(labeller, {})
            for row in store.read(manifest.ref).to_dicts():
                answer = Answer(Verdict(**{n: row[n] for n in VERDICT}), row["number"])
                pair = row["prompt_id"], row["response_digest"]
                of[pair] = max(of.get(pair, answer), answer, key=lambda one: one.number)
    return {labeller: found[labeller] for labeller in sorted(found)}


def prompt_of(item: Item) -> str:
    """The text of an item's prompt.

    Raises:
        StoreError: the store has lost it.
    """
    if item.prompt is None:
        raise StoreError(
            f"the text of prompt '{item.prompt_id}' is no longer in the store; run its config "
            "again, or choose a judge that reads responses only"
        )
    return item.prompt
