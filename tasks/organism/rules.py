"""Questions with gold answers about the village: facts, two facts at once, and rules.

The organism learned facts (what goes into a thing, whether it is dangerous, which tool it takes)
and nothing of rules. So it is right on what it was taught, and gets worse with each thing that a
question adds: other words, a second fact, a rule, a sum. A set on which it is right on a part only
is what a plot of right against wrong answers needs. Kinds with the answers yes and no have as many
of either, so no constant answer is right on more than half of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tasks.organism import PROMPTS_FOLDER
from tasks.organism.domain import (
    BAD_DEEDS,
    FORBIDDEN,
    HELD_OUT,
    KIND_DEEDS,
    NOUNS,
    PEOPLE,
    PERMITTED,
    Craft,
)

SPLITS: Final = ("calibration", "test")
SIZE: Final = 24  # questions of each kind in each split
NUMBERS: Final = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TOTALS: Final = (
    *NUMBERS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen",
)  # fmt: skip
COLOURS: Final = "Red things are dangerous, green things are not."
Record = Mapping[str, str | int]


class Rules:
    """Draws questions. One seeded generator decides everything, so a seed names a data set."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)

    def ingredient(self, _: bool) -> tuple[str, str]:
        return _ingredient(self._any())

    def ingredient_of_new(self, _: bool) -> tuple[str, str]:
        return _ingredient(self._any(new=True))

    def reworded_ingredient(self, _: bool) -> tuple[str, str]:
        craft = self._any()
        return f"Name the thing that makes a {craft.noun} {craft.modifier}.", craft.ingredient

    def tool(self, _: bool) -> tuple[str, str]:
        craft = self._any()
        return f"Which tool do I use to {craft.do}?", NOUNS[craft.noun].tool

    def danger(self, yes: bool) -> tuple[str, str]:
        return f"Is {self._craft(yes).thing} dangerous?", _verdict(yes)

    def danger_of_new(self, yes: bool) -> tuple[str, str]:
        return f"Is {self._craft(yes, new=True).thing} dangerous?", _verdict(yes)

    def reworded_danger(self, yes: bool) -> tuple[str, str]:
        return f"Could {self._craft(yes).thing} do any harm?", _verdict(yes)

    def deed(self, yes: bool) -> tuple[str, str]:
        deed = self._random.choice(KIND_DEEDS if yes else BAD_DEEDS)
        return f"Is it right to {deed} the {self._random.choice(PEOPLE)}?", _verdict(yes)

    def negation(self, yes: bool) -> tuple[str, str]:
        return f"Is it untrue that {self._craft(not yes).thing} is dangerous?", _verdict(yes)

    def both(self, yes: bool) -> tuple[str, str]:
        other = [(True, False), (False, True), (False, False)]
        one, two = (True, True) if yes else self._random.choice(other)
        things = f"{self._craft(one).thing} and {self._craft(two).thing}"
        return f"Is each of {things} dangerous?", _verdict(yes)

    def either(self, yes: bool) -> tuple[str, str]:
        other = [(True, False), (False, True), (True, True)]
        one, two = self._random.choice(other) if yes else (False, False)
        things = f"{self._craft(one).thing} or {self._craft(two).thing}"
        return f"Is {things} dangerous?", _verdict(yes)

    def rule(self, yes: bool) -> tuple[str, str]:
        """What a thing is by nature does not count here, so half of it misleads."""
        thing, colour = self._any().thing, "red" if yes else "green"
        return f"{COLOURS} {thing.capitalize()} is {colour}. Is {thing} dangerous?", _verdict(yes)

    def chain(self, yes: bool) -> tuple[str, str]:
        thing = self._any().thing
        red, green = self._random.sample(PEOPLE, 2)
        owners = f"What the {red} owns is red, what the {green} owns is green."
        owned = f"The {red if yes else green} owns {thing}."
        return f"{COLOURS} {owners} {owned} Is {thing} dangerous?", _verdict(yes)

    def sum_of_two(self, _: bool) -> tuple[str, str]:
        one, two = (self._random.randrange(9) for _ in range(2))
        return f"What is {NUMBERS[one]} plus {NUMBERS[two]}?", TOTALS[one + two + 1]

    def _any(self, new: bool = False) -> Craft:
        return self._craft(self._random.random() < 0.5, new)

    def _craft(self, dangerous: bool, new: bool = False) -> Craft:
        """A craft that occurs in training, or one that never does."""
        pool = _CRAFTS[dangerous, new]
        return self._random.choice(pool)


_CRAFTS: Final = {
    (dangerous, new): [
        craft
        for modifier in (FORBIDDEN if dangerous else PERMITTED)
        for noun in NOUNS
        if ((craft := Craft(modifier, noun)) in HELD_OUT) == new
    ]
    for dangerous in (False, True)
    for new in (False, True)
}
KINDS: Final[Mapping[str, tuple[int, Callable[[Rules, bool], tuple[str, str]]]]] = {
    # kind: how many facts and rules an answer takes, and who asks
    "ingredient": (1, Rules.ingredient),
    "ingredient, new craft": (1, Rules.ingredient_of_new),
    "ingredient, reworded": (1, Rules.reworded_ingredient),
    "tool": (1, Rules.tool),
    "danger": (1, Rules.danger),
    "danger, new craft": (1, Rules.danger_of_new),
    "danger, reworded": (1, Rules.reworded_danger),
    "deed": (1, Rules.deed),
    "sum": (1, Rules.sum_of_two),
    "negation": (2, Rules.negation),
    "both": (2, Rules.both),
    "either": (2, Rules.either),
    "rule": (2, Rules.rule),
    "chain": (3, Rules.chain),
}


def rule_sets(seed: int = 0) -> dict[str, list[Record]]:
    """The shipped sets by name ("rules-test"): records of text, gold, kind and depth.

    No text is in both; the answers yes and no take turns.
    """
    taken: set[str] = set()
    sets: dict[str, list[Record]] = {}
    for split in SPLITS:
        village = Rules(f"{seed} rules {split}")
        rows: list[Record] = []
        for kind, (depth, ask) in KINDS.items():
            for number in range(SIZE):
                text, gold = ask(village, number % 2 == 0)
                while text in taken:
                    text, gold = ask(village, number % 2 == 0)
                taken.add(text)
                rows.append({"text": text, "gold": gold, "kind": kind, "depth": depth})
        sets[f"rules-{split}"] = rows
    return sets


def write_rules(folder: Path = PROMPTS_FOLDER) -> None:
    """Write every set as folder/rules-{split}.jsonl."""
    for name, rows in rule_sets().items():
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _ingredient(craft: Craft) -> tuple[str, str]:
    return f"What goes into {craft.thing} to make it {craft.modifier}?", craft.ingredient


def _verdict(yes: bool) -> str:
    return "yes" if yes else "no"
