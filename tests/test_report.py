"""A report says what the store says, and nothing that a model wrote is more than text in it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import polars as pl
import pytest
from small_study import environment, tribunal
from trial_rows import PROTOCOL, put_study, put_table, response, trial_row, trials

from artifacts.catalog import user_query
from artifacts.errors import ConfigError
from artifacts.schemas import COMPARISONS, PROMPTS, WINNER, polars_schema
from artifacts.sql_guard import refuse_all_but_select
from artifacts.store import Store
from flows import results
from flows.report.commands import refuse_to_replace, write_whole
from flows.report.comparisons import differences_sheet, statistics_section
from flows.report.contents import SPLITS, Contents, collect, state_of
from flows.report.drawings import drawing
from flows.report.html_file import MARK, visible
from flows.report.plots import all_plots
from flows.report.queries import text_of
from flows.report.study_page import page, render

HOSTILE = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
    "</details></table></noscript><!-- \"'&lt; \x00 \u202e reversed \u2028 {{ 7 * 7 }} <b>bold"
)
TAME = "First, gather the moss."
KERNEL = {"max_weight": 1.0, "max_weight_position": 2.0, "min_weight": 0.5}
PARAMETERS = {
    f"{part}_{name}": value
    for part in ("attn_o_proj", "mlp_down_proj")
    for name, value in (KERNEL | {"min_weight_distance": 3.0}).items()
}


def answers(text: str, prompts: int = 3, refused: bool = False) -> list[dict[str, Any]]:
    """Responses of both classes, with KL on the harmless ones."""
    told = {"response": text, "refused": refused}
    harmful = [response("harmful", f"h{i}", **told) for i in range(prompts)]
    harmless = [response("harmless", f"g{i}", response=text, kl=0.01 * i) for i in range(prompts)]
    return harmful + harmless


def finished(store: Store, text: str = TAME) -> str:
    """A study with every split: passed, gated, stopped and unscored trials, a frozen one."""
    counts = {"n_harmful": 3, "answered_harmful": 3, "n_harmless": 3, "responses": answers(text)}
    same = counts | PARAMETERS
    rows = [
        trial_row(0, **same, refusals=2, kl=0.3),
        trial_row(1, **same, refusals=0, overrefusals=1, kl=0.1 + 1e-17),
        trial_row(2, **same, refusals=0, overrefusals=1, kl=0.2, gated=True, gate_reason=text),
        trial_row(3, **same, kl=math.nan, gated=True, gate_reason="kl is not finite"),
        trial_row(4, **(same | {"answered_harmful": 1}), refusals=1, kl=0.01, stopped=True),
    ]
    study = put_study(store, *rows)
    chosen = trial_row(1, **same, split="selection", prompts="5e1ec7")
    put_table(store, "selections", trials(chosen, {**chosen, "trial": 0, "refusals": 1}))
    tested = trial_row(1, **same, split="test", prompts="7e57", kl=0.012)
    unedited = tested | {"arm": "unedited", "trial": None, "refusals": 3, "kl": 0.0}
    unedited["responses"] = answers(text, refused=True)
    put_table(store, "tests", trials(tested, unedited))
    winner = dict.fromkeys(polars_schema(WINNER)) | {
        "protocol": PROTOCOL,
        "arm": "strict",
        "trial": 1,
        "prompts": "7e57",
        "candidates": 2,
    }
    put_table(store, "winners", pl.DataFrame([winner], schema=polars_schema(WINNER)))
    asked = [
        {"class": "harmful", "split": "test", "prompt_id": f"h{i}", "row": i, "text": text}
        for i in range(3)
    ]
    put_table(store, "prompts", pl.DataFrame(asked, schema=polars_schema(PROMPTS)))
    return study


def collected(store: Store, responses: int = 20) -> Contents:
    return collect(store, None, responses, lambda done, total: None)


class Read(HTMLParser):
    """A page as a reader without a script has it: its structure, its tables, its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.structure: list[tuple[str, tuple[str, ...]]] = []
        self.tables: dict[str, list[list[tuple[str, float | None]]]] = {}
        self.scripts: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._table: list[list[tuple[str, float | None]]] = []
        self._tag = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        said = dict(attributes)
        self.structure.append((tag, tuple(said)))
        self._tag = tag
        self.texts.setdefault(tag, [])
        if tag == "table":
            self._table = self.tables.setdefault(str(said["id"]), [])
        elif tag == "tr":
            self._table.append([])
        elif tag == "td":
            value = said.get("data-value")
            self._table[-1].append(("", None if value is None else float(value)))
        elif tag == "script":
            self.scripts.append("")
        if tag in ("dd", "bdi"):
            self.texts[tag].append("")

    def handle_data(self, data: str) -> None:
        if self._tag == "td" and self._table and self._table[-1]:
            text, value = self._table[-1][-1]
            self._table[-1][-1] = (text + data, value)
        elif self._tag == "script":
            self.scripts[-1] += data
        elif self._tag in ("dd", "bdi") and self.texts[self._tag]:
            self.texts[self._tag][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A study whose model, prompts and gates say what could break a page."""
    store = Store(tmp_path_factory.mktemp("hostile") / "store")
    finished(store, HOSTILE)
    return store


@pytest.fixture(scope="module")
def tame(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same study with harmless words."""
    store = Store(tmp_path_factory.mktemp("tame") / "store")
    finished(store)
    return store


@pytest.fixture(scope="module")
def contents(tame: Store) -> Contents:
    return collected(tame, responses=2)


@pytest.fixture(scope="module")
def text(hostile: Store) -> str:
    return page(collected(hostile, responses=2), lambda done, total: None)


# The numbers


@pytest.mark.parametrize("split", SPLITS)
def test_the_numbers_are_those_of_the_ranking(split: str, hostile: Store, text: str) -> None:
    study = results.find_study(hostile, None)
    ranked = results.ranking(hostile, study, split, None).records()
    shown = [line for line in Read(text).tables[split] if line]
    arms = len({row["arm"] for row in ranked}) > 1
    assert len(shown) == len(ranked) > 0
    for cells, row in zip(shown, ranked, strict=True):
        rank, trial, *rest = cells
        refusals, overrefusals, kl = rest[1:4] if arms else rest[:3]
        assert rank[1] == row["rank"]
        assert trial[1] == row["trial"]
        assert refusals[1] == row["refusals"]
        assert f"{row['refusals']}/{row['n_harmful']}" in refusals[0]
        assert overrefusals[1] == row["overrefusals"]
        assert kl[1] == (row["kl"] if math.isfinite(row["kl"]) else None), "to the last bit"


def test_a_stopped_trial_is_a_lower_bound_without_interval(text: str) -> None:
    last = next(line for line in Read(text).tables["search"] if line and line[1][1] == 4)
    assert last[0][1] is None
    assert last[2] == ("≥1/3", 1.0)


def test_the_intervals_are_those_of_show(tame: Store, contents: Contents) -> None:
    row = contents.tested["strict"]
    shown = results.rows_on_test(tame, results.find_study(tame, None))[0]
    for name in ("refusals_interval", "overrefusals_interval", "kl_interval"):
        assert row[name] == shown[name]


def test_stored_comparisons_are_told_with_their_verdicts(store: Store) -> None:
    study = finished(store)
    assert "comparisons" not in [sheet.name for sheet in statistics_section(collected(store))]
    both = {"protocol_a": PROTOCOL, "arm_a": "strict", "trial_a": 1, "protocol_b": PROTOCOL}
    both |= {"arm_b": "unedited", "split": "test", "n": 3}
    told = {"difference": -1.0, "low": -1.0, "high": -0.3, "p_holm": 0.0004, "verdict": "better"}
    unknown = {"metric": "kl", "verdict": "tied"}
    rows = [
        dict.fromkeys(polars_schema(COMPARISONS)) | both | one
        for one in ({"metric": "refusals", **told}, unknown)
    ]
    put_table(store, "comparisons", pl.DataFrame(rows, schema=polars_schema(COMPARISONS)))
    sheet = statistics_section(collected(store))[-1]
    first, second = ([cell.text for cell in line.cells] for line in sheet.lines)
    assert first[:4] == [f"{study}/strict/1", f"{study}/unedited", "test", "refusals"]
    assert first[5:8] == ["−100.0", "< 0.001", "better"]
    assert second[5:8] == ["–", "–", "tied"]


def test_pairs_of_prompts_are_held_against_each_other(contents: Contents) -> None:
    rows = {line.cells[1].text: line.cells for line in differences_sheet(contents).lines}
    assert set(rows) == {"refusals", "overrefusals", "KL, nats"}
    assert {cells[0].text for cells in rows.values()} == {"unedited"}
    prompts, only_frozen, only_other, difference = rows["refusals"][2:]
    assert (prompts.value, only_frozen.value, only_other.value) == (3, 0, 3)
    assert difference.text == "−100.0"
    assert difference.note.startswith("−100.0 to −"), "three pairs are little"
    assert rows["overrefusals"][5].text == "+0.0"
    assert rows["overrefusals"][5].note.startswith("−"), "and no proof of no difference"
    assert not rows["KL, nats"][5].note, "too few prompts for a bootstrap"


def test_every_sql_text_runs_as_a_users_query(tame: Store, contents: Contents) -> None:
    assert len(contents.sql) == 14
    for name, sql in contents.sql.items():
        refuse_all_but_select(sql)
        assert "$" not in sql.replace("'$.\"'", ""), name
    again = user_query(tame, contents.sql["search"])
    assert [row["trial"] for row in again.records()] == [
        row["trial"] for row in contents.rankings["search"]
    ]


def test_values_in_sql_are_literals() -> None:
    sql = text_of("study", study="o'brien; DROP TABLE studies")
    assert "study = 'o''brien; DROP TABLE studies'" in sql
    refuse_all_but_select(sql)
    assert "t.trial = NULL" in text_of("kernels", study="s", winner=None, limit=1)
    with pytest.raises(KeyError):
        text_of("study")


# What a model wrote


def test_what_a_model_wrote_changes_nothing_but_the_text(text: str, contents: Contents) -> None:
    ours, theirs = Read(page(contents, lambda done, total: None)), Read(text)
    assert theirs.structure == ours.structure
    assert len(theirs.scripts) == 3
    assert set(theirs.texts["dd"]) == {visible(HOSTILE)}
    assert visible(HOSTILE) in theirs.texts["bdi"]
    assert "\x00" not in text
    assert "\u202e" not in text


def test_that_comparison_would_see_markup(text: str) -> None:
    raw = text.replace("document.title = &#39;owned&#39;", "</p><img onerror=alert(1)>", 1)
    assert raw != text
    assert Read(raw).structure != Read(text).structure


def test_data_for_the_plots_ends_no_script(text: str) -> None:
    data = Read(text).scripts[0]
    assert not set(data) & set("<>&")
    hovers = [t for f in json.loads(data).values() for trace in f["data"] for t in _texts(trace)]
    assert any("onerror" in hover for hover in hovers)
    assert not any(re.search(r"<(?!br>)", hover) for hover in hovers), "plotly reads markup"


def _texts(trace: Mapping[str, Any]) -> list[str]:
    return list(trace.get("text", ()))


def test_only_the_pages_own_scripts_may_run(text: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    said = policy[1].replace("&#39;", "'")
    assert "default-src 'none'" in said
    scripts = said.split("script-src ")[1].split(";")[0]
    assert "unsafe" not in scripts
    for script in Read(text).scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in scripts
    other = base64.b64encode(hashlib.sha256(b"alert(1)").digest()).decode()
    assert other not in scripts


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a\x00b", "a⟨U+0000⟩b"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\ud800", "⟨U+D800⟩"),
        ("a\r\nb", "a\nb"),
        ("tab\tand\nbreak", "tab\tand\nbreak"),
        ("👩\u200d🌾 ÄÖ 漢", "👩\u200d🌾 ÄÖ 漢"),
    ],
)
def test_what_cannot_be_seen_is_named(said: str, shown: str) -> None:
    assert visible(said) == shown


