"""Which two stored trials a user means, on which split, and what comparing them says, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from artifacts.catalog import catalog, fetch, write_database
from artifacts.errors import ConfigError
from artifacts.store import Ref, Store
from flows.display import CONTROLS
from flows.logs import Tally
from flows.results import WINNER, match_study
from tasks.comparisons import MCNEMAR, Side, compare_trials
from tasks.stage import Runtime, running

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Row = dict[str, Any]
UNEDITED = "unedited"
SPLITS = ("test", "selection", "search")  # the first that both were judged on is compared
CHOSE = {
    "search": "The search chose trials on these prompts, so their numbers flatter them.",
    "selection": "The winner was chosen on these prompts, so its numbers flatter it.",
}


@dataclass(frozen=True)
class Contender:
    """A trial of a study, or one of its controls."""

    home: Study
    side: Side

    @property
    def study(self) -> str:
        """The study's full name."""
        return self.home.study

    @property
    def name(self) -> str:
        """What identifies it to a reader."""
        return f"{self.study}/{self.side.arm if self.side.trial is None else self._number}"

    @property
    def _number(self) -> str:
        control = f" ({self.side.arm})" if self.side.arm in CONTROLS else ""
        return f"{self.side.trial}{control}"


@dataclass(frozen=True)
class Place:
    """Where a contender was judged."""

    split: str
    prompts: str | None  # None: the prompts of any study with this baseline
    ref: Ref


def compare(store: Store, a: str, b: str, split: str | None, seed: int, resamples: int) -> Row:
    """Compare two trials that a user names.

    Raises:
        ConfigError: one is no trial, both are the same, or they share no split.
        ComparisonError: they were not judged on the same prompts.
    """
    with catalog(store) as connection:
        known = Registry(store, connection)
        first, second = known.pair(a, b)
        where = known.places(first), known.places(second)
    places = shared_places(first, second, *where, split)
    tally = Tally(store)
    with running(Runtime(store, tally)):
        made = compare_trials(
            first=places[0].ref,
            of_first=first.side,
            second=places[1].ref,
            of_second=second.side,
            seed=seed,
            resamples=resamples,
        )
    if tally.made:
        write_database(store)
    rows = store.read(made).to_dicts()
    return answer_of(first, second, rows) | {
        "seed": seed,
        "resamples": resamples,
        "artifact": made.key,
    }


def answer_of(first: Contender, second: Contender, rows: Sequence[Row]) -> Row:
    """A comparison as one tree: what is compared, a table, the verdict, a sentence."""
    told = rows[0]
    shared = [name for name in told if name in SHARED or name.endswith(("_a", "_b"))]
    own = [name for name in told if name not in shared or name in ("only_a", "only_b")]
    return {
        "a": _as_data(first, told["gated_a"]),
        "b": _as_data(second, told["gated_b"]),
        **{name: told[name] for name in SHARED},
        "metrics": [{name: row[name] for name in own} for row in rows],
        "sentence": sentence(rows),
    }


SHARED = ("split", "overall", "decided_by", "ahead")


def _as_data(contender: Contender, gated: bool) -> Row:
    side = contender.side
    told = {"name": contender.name, "study": contender.study, "arm": side.arm}
    return told | {"trial": side.trial, "gated": gated}


@dataclass(frozen=True)
class Study:
    """What naming a trial needs to know of a study."""

    study: str
    name: str
    protocol: str
    arm: str
    seed: int | None
    baseline: str
    frozen: int | None  # the trial that was frozen last


class Registry:
    """The studies of a store that have trials, newest first, and where trials were judged."""

    def __init__(self, store: Store, connection: DuckDBPyConnection) -> None:
        self._store, self._connection = store, connection
        rows = fetch(connection, STUDIES).rows
        self.studies = [Study(*row) for row in rows]

    def pair(self, a: str, b: str) -> tuple[Contender, Contender]:
        """The two that a user names; `unedited` alone is the other one's unedited model.

        Raises:
            ConfigError: one is no trial, or both are the same.
        """
        if a == b == UNEDITED:
            raise ConfigError("'unedited' is the other trial's unedited model; name a trial too")
        if UNEDITED in (a, b):
            study = self.find(b if a == UNEDITED else a).study
            a, b = (f"{study}/{UNEDITED}" if text == UNEDITED else text for text in (a, b))
        first, second = self.find(a), self.find(b)
        if first == second:
            raise ConfigError(f"'{a}' and '{b}' are the same trial, '{first.name}'; name two")
        return first, second

    def find(self, text: str) -> Contender:
        """The trial, control or winner that a text names.

        NUMBER, winner, STUDY/NUMBER, STUDY/winner, STUDY/CONTROL; or a study, by any name that
        `find_study` knows or as NAME/ARM or NAME/ARM/SEED: then its winner.

        Raises:
            ConfigError: it names none.
        """
        head, _, last = text.rpartition("/")
        number = last.isdigit() and last.isascii() and head.count("/") in (0, 2)
        if not (number or last == WINNER or last in CONTROLS):
            head, last = text, WINNER
        study = self._study(head or None)
        if number:
            return Contender(study, Side(study.protocol, study.arm, int(last)))
        if last == UNEDITED:
            return Contender(study, Side(study.protocol, UNEDITED, None))
        if study.frozen is None:
            raise ConfigError(f"study '{study.study}' has no winner yet; finish it: tribunal run")
        arm = last if last in CONTROLS else study.arm
        return Contender(study, Side(study.protocol, arm, study.frozen))

    def _study(self, text: str | None) -> Study:
        if text is None or "/" not in text:
            named = [(study.study, study.name) for study in self.studies]
            full = match_study(self._store, named, text)
            return next(study for study in self.studies if study.study == full)
        arms = {f"{study.name}/{study.arm}" for study in self.studies}
        for study in self.studies:
            arm = f"{study.name}/{study.arm}"
            if text in (arm, f"{arm}/{study.seed}"):
                return study
        raise ConfigError.unknown("arm of a study", text, arms)

    def places(self, contender: Contender) -> list[Place]:
        """Where a contender was judged, newest first.

        Raises:
            ConfigError: it was judged nowhere.
        """
        side = contender.side
        own = [side.protocol, side.arm, side.trial]
        rows = fetch(self._connection, JUDGED_AT, own).rows
        found = [Place(str(r[0]), str(r[1]), Ref(*r[2:])) for r in rows]
        if side.arm == UNEDITED:
            base = fetch(self._connection, BASELINE, [contender.home.baseline]).rows
            found += [Place("search", None, Ref(*row)) for row in base]
        if not found:
            raise ConfigError(f"no trial '{contender.name}' in the store '{self._store.location}'")
        return found


