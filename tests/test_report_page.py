"""A report in a real browser: no complaint, no request, tables that sort and filter, any ground."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from browser import CHROMIUM, Page, browser
from small_study import tribunal, write_config
from test_report import HOSTILE, finished

from artifacts.store import Store
from flows.report.contents import collect
from flows.report.html_file import visible

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
STILL = "new Promise(done => setTimeout(done, 400))"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A study of the organism and its report."""
    folder = tmp_path_factory.mktemp("study")
    store = Store(folder / "store")
    done = tribunal(store, "run", str(write_config(folder)), "--set", "search.trials=8")
    assert done.returncode == 0, done.stderr
    return store, written(store, folder / "report.html")


def written(store: Store, file: Path) -> Path:
    done = tribunal(store, "report", "-o", str(file))
    assert done.returncode == 0, done.stderr
    return file


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def page(tab: Page, study: tuple[Store, Path]) -> Page:
    """The report, open and still, on a desk's window."""
    tab.call("Emulation.setScriptExecutionDisabled", value=False)
    size(tab, 1200, 900)
    ground(tab, "light")
    tab.errors.clear()
    tab.asked.clear()
    tab.open(study[1].as_uri())
    tab.run(STILL)
    return tab


def size(page: Page, width: int, height: int) -> None:
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1,
        mobile=width < 600,
    )


def ground(page: Page, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.call("Emulation.setEmulatedMedia", media="", features=[feature])


def column(page: Page, table: str, number: int) -> list[str]:
    """What the rows that are shown have in a column, as sorted by or as read."""
    found = page.run(
        f"[...document.getElementById('{table}').tBodies[0].rows].filter(r => !r.hidden)"
        f".map(r => r.cells[{number}].dataset.value ?? r.cells[{number}].textContent.trim())"
    )
    return [str(value) for value in found]


def test_it_says_what_rank_says(page: Page, study: tuple[Store, Path]) -> None:
    for split in ("search", "selection", "test"):
        done = tribunal(study[0], "rank", "--split", split, "--format", "json")
        rows = json.loads(done.stdout)
        arms = int(split == "test")
        keys = ("rank", "trial", "refusals", "overrefusals", "kl")
        for key, number in zip(keys, (0, 1, 2 + arms, 3 + arms, 4 + arms), strict=True):
            told = ["–" if row[key] is None else float(row[key]) for row in rows]
            shown = column(page, split, number)
            assert [t if t == "–" else float(t) for t in shown] == told, (split, key)


def test_the_budget_is_what_the_store_says(study: tuple[Store, Path]) -> None:
    store = study[0]
    contents = collect(store, None, 0, lambda done, total: None)
    manifests = list(store.manifests())
    rows = {row["kind"]: row for row in contents.budget}
    besides = {"leaderboards", "figures", "near_duplicates"}
    assert set(rows) == {m.kind for m in manifests} - besides
    for kind, row in rows.items():
        own = [m for m in manifests if m.kind == kind]
        assert row["artifacts"] == len(own)
        assert row["seconds"] == pytest.approx(sum(m.provenance["seconds"] for m in own))
    generations = pl.concat(store.read(m.ref) for m in manifests if m.kind == "generations")
    answers = generations["responses"].explode().struct.field("n_tokens")
    assert rows["generations"]["trials"] == 8
    assert rows["generations"]["tokens"] == answers.sum()
    assert rows["generations"]["responses"] == len(answers)


def test_it_complains_of_nothing_and_asks_for_nothing(
    page: Page, study: tuple[Store, Path]
) -> None:
    assert page.run("document.querySelectorAll('.plot .main-svg').length") >= 7
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=600, y=450)
    ground(page, "dark")
    page.run(STILL)
    assert page.errors == []
    assert page.asked == [study[1].as_uri()]
    assert page.run("performance.getEntriesByType('resource').length") == 0


def test_a_page_that_asks_is_seen_to_ask(page: Page) -> None:
    page.run("fetch('http://example.invalid/').catch(() => 'refused')")
    page.run("document.body.append(Object.assign(new Image(), {src: 'http://example.invalid/a'}))")
    page.run(STILL)
    assert any("Content Security Policy" in said for said in page.errors)


