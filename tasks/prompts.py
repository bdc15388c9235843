"""Prompt sets become artifacts, and are held against one another before anything is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import polars as pl

from artifacts.errors import PromptError
from artifacts.schemas import CATEGORIES, NEAR_DUPLICATES, PROMPTS, polars_schema
from artifacts.specs import PromptSource
from artifacts.store import Ref
from tasks.prompt_sources import read_prompts, read_values, source_identity
from tasks.stage import Made, current, stage


@stage(
    "prompts",
    version=1,
    identify={"source": source_identity},
    label=lambda prompt_class, split, source: f"{prompt_class} prompts, {split} split",
)
def load_prompts(*, prompt_class: str, split: str, source: PromptSource) -> Made:
    """One prompt set, normalised, its exact duplicates removed and counted.

    Raises:
        PromptError: the source cannot be read as asked.
    """
    found = read_prompts(source)
    rows = [
        {
            "class": prompt_class,
            "split": split,
            "prompt_id": prompt.prompt_id,
            "row": prompt.row,
            "text": prompt.text,
            "system_prompt": prompt.system_prompt,
        }
        for prompt in found.prompts
    ]
    if found.duplicates:
        current().reporter.said(
            f"{prompt_class}/{split}: {found.duplicates} exact duplicates removed"
        )
    frame = pl.DataFrame(rows, schema=polars_schema(PROMPTS))
    return Made(frame, {"duplicates_removed": found.duplicates, "resolved": found.resolved})


def check_sources(sources: Iterable[tuple[str, str, PromptSource]]) -> None:
    """Read every prompt set before anything is made, so that a bad last one leaves nothing behind.

    Raises:
        PromptError: a source cannot be read as asked, or the same prompt is in two splits.
    """
    found = {f"{group}/{split}": read_prompts(source) for group, split, source in sources}
    _refuse_shared(
        {name: [(p.prompt_id, p.text) for p in one.prompts] for name, one in found.items()}
    )


@stage(
    "categories",
    version=1,
    identify={"source": source_identity},
    label=lambda column, **_: f"categories by {column}",
)
def categorize(*, prompts: Ref, source: PromptSource, column: str) -> Made:
    """The category of every prompt of a set: what stands in another column of its row.

    A prompt whose cell is empty is left out. The prompts' own artifact stays as it is, so that no
    key of a study depends on how its prompts are grouped.

    Raises:
        PromptError: the source has no such column, or is not what the prompts were read from.
    """
    table = current().store.read(prompts)
    cells = {row: values[column] for row, values in read_values(source, [column])}
    if not cells.keys() >= set(table["row"]):
        raise PromptError(f"'{source.source}' is not what these prompts were read from")
    rows = [
        {**told, "source_column": column, "category": str(cells[row])}
        for row, told in zip(
            table["row"], table.select("class", "split", "prompt_id").to_dicts(), strict=True
        )
        if cells[row] is not None
    ]
    return Made(pl.DataFrame(rows, schema=polars_schema(CATEGORIES)))


@stage("near_duplicates", version=1, label=lambda prompts: "overlap of splits")
def compare_splits(*, prompts: Mapping[str, Ref]) -> Made:
    """Near-duplicates across splits (content-word Jaccard at least 0.5), reported, not removed.

    Raises:
        PromptError: the same prompt is in two splits.
    """
    from tasks.numerics.overlap import near_duplicates

    runtime = current()
    texts = {
        name: list(runtime.store.read(ref, ["prompt_id", "text"]).iter_rows())
        for name, ref in prompts.items()
    }
    _refuse_shared(texts)
    near = near_duplicates(texts)
    if near:
        pairs = Counter(f"{o.set_a} and {o.set_b}" for o in near).most_common()
        named = ", ".join(f"{count} in {pair}" for pair, count in pairs[:3])
        more = f", {len(pairs) - 3} more pairs of sets" if len(pairs) > 3 else ""
        runtime.reporter.said(f"{len(near)} near-duplicates across splits: {named}{more}")
    rows = [(o.set_a, o.id_a, o.set_b, o.id_b, o.jaccard) for o in near]
    frame = pl.DataFrame(rows, schema=polars_schema(NEAR_DUPLICATES), orient="row")
    return Made(frame, {"near_duplicates": len(near)})


def _refuse_shared(texts: Mapping[str, list[tuple[str, str]]]) -> None:
    """Refuse prompts (as id and text) that are in two splits."""
    from tasks.numerics.overlap import exact_overlaps

    same = exact_overlaps(texts)
    if same:
        shared = Counter((overlap.set_a, overlap.set_b) for overlap in same)
        (set_a, set_b), count = shared.most_common(1)[0]
        raise PromptError(
            f"{count} prompts are in both '{set_a}' ({len(texts[set_a])} prompts) and "
            f"'{set_b}' ({len(texts[set_b])}); choose slices or files that share none"
        )
