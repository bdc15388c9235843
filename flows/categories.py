"""The categories of a config's prompts, from a column of their sources."""

from __future__ import annotations

from artifacts.errors import PromptError
from artifacts.specs import Config
from flows.pipeline import sources
from tasks.prompt_sources import columns_of
from tasks.prompts import categorize, load_prompts
from tasks.stage import current


def store_categories(config: Config, column: str) -> list[tuple[str, str, int, int]]:
    """Class and split of every prompt set that has the column, its prompts and its categories.

    Raises:
        PromptError: no set has it, or a source cannot be read.
    """
    found, known = [], set()
    for prompt_class, split, source in sources(config):
        there = columns_of(source)
        known.update(there)
        if column not in there:
            continue
        prompts = load_prompts(prompt_class=prompt_class, split=split, source=source)
        named = categorize(prompts=prompts, source=source, column=column)
        told = current().store.read(named)["category"]
        found.append((prompt_class, split, prompts.rows, told.n_unique()))
    if not found:
        raise PromptError(
            f"no prompt set of '{config.name}' has a column '{column}'; they have: "
            f"{', '.join(sorted(known))}"
        )
    return found
