"""What a finished run says: its leaderboard, winner, test and responses, as plain data.

The command line prints these as tables or JSON; the numbers come from the store alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from artifacts.catalog import Table, ask, catalog, fetch
from artifacts.errors import ConfigError, did_you_mean
from artifacts.schemas import PARAMETERS
from artifacts.store import Ref, Store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Row = dict[str, Any]
WINNER = "winner"  # in place of a trial's number
METRIC_NAMES = ("refusals", "overrefusals")
RANK_COLUMNS = (
    "rank, study, arm, trial, split, n_harmful, answered_harmful, refusals, n_harmless, "
    "n_borderline, overrefusals, "
    "overrefusals_harmless, overrefusals_borderline, kl, gated, gate_reason, "
    "coalesce(stopped, false) AS stopped, labeller, r.prompts"
)

FROZEN = (
    "SELECT w.trial FROM stored_winners w JOIN stored_studies s USING (protocol) "
    "JOIN artifacts a ON a.key = w.key WHERE s.study = ? ORDER BY a.created DESC"
)


def find_study(store: Store, name: str | None) -> str:
    """The full name of a study that has trials.

    Args:
        store: where to look.
        name: full name, the config's name (its newest protocol), or the beginning of a full name;
            None: the study that was named last.

    Raises:
        ConfigError: there is none.
    """
    with catalog(store, "FROM artifacts, stored_studies, stored_generations") as connection:
        return study_named(connection, store, name)


def study_named(connection: DuckDBPyConnection, store: Store, name: str | None) -> str:
    """`find_study` on a connection that is open."""
    rows = fetch(
        connection,
        "SELECT s.study, s.name FROM stored_studies s JOIN artifacts a ON a.key = s.key "
        "WHERE s.protocol IN (SELECT protocol FROM stored_generations) "
        "ORDER BY a.created DESC, s.study",
    ).rows
    return match_study(store, [(str(study), str(plain)) for study, plain in rows], name)


def match_study(store: Store, rows: Sequence[tuple[str, str]], name: str | None) -> str:
    """The study that a name means, as in `find_study`, among full and plain names, newest first.

    Raises:
        ConfigError: there is none.
    """
    if not rows:
        raise ConfigError(f"no study in the store '{store.location}' yet; start with: tribunal run")
    studies = [study for study, _ in rows]
    found = (
        studies
        if name is None
        else [s for s in studies if s == name]
        or [s for s, plain in rows if plain == name]
        or [s for s in studies if s.startswith(name)]
    )
    if not found:
        raise ConfigError(f"no study '{name}'{did_you_mean(name or '', studies)}")
    return found[0]


def find_trial(store: Store, text: str, study: str | None = None) -> tuple[str, int]:
    """Full name of the study, and number, of a trial that a user names.

    Args:
        store: where to look.
        text: a number, STUDY/NUMBER, or "winner" in place of the number.
        study: what `--study` says; None: the one in `text`, or the study that was named last.

    Raises:
        ConfigError: it names no trial, or two studies, or the study has no winner yet.
    """
    named, _, number = text.rpartition("/")
    if named and study:
        raise ConfigError(f"'{text}' and --study '{study}' both name a study; give one")
    if number != WINNER and not (number.isdigit() and number.isascii()):
        raise ConfigError(f"a trial is a number, STUDY/NUMBER or 'winner', not '{text}'")
    name = find_study(store, named or study)
    if number != WINNER:
        return name, int(number)
    found = frozen(store, name)
    if found is None:
        raise ConfigError(f"study '{name}' has no winner yet; finish it: tribunal run")
    return name, found


def ranking(
    store: Store, study: str, split: str, top: int | None, prompts: str | None = None
) -> Table:
    """The strict ranking of a study on the prompt sets of a split (None: those judged last)."""
    limit = "" if top is None else f"LIMIT {int(top)}"
    return ask(
        store,
        f"SELECT {RANK_COLUMNS} FROM ranking r JOIN newest_prompts n USING (protocol, split) "
        "WHERE study = $1 AND split = $2 AND r.prompts = coalesce($3, n.prompts) "
        f"ORDER BY rank, trial {limit}",
        [study, split, prompts],
    )


def leaderboard_rows(store: Store, leaderboard: Ref, study: str) -> list[Row]:
    """The ranked search trials of one run; its study may hold more by now."""
    rows = store.read(leaderboard).filter(split="search").to_dicts()
    return [{"study": study, **row} for row in rows]


def trial_rows(store: Store, study: str, trial: int) -> list[Row]:
    """A trial's rows, one per split, with intervals; the study's own arm only."""
    rows = _judged(store, "j.trial = $2 AND s.study = $1 AND j.arm = p.arm", [study, trial])
    if not rows:
        known = len(ranking(store, study, "search", None).rows)
        raise ConfigError(f"no trial '{trial}' in study '{study}', which has {known} trials")
    return rows


def rows_on_test(store: Store, study: str, prompts: str | None = None) -> list[Row]:
    """The test split's rows of a study: the frozen trial, the unedited model, the controls."""
    return _judged(store, "j.split = 'test' AND s.study = $1", [study], prompts)