def test_a_script_that_is_not_its_own_does_not_run(page: Page) -> None:
    page.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.owned = 1'; "
        "document.body.append(s); document.body.insertAdjacentHTML('beforeend', "
        "'<img src=x onerror=\"window.owned = 2\">'); })()"
    )
    page.run(STILL)
    assert page.run("window.owned === undefined")


def test_heads_sort_by_pointer_and_by_key(page: Page) -> None:
    head = "document.querySelectorAll('#search th')[4]"
    before = column(page, "search", 4)
    page.click(f"{head}.querySelector('button')")
    assert page.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    rising = sorted(before, key=float)
    assert column(page, "search", 4) == rising
    page.run(f"{head}.querySelector('button').focus()")
    for kind in ("keyDown", "keyUp"):
        enter: dict[str, Any] = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        page.call("Input.dispatchKeyEvent", type=kind, text="\r", **enter)
    assert page.run(f"{head}.getAttribute('aria-sort')") == "descending"
    assert column(page, "search", 4) == rising[::-1]
    assert page.run("document.querySelectorAll('#search th[aria-sort]').length") == 1


def test_a_sum_stays_last(page: Page) -> None:
    page.click("document.querySelector('#budget th:nth-child(6) button')")
    assert column(page, "budget", 0)[-1] == "all"
    seconds = [float(value) for value in column(page, "budget", 5)[:-1]]
    assert seconds == sorted(seconds)


def test_what_is_missing_sorts_last_both_ways(page: Page) -> None:
    rows = column(page, "budget", 2)
    assert "–" in rows
    for _ in range(2):
        page.click("document.querySelector('#budget th:nth-child(3) button')")
        known = [value == "–" for value in column(page, "budget", 2)[:-1]]
        assert known == sorted(known)


def test_a_filter_keeps_rows_with_every_word(page: Page) -> None:
    every = column(page, "search", 1)
    trial = every[-1]
    page.run(
        "(() => { const f = document.querySelector('[data-filter^=Search] input');f.focus(); })()"
    )
    page.call("Input.insertText", text="frozen")
    assert len(column(page, "search", 1)) == 1
    assert page.run("document.querySelector('[data-filter^=Search] output').textContent") == (
        f"1 of {len(every)}"
    )
    page.call("Input.insertText", text=" nowhere")
    assert column(page, "search", 1) == []
    assert page.run("document.querySelector('[data-filter^=Search] input').ariaLabel")
    assert trial in every


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 900)])
def test_nothing_is_wider_than_the_window(page: Page, width: int, height: int) -> None:
    size(page, width, height)
    page.run(STILL)
    assert page.run("document.documentElement.scrollWidth") == width


def test_plots_follow_the_ground(page: Page) -> None:
    inked = "document.querySelector('#plot-plane .xtick text').style.fill"
    light = page.run(inked)
    ground(page, "dark")
    page.run(STILL)
    assert page.run(inked) != light
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"


def test_it_prints_on_light_paper_without_its_tools(page: Page) -> None:
    ground(page, "dark")
    paper = page.paper()
    assert paper.startswith(b"%PDF")
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for hidden in ("nav", ".tools", ".sql"):
        assert page.run(f"getComputedStyle(document.querySelector('{hidden}')).display") == "none"
    assert page.errors == []


def test_tables_and_drawings_need_no_script(page: Page, study: tuple[Store, Path]) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(study[1].as_uri())
    tree = page.call("DOM.getDocument", depth=0)["root"]["nodeId"]
    for selector, least in (("#search tbody tr", 8), ("noscript svg", 7), ("details dd", 2)):
        found = page.call("DOM.querySelectorAll", nodeId=tree, selector=selector)["nodeIds"]
        assert len(found) >= least, selector
    assert page.call("DOM.querySelectorAll", nodeId=tree, selector="button")["nodeIds"] == []


def test_a_hostile_response_is_text(page: Page, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    finished(store, HOSTILE)
    page.open(written(store, tmp_path / "hostile.html").as_uri())
    page.run(STILL)
    assert page.errors == []
    assert page.run("document.title").endswith("Tribunal report")
    assert page.run("document.images.length") == 0
    assert page.run("document.querySelector('dd').textContent") == visible(HOSTILE)
    assert page.run("document.querySelectorAll('#plot-plane .main-svg').length") > 0
    assert all(url.startswith("file:") for url in page.asked)