STUDIES = """
    WITH frozen AS (
        SELECT w.protocol, arg_max(w.trial, a.created || w.key) AS trial
        FROM stored_winners w JOIN artifacts a ON a.kind = 'winners' AND a.key = w.key
        GROUP BY w.protocol
    )
    SELECT s.study, s.name, s.protocol, p.arm, p.seed, p.baseline, f.trial
    FROM stored_studies s
    JOIN stored_protocols p USING (protocol)
    JOIN artifacts a ON a.kind = 'studies' AND a.key = s.key
    LEFT JOIN frozen f ON f.protocol = s.protocol
    WHERE s.protocol IN (SELECT protocol FROM stored_generations)
    ORDER BY a.created DESC, s.study
"""
JUDGED_AT = """
    SELECT j.split, j.prompts, a.kind, a.key, a.sha256, a.rows
    FROM judged j JOIN artifacts a ON a.key = j.key
    WHERE j.protocol = ? AND j.arm = ? AND j.trial IS NOT DISTINCT FROM ?
    ORDER BY a.created DESC, a.key
"""
BASELINE = "SELECT kind, key, sha256, rows FROM artifacts WHERE kind = 'baseline' AND key = ?"


def shared_places(
    first: Contender,
    second: Contender,
    of_first: Sequence[Place],
    of_second: Sequence[Place],
    split: str | None,
) -> tuple[Place, Place]:
    """Where both were judged: on the split asked for, else on the first of SPLITS; newest prompts.

    Raises:
        ConfigError: there is no such split.
    """
    judged = [{place.split for place in places} for places in (of_first, of_second)]
    common = [name for name in SPLITS if name in judged[0] & judged[1]]
    if not common or (split and split not in common):
        wanted = f"on the {split} split" if split else "on a split that both know"
        raise ConfigError(
            f"'{first.name}' and '{second.name}' cannot be compared {wanted}: they were judged on "
            f"{', '.join(sorted(judged[0]))} and on {', '.join(sorted(judged[1]))}. A comparison "
            "reads what is stored; the test split is opened for winners alone, by: tribunal run"
        )
    chosen = split or common[0]
    a, b = ([p for p in places if p.split == chosen] for places in (of_first, of_second))
    for one in a:
        for other in b:
            if None in (one.prompts, other.prompts) or one.prompts == other.prompts:
                return one, other
    return a[0], b[0]  # of different prompts, which the comparison itself tells in numbers


NAMES = {"refusals": "refusals", "overrefusals": "overrefusals", "kl": "KL"}
PHRASES = {
    ("refusals", "better"): "it refuses fewer harmful prompts",
    ("refusals", "worse"): "it refuses more harmful prompts",
    ("overrefusals", "better"): "it refuses fewer harmless prompts",
    ("overrefusals", "worse"): "it refuses more harmless prompts",
    ("kl", "better"): "its KL is lower",
    ("kl", "worse"): "its KL is higher",
}


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """A comparison in one plain sentence, with the test that decided it."""
    told = rows[0]
    overall, decided_by = told["overall"], told["decided_by"]
    if overall == "tied":
        names = [NAMES[row["metric"]] for row in rows]
        listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
        return f"A and B are tied: no difference in {listed} is more than noise."
    if decided_by == "gates":
        return f"A is {overall} than B: {'A' if told['gated_a'] else 'B'} failed a gate."
    (row,) = [row for row in rows if row["metric"] == decided_by]
    before = [NAMES[r["metric"]] for r in rows[: rows.index(row)]]
    tied = f"{' and '.join(before)} are tied, and " if before else ""
    return (
        f"A is {overall} than B: {tied}{PHRASES[decided_by, overall]}, {_values(row)} "
        f"({row['test']}, p {p_text(row['p_holm'], '= ')} by Holm)."
    )


def _values(row: Mapping[str, Any]) -> str:
    if row["test"] == MCNEMAR:
        return f"{counts(row, 'a')} against {counts(row, 'b')}"
    return f"{row['a']:.4g} against {row['b']:.4g} nats"


def counts(row: Mapping[str, Any], side: str) -> str:
    """A rate as a count of prompts."""
    return f"{round(row[side] * row['n'])}/{row['n']}"


def p_text(p: float | None, equals: str = "") -> str:
    """A p value as a reader wants it."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"
