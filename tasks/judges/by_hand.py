"""Labels by hand: a blind, stratified sample of responses, and what people say of it."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path

from artifacts.errors import ConfigError
from artifacts.keys import Json
from artifacts.paths import exists
from artifacts.store import Store
from tasks.judges.asking import Item, Pair, Verdict, keep_verdicts, read_judgements
from tasks.numerics.labels import is_refusal

WORDS = {"refused": True, "complied": False, "unclear": None}
COLUMNS = ("prompt_id", "response_digest", "verdict")
LARGEST = 50_000_000  # bytes of a file of labels
IDENTITY: dict[str, Json] = {"judge": "hand", "version": 1}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,39}", re.ASCII)


def labeller_of(name: str) -> str:
    """The labeller of a person.

    Raises:
        ConfigError: the name is not 1 to 40 plain characters.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--by takes a name of up to 40 letters, digits and .-_, not '{name}'")
    return f"hand:{name}"


def sample(items: Iterable[Item], labeller: str, count: int, seed: int) -> list[Item]:
    """At most `count` responses, the same whenever it is called, in an order that tells nothing.

    Strata are a prompt's class and the keyword verdict; each gives as many as the others while it
    lasts. A response's place depends on the seed and on itself, so new trials move few of them.

    Args:
        labeller: the keyword labeller that stratifies; nobody is shown what it says.
    """
    strata: defaultdict[tuple[str, bool], list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: _place(item, seed)):
        strata[item.prompt_class, is_refusal(labeller, item.response)].append(item)
    layers = zip_longest(*(strata[name] for name in sorted(strata)))
    drawn = islice((item for item in chain.from_iterable(layers) if item), count)
    return sorted(drawn, key=lambda item: _place(item, seed))


def _place(item: Item, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{item.prompt_id}/{item.response_digest}".encode()).digest()


def last_answers(store: Store, labeller: str) -> dict[Pair, tuple[bool | None, int]]:
    """A person's last answer to each pair, and its number."""
    answers = read_judgements(store, labeller).get(labeller, {})
    return {pair: (answer.verdict.refused, answer.number) for pair, answer in answers.items()}


def keep_answer(store: Store, labeller: str, item: Item, refused: bool | None, number: int) -> None:
    """Store one answer, at once."""
    keep_verdicts(store, labeller, IDENTITY, [(item, Verdict(refused))], number)


def keep_file(store: Store, labeller: str, file: Path, items: Sequence[Item]) -> int:
    """Store labels that were made elsewhere; how many are new or other than before.

    Raises:
        ConfigError: the file cannot be read, or a line of it is not what it should be.
    """
    known = {item.pair: item for item in items}
    before = last_answers(store, labeller)
    told: dict[Pair, bool | None] = {}
    for number, row in _rows(file):
        pair, verdict = (row[0], row[1]), row[2].lower()
        if verdict not in WORDS:
            raise ConfigError(
                f"'{file}', line {number}: the verdict '{row[2]}' is none of {', '.join(WORDS)}"
            )
        if pair not in known:
            raise ConfigError(
                f"'{file}', line {number}: the study has no response '{row[1]}' to the prompt "
                f"'{row[0]}'; see: tribunal sql 'SELECT prompt_id, response_digest FROM responses'"
            )
        if told.setdefault(pair, WORDS[verdict]) != WORDS[verdict]:
            raise ConfigError(f"'{file}', line {number}: response '{row[1]}' has two verdicts")
    new = {p: said for p, said in told.items() if p not in before or before[p][0] != said}
    rounds = {1 + before[pair][1] if pair in before else 0 for pair in new}
    for number in sorted(rounds):
        answers = [
            (known[pair], Verdict(said))
            for pair, said in new.items()
            if (1 + before[pair][1] if pair in before else 0) == number
        ]
        keep_verdicts(store, labeller, IDENTITY, answers, number)
    return len(new)


def _rows(file: Path) -> list[tuple[int, tuple[str, str, str]]]:
    """Line numbers and the three columns of a file of labels."""
    try:
        if not exists(file) or file.stat().st_size > LARGEST:
            raise ConfigError(f"no file '{file}' of at most {LARGEST:,} bytes")
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise ConfigError(f"'{file}' has no column '{absent[0]}'; it needs {COLUMNS_TEXT}")
            found = []
            for row in reader:
                prompt, response, verdict = ((row[name] or "").strip() for name in COLUMNS)
                found.append((reader.line_num, (prompt, response, verdict)))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"cannot read '{file}': {error}") from error
    if not found:
        raise ConfigError(f"'{file}' holds no labels; it needs {COLUMNS_TEXT}")
    return found


COLUMNS_TEXT = f"the columns {', '.join(COLUMNS)}"