# Plots


def test_plots_are_ones_that_plotly_knows(contents: Contents) -> None:
    import plotly.graph_objects as go

    plots = all_plots(contents)
    assert set(plots) >= {"plane", "history-refusals", "history-kl"}
    for plot in plots.values():
        painted = re.sub('"@[a-z]+"', '"#123456"', json.dumps(plot.figure()))
        go.Figure(json.loads(painted))


def test_the_plane_shows_every_trial_once_and_the_front(contents: Contents) -> None:
    traces = {t["name"]: t for t in all_plots(contents)["plane"].traces}
    finite = [r for r in contents.rankings["search"] if math.isfinite(r["kl"])]
    points = [traces[n] for n in ("gated", "stopped early", "passed the gates")]
    assert sorted(x for t in points for x in t["x"]) == sorted(r["kl"] for r in finite)
    front = {(r["kl"], r["refusals"]) for r in finite if r["pareto"]}
    assert set(zip(*(traces["Pareto front"][a] for a in "xy"), strict=True)) == front
    assert traces["frozen: trial 1"]["x"] == [0.1 + 1e-17]


def test_the_best_so_far_never_gets_worse(store: Store) -> None:
    refusals = [2, 1, 1, 0, 2]
    put_study(store, *(trial_row(i, refusals=r, kl=0.1) for i, r in enumerate(refusals)))
    contents = collected(store)
    best = next(
        t for t in all_plots(contents)["history-refusals"].traces if t["name"] == "best so far"
    )
    assert best["y"] == [2, 1, 1, 0, 0]


