"""The worked questions of artifacts/sql/questions: SQL that answers what researchers ask first.

A file's name is the question's; its first comment line asks, the others say how to read the answer.
All are users' SQL: one SELECT over the documented views, which the sandbox lets through.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from artifacts.errors import QueryError, did_you_mean

FOLDER = "questions"  # of artifacts/sql, and the schema that holds them in a database file


@dataclass(frozen=True)
class Question:
    """One worked question.

    Attributes:
        asks: the question in words.
        reading: how to read the answer.
        sql: the whole file, comments included.
    """

    name: str
    asks: str
    reading: str
    sql: str

    @property
    def view(self) -> str:
        """Its name as a view, which has no hyphens."""
        return self.name.replace("-", "_")


def questions() -> list[Question]:
    """All of them, by name."""
    files = resources.files("artifacts").joinpath("sql", FOLDER).iterdir()
    texts = {file.name.removesuffix(".sql"): file.read_text() for file in files}
    return [_parsed(name, texts[name]) for name in sorted(texts)]


def question(name: str) -> Question:
    """One of them.

    Raises:
        QueryError: there is none of this name.
    """
    known = {each.name: each for each in questions()}
    if name not in known:
        raise QueryError(f"no question '{name}'{did_you_mean(name, known)}")
    return known[name]


def _parsed(name: str, text: str) -> Question:
    lines = text.splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("-- "))
    asks, *reading = (line.removeprefix("-- ") for line in lines[:count])
    return Question(name, asks, " ".join(reading), text)