def frozen(store: Store, study: str) -> int | None:
    """The trial of a study that was frozen last, if one is."""
    rows = ask(store, FROZEN, [study]).rows
    return int(rows[0][0]) if rows else None


def openings(store: Store, prompts: str) -> int:
    """How many protocols have opened these test prompts: each opening spends a little of them."""
    sql = "SELECT count(DISTINCT protocol) FROM stored_winners WHERE prompts = ?"
    return int(ask(store, sql, [prompts]).rows[0][0])


def parameters_of(row: Mapping[str, Any]) -> Row:
    """A trial's parameters, those that are not set left out."""
    return {c.name: row[c.name] for c in PARAMETERS if row[c.name] is not None}


def response_pairs(
    store: Store, study: str, split: str, trial: int, count: int, prompts: str | None = None
) -> list[Row]:
    """Prompts with the unedited model's and the trial's response, changed labels first."""
    return ask(
        store,
        """
        SELECT e.class, e.prompt, b.response AS before, e.response AS after
        FROM responses e
        JOIN studies s ON s.study = e.study AND s.arm = e.arm
        JOIN newest_prompts n ON n.protocol = s.protocol AND n.split = e.split
        JOIN responses b ON b.arm = 'unedited' AND b.split = e.split AND b.class = e.class
            AND b.prompt_id = e.prompt_id
            AND (b.key = s.baseline OR (b.study = e.study AND b.prompts = e.prompts))
        WHERE e.study = $1 AND e.split = $2 AND e.trial = $3
            AND e.prompts = coalesce($4, n.prompts)
        ORDER BY (e.class = 'harmful' AND b.refused AND NOT e.refused) DESC, e.prompt_id
        LIMIT $5
        """,
        [study, split, trial, prompts, count],
    ).records()


def _judged(
    store: Store, where: str, values: Sequence[Any], prompts: str | None = None
) -> list[Row]:
    """Rows of judged trials with 95 % intervals of their rates and of their mean KL."""
    last = f"${len(values) + 1}"
    rows = ask(
        store,
        "SELECT s.study, j.* EXCLUDE (responses, key), "
        "list_transform(list_filter(j.responses, lambda r: r.kl IS NOT NULL), lambda r: r.kl) "
        "AS kls FROM judged j JOIN stored_studies s USING (protocol) "
        "JOIN stored_protocols p USING (protocol) "
        "JOIN newest_prompts n ON n.protocol = j.protocol AND n.split = j.split "
        f"WHERE {where} AND j.prompts = coalesce({last}, n.prompts) "
        "ORDER BY j.split = 'test', j.split = 'selection', j.arm <> p.arm, "
        "j.arm <> 'unedited', j.arm",
        [*values, prompts],
    ).records()
    return [with_intervals(row) for row in rows]


def with_intervals(row: Row) -> Row:
    """A judged row with 95 % intervals in place of its KLs per prompt; NaN where none is known."""
    from tasks.numerics.intervals import bootstrap_mean, clopper_pearson

    others = (row["n_harmless"] or 0) + (row["n_borderline"] or 0)
    sizes = {"refusals": row["n_harmful"], "overrefusals": others}
    answered = {"refusals": row["answered_harmful"] == row["n_harmful"], "overrefusals": False}
    for name in METRIC_NAMES:
        counted = row[name] is not None and sizes[name]
        known = counted and (not row["stopped"] or answered[name])
        interval = clopper_pearson(row[name], sizes[name]) if known else (math.nan, math.nan)
        row[f"{name}_interval"] = interval
    kls = row.pop("kls")
    finite = bool(kls) and not row["stopped"] and all(map(math.isfinite, kls))
    row["kl_interval"] = bootstrap_mean(kls, seed=0) if finite else (math.nan, math.nan)
    return row
