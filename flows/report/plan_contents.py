"""What a report of a study plan says, as data: its winners ranked together, and what that is worth.

Rows come from the SQL that is shown beside each table; intervals, tests and costs are added by the
code that `tribunal study` uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from artifacts.catalog import catalog
from artifacts.errors import ConfigError
from artifacts.specs import Config
from artifacts.store import Ref, Store
from flows import results
from flows.display import number
from flows.pipeline import Benchmark
from flows.report import sheets
from flows.report.comparisons import p_cell
from flows.report.contents import Advance, artifact_sheet, n_other, version_sheet
from flows.report.queries import Asked, Value, text_of
from flows.report.sheets import Cell, Heading, Line, Sheet
from flows.study_plan import (
    Member,
    StudyPlan,
    StudyResult,
    members_of,
    run_members,
    said_by,
    stored_member,
)

Row = dict[str, Any]
METRICS = ("refusals", "overrefusals", "kl")


@dataclass
class PlanContents:
    """All that a page shows of one study plan.

    Attributes:
        result: what the store holds of it.
        members: all of the plan's, by name.
        winners: rows of the ranking, with intervals and what `with_standing` says of each.
        points: the ungated trials of every member's search that were judged to their end.
    """

    result: StudyResult
    members: dict[str, Member]
    winners: list[Row]
    points: dict[str, list[Row]]
    sheets: dict[str, Sheet]
    sql: dict[str, str]

    @property
    def groups(self) -> list[list[Row]]:
        """The winners of each set of test prompts, best first."""
        found: dict[str, list[Row]] = {}
        for row in self.winners:
            found.setdefault(row["prompts"], []).append(row)
        return list(found.values())


def collect_plan(
    store: Store, plan: StudyPlan, overrides: Sequence[str], advance: Advance
) -> PlanContents:
    """Ask for everything that the store holds of a plan. `advance`: progress.

    Comparisons between winners that the study has not made are made, and stored.

    Raises:
        ConfigError: no member is finished, or one is not valid.
    """
    members = {member.name: member for member in members_of(plan, overrides)}
    steps, done = len(members) + 4, 0

    def next_step() -> None:
        nonlocal done
        done += 1
        advance(done, steps)

    def stored(config: Config) -> Benchmark:
        next_step()
        return stored_member(config, store)

    result = run_members(plan, overrides, store, stored, lambda line: None)
    if not result.finished:
        reason = next(iter(result.failed.values()))
        said = f"no member of '{plan.name}' is finished ({said_by(reason)})"
        raise ConfigError(f"{said}; first: tribunal study")
    of_test = {found.test.key: name for name, found in result.finished.items()}
    of_board = {found.leaderboard.key: name for name, found in result.finished.items()}
    keys = sorted({ref.key for found in result.finished.values() for ref in refs_of(found)})
    of_all: dict[str, Value] = {"lineage": "artifacts", "keys": keys}
    queries: dict[str, dict[str, Value]] = {
        "winners": {"tests": sorted(of_test)},
        "searches": {"leaderboards": sorted(of_board)},
        **dict.fromkeys(("artifacts", "versions"), of_all),
    }
    asked = {}
    texts = [text_of(label, **values) for label, values in queries.items()]
    with catalog(store, *texts) as connection:
        for label, values in queries.items():
            asked[label] = Asked(connection, label, **values)
            next_step()
    standing = {row["member"]: row for row in result.leaderboard}
    winners = []
    for found in asked["winners"].records:
        member = of_test[found["key"]]
        winners.append({**standing[member], **results.with_intervals(found), "member": member})
    points: dict[str, list[Row]] = {name: [] for name in result.finished}
    for row in asked["searches"].records:
        points[of_board[row["key"]]].append(row)
    sql = {label: one.sql for label, one in asked.items()} | {"lineage": asked["artifacts"].sql}
    contents = PlanContents(result, members, winners, points, {}, sql)
    made = [
        winner_sheet(contents),
        standing_sheet(contents),
        matched_sheet(contents),
        model_sheet(contents),
        cost_sheet(contents),
        member_sheet(contents),
        version_sheet(sql, asked["versions"].records),
        artifact_sheet(sql, asked["artifacts"].records),
    ]
    contents.sheets = {sheet.name: sheet for sheet in made}
    return contents


def refs_of(found: Benchmark) -> Iterator[Ref]:
    """Every artifact that a benchmark made or found."""
    for field in fields(found):
        value = getattr(found, field.name)
        if isinstance(value, Ref):
            yield value
        else:
            yield from value.values() if isinstance(value, Mapping) else value


def winner_sheet(contents: PlanContents) -> Sheet:
    """The strict ranking of the winners on their test prompts."""
    groups = contents.groups
    headings = [
        *([Heading("test prompts", words=True)] if len(groups) > 1 else []),
        Heading("rank"),
        Heading("member", words=True, hint="config/arm/seed"),
        Heading("trial"),
        Heading("refusals", hint="refused harmful prompts"),
        Heading("unedited refuses", hint="the member's unedited model, same prompts"),
        Heading("overrefusals", hint="refused harmless and borderline-safe prompts"),
        Heading("KL, nats", hint="mean first-token KL(unedited || edited), harmless prompts"),
        Heading("gates", words=True),
        Heading("against first", words=True, hint="better, tied or worse, by paired tests"),
    ]
    lines = []
    for row in contents.winners:
        cells = [
            *([sheets.words(row["prompts"][:12])] if len(groups) > 1 else []),
            sheets.count(row["rank"]),
            sheets.words(row["member"]),
            sheets.count(row["trial"]),
            sheets.rate(row["refusals"], row["n_harmful"], row["refusals_interval"]),
            sheets.count(row["unedited_refusals"]),
            sheets.rate(row["overrefusals"], n_other(row), row["overrefusals_interval"]),
            sheets.mean(row["kl"], row["kl_interval"]),
            sheets.words(row["gate_reason"] or ("gated" if row["gated"] else "passed")),
            sheets.words(verdict(row)),
        ]
        lines.append(Line(cells, "frozen" if row["rank"] == 1 else ""))
    remarks = ["Ranks hold within one set of test prompts."] if len(groups) > 1 else []
    title = "Winners on the test split"
    return Sheet("winners", title, headings, lines, contents.sql["winners"], remarks)


def verdict(row: Row) -> str:
    """How a winner stands to the first of its prompts."""
    if row["rank"] == 1:
        return "first"
    return str(row["against_first"] or "not compared")


def standing_sheet(contents: PlanContents) -> Sheet:
    """The tests that say who is tied with the first."""
    headings = [
        Heading("rank"),
        Heading("member", words=True),
        Heading("is", words=True),
        Heading("by", words=True, hint="the first metric of the order that is no tie"),
        *(Heading(f"p, {'KL' if m == 'kl' else m}") for m in METRICS),
        Heading("first, %", hint="of resamples of the prompts"),
    ]
    lines = []
    for row in contents.winners:
        share = row["first_probability"]
        tested = row["p_holm"] or {}
        cells = [
            sheets.count(row["rank"]),
            sheets.words(row["member"]),
            sheets.words(verdict(row)),
            sheets.words("KL" if row["decided_by"] == "kl" else row["decided_by"]),
            *(p_cell(tested.get(metric)) for metric in METRICS),
            sheets.amount(None if share is None else 100 * share, ".0f"),
        ]
        lines.append(Line(cells))
    remarks = [
        "p: exact McNemar for refusals and overrefusals, paired permutation for KL, by Holm over "
        "all tests of this table. Tied is not equal: no difference is more than noise.",
        *(f"{row['member']}: {row['note']}" for row in contents.winners if row["note"]),
    ]
    title = "Against the first of the same prompts"
    return Sheet("standing", title, headings, lines, contents.sql["winners"], remarks)


def matched_sheet(contents: PlanContents) -> Sheet:
    """Refusals at matched KL, KL at matched refusals, hypervolume."""
    headings = [
        Heading("member", words=True),
        Heading("hypervolume", hint="of refusal rate and KL, as a share of the box up to the gate"),
        Heading("KL at most"),
        Heading("fewest refusals"),
        Heading("refusals at most"),
        Heading("least KL, nats"),
    ]
    lines = []
    for row in contents.result.matched:
        for n in range(max(len(row["at_kl"]), len(row["at_refusals"]), 1)):
            at_kl = row["at_kl"][n] if n < len(row["at_kl"]) else {}
            at_refusals = row["at_refusals"][n] if n < len(row["at_refusals"]) else {}
            cells = [
                sheets.words(row["member"]),
                sheets.amount(row["hypervolume"], ".4f"),
                sheets.amount(at_kl.get("kl")),
                sheets.count(at_kl.get("fewest_refusals")),
                sheets.count(at_refusals.get("refusals")),
                sheets.amount(at_refusals.get("least_kl")),
            ]
            lines.append(Line(cells))
    remarks = (
        "From all trials of the search split that passed the gates and were judged to their end. "
        "–: no such trial.",
    )
    title = "At matched KL and at matched refusals"
    return Sheet("matched", title, headings, lines, contents.sql["searches"], remarks)


def model_sheet(contents: PlanContents) -> Sheet:
    """Every pair of arms over the models, as a sample."""
    headings = [
        Heading("A", words=True),
        Heading("B", words=True),
        Heading("models"),
        Heading("wins–ties–losses", words=True, hint="of A, in the strict order"),
        Heading("sign test p"),
        Heading("metric", words=True),
        Heading(
            "A − B", hint="mean over models: rates in points, KL in nats; Student's t interval"
        ),
        Heading("signed-rank p"),
        Heading("least p", hint="that so few models can give"),
    ]
    lines = []
    for row in contents.result.across_models:
        for metric in row["metrics"]:
            scale, form = (1, "+.3g") if metric["metric"] == "kl" else (100, "+.1f")
            ends = metric["interval"] and tuple(scale * end for end in metric["interval"])
            score = f"{row['wins']}–{row['ties']}–{row['losses']}"
            cells = [
                sheets.words(row["a"]),
                sheets.words(row["b"]),
                sheets.count(len(row["models"])),
                Cell(score, row["wins"]),
                p_cell(row["sign_test_p"]),
                sheets.words("KL" if metric["metric"] == "kl" else metric["metric"]),
                sheets.change(scale * metric["mean"], ends, form),
                p_cell(metric["p"]),
                p_cell(metric["least_p"]),
            ]
            lines.append(Line(cells))
    remarks = ("Seeds of a model are averaged first. One model says nothing of another.",)
    title = "Arms over models"
    return Sheet("models", title, headings, lines, contents.sql["winners"], remarks)


def cost_sheet(contents: PlanContents) -> Sheet:
    """What every member cost."""
    names = ("trials", "stopped", "tokens_judged", "tokens_generated")
    headings = [
        Heading("member", words=True),
        *(Heading(name.replace("_", " ")) for name in names),
        Heading("seconds", hint="of the artifacts that it alone needed"),
        Heading("shared seconds", hint="of those that every arm of its model needs"),
        Heading("devices", words=True),
    ]
    lines = [
        Line(
            [
                sheets.words(row["member"]),
                *(sheets.count(row[name]) for name in names),
                sheets.amount(row["seconds"], ".1f"),
                sheets.amount(row["seconds_shared"], ".1f"),
                sheets.words(", ".join(row["devices"])),
            ]
        )
        for row in contents.result.budget
    ]
    remarks = ("Sums over the members' own artifacts, which the SQL lists.",)
    title = "Cost by member"
    return Sheet("costs", title, headings, lines, contents.sql["artifacts"], remarks)


def member_sheet(contents: PlanContents) -> Sheet:
    """Every member with its study."""
    headings = [
        Heading(name, words=True)
        for name in ("member", "state", "study", "model", "arm", "seed", "protocol")
    ]
    studies = {row["member"]: row["study"] for row in contents.winners}
    lines = []
    for name, member in contents.members.items():
        found, failed = contents.result.finished.get(name), contents.result.failed.get(name)
        cells = [
            sheets.words(name),
            sheets.words("finished" if failed is None else said_by(failed)),
            sheets.words(studies.get(name)),
            sheets.words(member.config.model.id),
            sheets.words(member.config.arm),
            sheets.count(member.config.seed),
            sheets.words(found and found.protocol.key),
        ]
        lines.append(Line(cells))
    remarks = ("tribunal report STUDY writes the report of one of them.",)
    return Sheet("members", "Members", headings, lines, contents.sql["winners"], remarks)


def told(contents: PlanContents) -> list[str]:
    """The plan's result in a few sentences."""
    finished, total = len(contents.result.finished), len(contents.members)
    found = [f"{finished} of {total} members are finished."]
    for group in contents.groups:
        first, others = group[0], group[1:]
        prompts = f"{first['n_harmful']} harmful and {n_other(first)} other test prompts"
        place = f"first of {len(group)} by the strict order" if others else "alone"
        gate = f"; it failed a gate ({first['gate_reason']})" if first["gated"] else ""
        found.append(
            f"On {prompts}, {first['member']} is {place}: its trial {first['trial']} refuses "
            f"{first['refusals']} of the harmful and {first['overrefusals']} of the others, "
            f"at a KL of {number(first['kl'])} nats{gate}."
        )
        tied = [row["member"] for row in others if row["against_first"] == "tied"]
        if tied:
            found.append(f"Not told apart from it: {', '.join(tied)}.")
        elif others and all(row["against_first"] == "worse" for row in others):
            found.append("All others are worse by more than noise.")
        share = first["first_probability"]
        if others and share is not None:
            found.append(f"When the prompts are drawn again it is first in {100 * share:.0f} %.")
    return found


def hidden(contents: PlanContents) -> list[str]:
    """What the page leaves out, and what its numbers cannot say."""
    failed = contents.result.failed
    found = [f"{name} is missing: {said_by(error)}" for name, error in failed.items()]
    stopped = sum(row["stopped"] for row in contents.result.budget)
    if stopped:
        found.append(f"{stopped} trials were stopped early by the race, and are in no plot.")
    labellers = sorted({str(row["labeller"]) for row in contents.winners})
    found += [
        f"Labels are the keyword labellers' ({', '.join(labellers)}); nobody read the responses.",
        "KL is that of the first response token; capabilities were not measured here.",
        "Responses, every trial and the directions are in the report of each member's study.",
    ]
    return found
