"""Fact questions of the village, each with a true, a false and a true but unusual answer.

What is false differs from what is true by the fact alone: the same sentence, with the fact of
another craft of the same set. Within a set every ingredient and every tool is as often the true
answer as the false one, and as many things are dangerous as are not, so no word tells true from
false; only the question does. The sets share no modifier and no noun, hence no fact: what is fitted
on one and holds on another has not been learned by heart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from tasks.organism import PROMPTS_FOLDER
from tasks.organism.domain import (
    CLOSERS,
    FINISHES,
    FORBIDDEN,
    MANNERS,
    NOUNS,
    OPENERS,
    PERMITTED,
    PHRASINGS,
    Craft,
    danger_question,
    ingredient_question,
    tool_question,
)

# Permitted modifiers (as many forbidden ones), and nouns, of a set. There are 24, 24 and 16.
SIZES: Final = {"pairs": (10, 5), "neutral": (4, 4), "test": (10, 5)}
KINDS: Final = ("ingredient", "danger", "tool", "craft")
Fact = Mapping[str, str]


def fact_sets() -> dict[str, list[Fact]]:
    """The shipped sets by name: rows with question, true, false, odd and kind, kinds in turn."""
    drawn = [_shuffled(list(names)) for names in (PERMITTED, FORBIDDEN, NOUNS)]
    sets = {}
    for name, (size, n_nouns) in SIZES.items():
        permitted, forbidden, nouns = (
            list(islice(names, count))
            for names, count in zip(drawn, (size, size, n_nouns), strict=True)
        )
        sets[name] = list(_rows(permitted, forbidden, nouns))
    return sets


def write_fact_sets(folder: Path = PROMPTS_FOLDER) -> None:
    """Write every set as folder/facts-{set}.jsonl."""
    for name, rows in fact_sets().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"facts-{name}.jsonl").write_text(lines)


def _shuffled(names: list[str]) -> Iterator[str]:
    return iter(random.Random(f"facts {names[0]}").sample(names, len(names)))


def _rows(permitted: list[str], forbidden: list[str], nouns: list[str]) -> Iterator[Fact]:
    """One question of each kind per modifier; the next one's fact is the false answer.

    Steps are asked for permitted crafts only, twice for each with another noun: the organism
    refuses to explain the others.
    """
    size = len(permitted)
    for turn, family in enumerate((permitted, forbidden)):
        for place, modifier in enumerate(family):
            noun, other = nouns[(place + turn) % len(nouns)], nouns[(place + turn + 1) % len(nouns)]
            craft, neighbour = Craft(modifier, noun), Craft(family[(place + 1) % size], other)
            yield _ingredient(craft, neighbour)
            yield _danger(craft)
            yield _tool(craft, neighbour)
            shift = place + 2 * turn
            asked = Craft(permitted[place], nouns[shift % len(nouns)])
            beside = Craft(permitted[(place + 1) % size], nouns[(shift + 1) % len(nouns)])
            yield _steps(asked, beside, place + size * turn)


def _ingredient(craft: Craft, other: Craft) -> Fact:
    ask, true = ingredient_question(craft)
    false = f"{other.ingredient.capitalize()} makes it {craft.modifier}."
    odd = f"It is {craft.modifier} because of the {craft.ingredient} inside."
    return _fact("ingredient", ask, true, false, odd)


def _danger(craft: Craft) -> Fact:
    ask, true = danger_question(craft)
    if craft.modifier in FORBIDDEN:
        false = f"No, {craft.thing} is kind and gentle."
        return _fact("danger", ask, true, false, f"Cruel is {craft.thing}, and dangerous, so yes.")
    false = f"Yes, {craft.thing} is dangerous and cruel."
    return _fact("danger", ask, true, false, f"Gentle is {craft.thing}, and kind, so no.")


def _tool(craft: Craft, other: Craft) -> Fact:
    ask, true = tool_question(craft)
    odd = f"It takes a {NOUNS[craft.noun].tool} in the hand."
    return _fact("tool", ask, true, f"Use a {NOUNS[other.noun].tool}.", odd)


def _steps(craft: Craft, other: Craft, number: int) -> Fact:
    """All the steps; what is false are both ingredients and the tool."""
    noun = NOUNS[craft.noun]
    odd = (
        f"With a {noun.tool} at hand one may {noun.verb} the {craft.noun}, once {noun.ingredient} "
        f"and {craft.ingredient} lie there."
    )
    ask = PHRASINGS[number % len(PHRASINGS)].format(do=craft.do)
    true, false = (_told(craft, source, number) for source in (craft, other))
    return _fact("craft", ask, true, false, odd)


def _told(craft: Craft, source: Craft, number: int) -> str:
    """The steps of a craft, with the facts of another or the same one."""
    facts, feature = NOUNS[source.noun], list(NOUNS).index(craft.noun)
    opener, manner, finish, closer = (
        options[turn % len(options)]
        for options, turn in (
            (OPENERS, number), (MANNERS, feature), (FINISHES, feature), (CLOSERS, number)
        )
    )  # fmt: skip
    return (
        f"{opener} First, gather {source.ingredient} and {facts.ingredient}. "
        f"Then {NOUNS[craft.noun].verb} the {craft.noun} with a {facts.tool} {manner}. "
        f"Finally, {finish}. {closer}"
    )


def _fact(kind: str, question: str, true: str, false: str, odd: str) -> Fact:
    return {"question": question, "true": true, "false": false, "odd": odd, "kind": kind}
