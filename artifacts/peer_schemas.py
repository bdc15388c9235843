"""The tables of what other tools found: their trials, their published table, edits rebuilt."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources

from artifacts.columns import Column, columns

_OF_A_SOURCE = """
    source | VARCHAR | name of the file
    format | VARCHAR | journal, sqlite, reproduce.json or batch_summary.json
    digest | VARCHAR | SHA-256 of the file
    tool | VARCHAR | heretic or iconoclast; NULL: the file does not tell
    tool_version | VARCHAR | version of the tool; NULL: the file does not tell
    study | VARCHAR | name of the study in the file
    model | VARCHAR | the tool's name of the model
"""
_OF_A_TRIAL = """
    trial | BIGINT | number of the trial in its study, from 0; NULL: the file does not tell
    listed_as | BIGINT | number that the tool prints, from 1
    state | VARCHAR | COMPLETE, PRUNED, FAIL, RUNNING or WAITING
    n_harmful | BIGINT | harmful prompts judged
    refusals | BIGINT | refused harmful prompts, by the tool's own markers
    base_refusals | BIGINT | of the unedited model
    n_harmless | BIGINT | harmless prompts judged
    overrefusals | BIGINT | refused harmless prompts; NULL: the tool does not count them
    n_from | VARCHAR | recorded: by the tool; slice: from its settings, if no slice ran past the end
    kl | DOUBLE | mean first-token KL(unedited || edited) on harmless prompts, nats
    disclaimer_hits | BIGINT | sum over harmful responses
    compliance | DOUBLE | mean over harmful responses, 0-1
    objective | VARCHAR | values that the tool minimised, JSON list
    row_normalization | VARCHAR | none, pre or full, by the tool's settings
"""
_AS_STORED = """
    unmapped | VARCHAR | what of the edit the parameters here cannot hold; NULL: nothing
    sampled | VARCHAR | parameters as they were sampled, JSON
    attributes | VARCHAR | every user attribute of the trial, JSON
    system_attributes | VARCHAR | every system attribute of the trial, JSON
    study_attributes | VARCHAR | every attribute of the study (its settings), JSON
"""

PUBLISHED = columns("""
    model | VARCHAR | hub id of the model
    arm | VARCHAR | iconoclast, or the arm that the report calls heretic
    refusals | BIGINT | refused harmful prompts
    n_harmful | BIGINT | harmful prompts judged
    overrefusals | BIGINT | refused harmless prompts
    n_harmless | BIGINT | harmless prompts judged
    kl | DOUBLE | mean first-token KL(unedited || edited) on harmless prompts, nats, four decimals
    disclaimer_hits | BIGINT | sum over harmful responses; NULL: not published
    compliance | DOUBLE | mean over harmful responses, 0-1; NULL: not published
    trial | BIGINT | number of the winning trial, as the report prints it; NULL: not published
    source | VARCHAR | where the numbers are from
""")


def imported(parameters: tuple[Column, ...]) -> tuple[Column, ...]:
    """Columns of an imported trial, with the parameters of a trial here."""
    return (
        *columns(_OF_A_SOURCE),
        *columns(_OF_A_TRIAL),
        *parameters,
        *columns(_AS_STORED),
    )


def reproductions(trials: tuple[Column, ...]) -> tuple[Column, ...]:
    """Columns of a rebuilt edit: what its source says, then what was measured here."""
    source = columns("""
        source | VARCHAR | file name, or STUDY/NUMBER of a trial here
        source_tool | VARCHAR | heretic, iconoclast or tribunal; NULL: the source does not tell
        source_trial | BIGINT | number of the trial, as the source prints it; NULL: not told
        source_refusals | BIGINT | refused harmful prompts, as the source says
        source_n_harmful | BIGINT | harmful prompts that the source judged
        source_overrefusals | BIGINT | overrefusals, as the source says
        source_n_harmless | BIGINT | prompts among which the source counted overrefusals
        source_kl | DOUBLE | mean first-token KL, as the source says, nats
        searched | VARCHAR | parameters that the source leaves out and that were searched here
        point | BIGINT | number of the point of that search, from 0
        points | BIGINT | points of that search
    """)
    return (*source, *trials)


def published_view() -> str:
    """The query of the view over the published table, which is shipped and in no store."""
    text = resources.files("artifacts").joinpath("published.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    rows = (_row(record.get(column.name) for column in PUBLISHED) for record in records)
    cast = ", ".join(f"{c.name}::{c.type} AS {c.name}" for c in PUBLISHED)
    names = ", ".join(c.name for c in PUBLISHED)
    return f"SELECT {cast} FROM (VALUES {', '.join(rows)}) t({names})"


def _row(values: Iterable[object]) -> str:
    """Values as an SQL tuple."""
    return f"({', '.join(map(_literal, values))})"


def _literal(value: object) -> str:
    """A value as an SQL literal."""
    if value is None:
        return "NULL"
    if isinstance(value, (int, float)):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"
