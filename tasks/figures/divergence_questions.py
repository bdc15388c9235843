"""Questions with gold answers, out of a column or out of ProofWriter's format."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from artifacts.errors import PromptError
from artifacts.figure_schemas import DIVERGENCE_QUESTIONS
from artifacts.schemas import polars_schema
from artifacts.specs import PromptSource
from tasks.numerics.answers import words
from tasks.prompt_sources import prompt_id, read_prompts, read_values, source_identity
from tasks.stage import Made, current, stage

VERDICTS = ("True", "False", "Unknown")  # of ProofWriter, open world
PROOFWRITER = "{theory}\n\nGiven this, is the next statement true, false or unknown? {question}"


@dataclass(frozen=True)
class Question:
    """One question: its row, the user's turn, the gold answer, its kind and topic."""

    row: int
    text: str
    gold: str
    kind: str
    topic: str


@stage(
    "divergence_questions",
    version=1,
    identify={"source": source_identity},
    label=lambda split, **_: f"questions, {split} split",
)
def read_questions(
    *, split: str, source: PromptSource, form: str, gold: str, kind: str | None
) -> Made:
    """The distinct questions of a source; equal ones with equal gold answers are counted once.

    Raises:
        PromptError: the source cannot be read as asked, a gold answer is missing or is none, or
            one question has two gold answers.
    """
    read_prompts(source)  # text cells are text, or it says which is not
    found: dict[str, Question] = {}
    copies = 0
    questions = (
        _of_proofwriter(source) if form == "proofwriter" else _of_columns(source, gold, kind)
    )
    for question in questions:
        name = prompt_id(question.text, source.system_prompt)
        known = found.setdefault(name, question)
        if words(known.gold) != words(question.gold):
            raise PromptError(
                f"rows {known.row} and {question.row} of '{source.source}' ask the same and have "
                f"the gold answers '{known.gold}' and '{question.gold}'; take one out"
            )
        copies += known is not question
    if copies:
        current().reporter.said(f"{split}: {copies} questions that were there already left out")
    table = [
        {
            "split": split,
            "prompt_id": name,
            "row": question.row,
            "text": question.text,
            "system_prompt": source.system_prompt,
            "gold": question.gold,
            "kind": question.kind,
            "topic": question.topic,
        }
        for name, question in found.items()
    ]
    frame = pl.DataFrame(table, schema=polars_schema(DIVERGENCE_QUESTIONS))
    return Made(frame, {"duplicates_removed": copies})


def _of_columns(source: PromptSource, gold: str, kind: str | None) -> Iterator[Question]:
    """A text column, a column of gold answers and perhaps one of kinds; each its own topic."""
    text = source.column or "text"
    for row, cells in read_values(source, [text, gold, *([kind] if kind else [])]):
        asked = _turn(source, str(cells[text]))
        answer = _gold(source, row, cells[gold])
        named = "" if kind is None or cells[kind] is None else str(cells[kind])
        yield Question(row, asked, answer, named, prompt_id(asked, source.system_prompt))


def _of_proofwriter(source: PromptSource) -> Iterator[Question]:
    """A theory with its questions in one object, or a row per question; a theory is a topic."""
    theory = source.column or "theory"
    rows = read_values(source, [theory], ["questions", "question", "answer", "QDep"])
    for row, cells in rows:
        text = str(cells[theory]).strip()
        topic = hashlib.sha256(text.encode()).hexdigest()[:16]
        for asked in _asked(source, row, cells):
            verdict = _gold(source, row, asked.get("answer")).capitalize()
            if verdict not in VERDICTS:
                raise PromptError(
                    f"row {row} of '{source.source}' has the answer '{asked.get('answer')}'; "
                    f"ProofWriter's are {', '.join(VERDICTS)}"
                )
            depth = asked.get("QDep")
            whole = PROOFWRITER.format(theory=text, question=str(asked["question"]).strip())
            named = "" if depth is None else f"depth {depth}"
            yield Question(row, _turn(source, whole), verdict, named, topic)


def _asked(source: PromptSource, row: int, cells: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The questions of one row."""
    nested = cells.get("questions")
    if isinstance(nested, Mapping):
        nested = list(nested.values())
    found = [cells] if nested is None else [each for each in nested if each is not None]
    for each in found:
        if not isinstance(each, Mapping) or not isinstance(each.get("question"), str):
            raise PromptError(
                f"row {row} of '{source.source}' has no question; ProofWriter's rows have "
                "'theory' and 'questions', or 'theory', 'question' and 'answer'"
            )
    return found


def _gold(source: PromptSource, row: int, value: object) -> str:
    """A gold answer as text; one that has no word is an error."""
    text = "" if value is None else str(value).strip()
    if not words(text):
        raise PromptError(f"row {row} of '{source.source}' has no gold answer")
    return text


def _turn(source: PromptSource, text: str) -> str:
    """The user's turn: a text between prefix and suffix, in normal form."""
    cell = unicodedata.normalize("NFC", text).strip()
    return unicodedata.normalize("NFC", source.prefix + cell + source.suffix)
