"""A study plan's report says what `tribunal study` says, and names what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, browser
from small_study import tribunal, write_config
from test_report import HOSTILE, Read

from artifacts.catalog import user_query
from artifacts.store import Store
from flows.report.plan_contents import PlanContents, collect_plan
from flows.report.plan_page import plan_page
from flows.report.plan_plots import plan_plots
from flows.report.queries import text_of
from flows.study_plan import load_plan

pytestmark = pytest.mark.slow
SILENT: Callable[[int, int], None] = lambda done, total: None  # noqa: E731


@dataclass(frozen=True)
class Reported:
    """A plan of which one seed was run, and the report of two seeds."""

    store: Store
    folder: Path
    study: dict[str, Any]
    contents: PlanContents
    text: str


def plan(folder: Path, name: str, seeds: list[int]) -> Path:
    file = folder / f"{name}.toml"
    arms = 'arms = ["strict", "random-search"]'
    file.write_text(f'name = "pair"\nconfigs = ["small.toml"]\n{arms}\nseeds = {seeds}\n')
    return file


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    folder = tmp_path_factory.mktemp("plan")
    write_config(folder)
    store = Store(folder / "store")
    one, two = plan(folder, "one", [0]), plan(folder, "two", [0, 1])
    done = tribunal(store, "study", str(one), "--format", "json")
    assert done.returncode == 0, done.stderr
    contents = collect_plan(store, load_plan(str(two)), (), SILENT)
    return Reported(store, folder, json.loads(done.stdout), contents, plan_page(contents, SILENT))


def test_the_tables_say_what_the_command_says(reported: Reported) -> None:
    tables = Read(reported.text).tables
    winners = [row for row in tables["winners"] if row]
    assert len(winners) == len(reported.study["leaderboard"]) == 2
    for cells, row in zip(winners, reported.study["leaderboard"], strict=True):
        texts, values = [text for text, _ in cells], [value for _, value in cells]
        assert values[0] == row["rank"]
        assert texts[1] == row["member"]
        assert values[2:7] == [
            row[name] for name in ("trial", "refusals", "unedited_refusals", "overrefusals", "kl")
        ]
        assert texts[8] == (row["against_first"] or "first")
    standing = [row for row in tables["standing"] if row]
    expected = reported.study["leaderboard"][1]["p_holm"]
    assert [value for _, value in standing[1][4:7]] == pytest.approx(list(expected.values()))
    costs = {row[0][0]: row for row in tables["costs"] if row}
    for told in reported.study["budget"]:
        assert [v for _, v in costs[told["member"]][1:5]] == [
            told[name] for name in ("trials", "stopped", "tokens_judged", "tokens_generated")
        ]
    matched = [row for row in tables["matched"] if row]
    assert len(matched) == sum(
        max(len(row["at_kl"]), len(row["at_refusals"]), 1) for row in reported.study["matched"]
    )


def test_the_sql_beside_a_table_runs_as_it_stands(reported: Reported) -> None:
    rows = {}
    for name, sql in reported.contents.sql.items():
        rows[name] = user_query(reported.store, sql).records()
        assert rows[name], name
    ranked = [(row["rank"], row["study"], row["trial"]) for row in rows["winners"]]
    assert ranked == [(r["rank"], r["study"], r["trial"]) for r in reported.study["leaderboard"]]


def test_lists_are_quoted() -> None:
    assert "key IN ('a''b', 'c')" in text_of("searches", leaderboards=["a'b", "c"])


def test_members_that_are_not_finished_are_named(reported: Reported) -> None:
    assert list(reported.contents.result.failed) == ["small/strict/1", "small/random-search/1"]
    assert "2 of 4 members are finished." in reported.text
    assert "small/strict/1 is missing: not run to its end" in reported.text
    rows = [row for row in Read(reported.text).tables["members"] if row]
    assert [row[1][0].split(":")[0] for row in rows] == [
        "finished",
        "not run to its end",
        "finished",
        "not run to its end",
    ]


def test_fronts_and_histories_only_improve(reported: Reported) -> None:
    plots = plan_plots(reported.contents)
    assert set(plots) == {"front-small", "history-small", "winners-plane"}
    for trace in plots["front-small"].traces:
        assert trace["x"] == sorted(trace["x"])
        assert trace["y"] == sorted(set(trace["y"]), reverse=True)
    member = next(iter(reported.contents.points))
    points = reported.contents.points[member]
    least = min(p["refusals"] for p in points)
    assert plots["front-small"].traces[0]["y"][-1] == least
    for trace in plots["history-small"].traces:
        assert trace["y"] == sorted(trace["y"], reverse=True)


def test_an_arm_has_one_colour_in_every_plot_and_stands_once_in_each_legend(
    reported: Reported,
) -> None:
    winners = reported.contents.winners
    colours: dict[str, set[str]] = {}
    for order in (winners, winners[::-1]):
        for plot in plan_plots(replace(reported.contents, winners=order)).values():
            named = [trace["name"] for trace in plot.traces if trace["showlegend"]]
            assert len(named) == len(set(named))
            for trace in plot.traces:
                colours.setdefault(trace["name"], set()).add(trace["marker"]["color"])
    assert set(colours) == {"strict", "random-search"}
    assert all(len(found) == 1 for found in colours.values())
    assert colours["strict"] != colours["random-search"]


def test_the_error_of_a_member_is_text(reported: Reported) -> None:
    failed = {"small/strict/1": RuntimeError(HOSTILE)}
    result = replace(reported.contents.result, failed=failed)
    text = plan_page(replace(reported.contents, result=result), SILENT)
    page, tame = Read(text), Read(reported.text)
    assert len(page.scripts) == len(tame.scripts)
    assert "onerror" not in {name for _, names in page.structure for name in names}


def test_the_command(reported: Reported) -> None:
    out = reported.folder / "pair.html"
    two = str(reported.folder / "two.toml")
    before = sorted(m.key for m in reported.store.manifests())
    done = tribunal(reported.store, "report", two, "-o", str(out), "--format", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["study"], told["finished"], len(told["missing"])) == ("pair", 2, 2)
    assert told["bytes"] == out.stat().st_size
    assert sorted(m.key for m in reported.store.manifests()) == before
    again = tribunal(reported.store, "report", two, "-o", str(out))
    assert "2 of 4 members" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.toml"], "no member of 'pair' is finished (not run to its end:"),
        (["small.toml"], "its study by name: tribunal report small"),
        (["nowhere.toml"], "no config file 'nowhere.toml'"),
        (["--set", "seed=1"], "--set is for study plans"),
    ],
)
def test_what_is_no_plan_is_one_line(
    reported: Reported, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(reported.folder, "none", [7])
    monkeypatch.chdir(reported.folder)
    done = tribunal(reported.store, "report", *arguments, "-o", "no.html")
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert not (reported.folder / "no.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_it_opens_in_a_browser(reported: Reported, tmp_path: Path) -> None:
    file = tmp_path / "pair.html"
    file.write_text(reported.text)
    with browser() as page:
        for width in (390, 1200):
            page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=900,
                deviceScaleFactor=1,
                mobile=width < 600,
            )
            page.open(file.as_uri())
            page.run("new Promise(done => setTimeout(done, 400))")
            assert page.run("document.documentElement.scrollWidth") == width
        drawn = "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))"
        assert page.run(drawn)
        assert page.run("document.querySelectorAll('.plot').length") == 3
        page.click("document.querySelector('#winners th:nth-child(7) button')")
        assert (
            page.run("document.querySelector('#winners th[aria-sort]').textContent") == "KL, nats"
        )
        assert page.errors == []
        assert all(url.startswith("file:") for url in page.asked)