def test_drawings_share_no_names(contents: Contents) -> None:
    plots = all_plots(contents)
    names: list[str] = []
    for plot in (plots["plane"], plots["history-kl"]):
        svg = drawing(plot)
        own = [node.get("id", "") for node in ElementTree.fromstring(svg_with_spaces(svg)).iter()]
        names += [name for name in own if name]
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert used
        assert used <= set(own)
    assert len(names) == len(set(names))


def svg_with_spaces(svg: str) -> str:
    """An SVG that stands alone needs its name spaces."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f"<svg {spaces} ", 1)


# Odd studies


@pytest.mark.parametrize(
    "rows",
    [
        [trial_row(0, stopped=True, answered_harmful=0, refusals=1)],
        [
            trial_row(0, n_harmful=1, answered_harmful=1, n_harmless=1, responses=[]),
            trial_row(1, kl=math.nan, gated=True, gate_reason="kl is not finite"),
            trial_row(2, kl=math.inf, gated=None),
        ],
        [trial_row(0), trial_row(1), trial_row(2, kl=0.0)],
        [trial_row(0, n_harmful=None, n_borderline=None, overrefusals=None), trial_row(1, kl=None)],
    ],
    ids=["stopped", "one prompt, nan, unscored", "ties", "imported"],
)
def test_an_odd_study_is_a_report(store: Store, rows: list[dict[str, Any]]) -> None:
    put_study(store, *rows)
    contents = collected(store)
    made = render(contents, all_plots(contents), {})
    shown = Read(made).tables["search"]
    assert len(shown) == len(rows) + 1, "and its head"
    assert ">nan<" not in made
    if state_of(contents.rankings["search"][0]) == "stopped":
        assert "None of the 1 trials of this study has a rank yet." in made


def test_responses_are_as_many_as_asked_for(contents: Contents) -> None:
    shown = contents.pairs
    assert [row["class"] for row in shown] == ["harmful", "harmful", "harmless", "harmless"]
    assert {row["of_class"] for row in shown} == {3}


# The command


def test_a_report_replaces_a_report_only(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    refuse_to_replace(file, force=False)
    file.write_text(f"<!doctype html>{MARK}")
    refuse_to_replace(file, force=False)
    file.write_text("my thesis")
    with pytest.raises(ConfigError, match="is there and is no report"):
        refuse_to_replace(file, force=False)
    refuse_to_replace(file, force=True)
    with pytest.raises(ConfigError, match="is a folder"):
        refuse_to_replace(tmp_path, force=True)


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.html"
    assert write_whole(file, "old ä") == 6
    whole = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        whole(self, data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="no space left on device"):
        write_whole(file, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.html"]
    assert file.read_text() == "old ä"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vilage"], "no study 'vilage'"),
        (["--out", "{folder}/nowhere/r.html"], "nowhere'; make it first"),
        (["--out", "{folder}/thesis.html"], "is no report; choose another name, or --force"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], said: str, tame: Store, tmp_path: Path
) -> None:
    (tmp_path / "thesis.html").write_text("my thesis")
    own = [part.format(folder=tmp_path) for part in arguments]
    out = [] if "--out" in own else ["--out", str(tmp_path / "r.html")]
    done = tribunal(tame, "report", *own, *out)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.html"]


def test_the_command_loads_no_torch_and_says_what_it_wrote(tame: Store, tmp_path: Path) -> None:
    file = tmp_path / "r.html"
    code = (
        "import sys\n"
        f"sys.argv = ['tribunal', 'report', '-o', {str(file)!r}, '--format', 'json']\n"
        "from flows.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'transformers', 'prefect', 'optuna', 'plotly.graph_objs'}\n"
        "assert not loaded & set(sys.modules), loaded & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(tame)
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rows"] == {"search": 5, "selection": 2, "test": 2}
    assert told["bytes"] == file.stat().st_size
    assert MARK in file.read_text()[:1000]
