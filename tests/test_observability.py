"""What a run tells while it runs and afterwards: the log, the tally, the marks in provenance."""

from __future__ import annotations

import io
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from artifacts.catalog import user_query
from artifacts.errors import ConfigError, StoreError
from artifacts.store import Ref, Store
from flows.logs import EventLog, Reporters, Tally, with_log
from flows.progress import Progressing
from tasks.stage import Made, Runtime, current, running, stage

MARKS = "SELECT kind, provenance->>'peak_memory_bytes' AS peak FROM artifacts"


@stage("numbers", version=1, label=lambda upto, **_: f"numbers to {upto}")
def numbers(*, upto: int) -> Made:
    current().reporter.said(f"counting to {upto}")
    return Made(pl.DataFrame({"n": range(upto)}))


@stage("squares", version=1)
def squares(*, of: Ref) -> Made:
    return Made(current().store.read(of).select(pl.col("n") ** 2))


def events(log: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_line_per_artifact_says_what_the_manifest_says(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(Runtime(store, EventLog(str(log), store, config="small"))):
        for _ in range(2):
            ref = squares(of=numbers(upto=5))
    told = [(e["event"], e.get("kind"), e.get("label")) for e in events(log)]
    assert told == [
        ("said", None, None),
        ("made", "numbers", "numbers to 5"),
        ("made", "squares", "squares"),
        ("cached", "numbers", "numbers to 5"),
        ("cached", "squares", "squares"),
    ]
    manifest = store.manifest(ref.kind, ref.key)
    last = events(log)[-1]
    assert (last["key"], last["bytes"], last["rows"]) == (ref.key, manifest.bytes, 5)
    assert last["peak_memory_bytes"] == manifest.provenance["peak_memory_bytes"]
    assert last["config"] == "small"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", last["time"])
    assert events(log)[0]["line"] == "counting to 5"


def test_a_rebuilt_artifact_is_said_and_made_again(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(Runtime(store, EventLog(str(log), store))):
        ref = numbers(upto=5)
        Path(store.data_url(ref)).write_bytes(b"torn")
        numbers(upto=5)
    lines = events(log)
    assert [e["event"] for e in lines] == ["said", "made", "said", "said", "made"]
    assert "it will be rebuilt" in lines[2]["line"]


def test_without_a_place_there_is_no_log(store: Store, tmp_path: Path) -> None:
    with running(Runtime(store, with_log(None, store))):
        numbers(upto=5)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "store"]


def test_a_dash_is_stderr(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    with running(Runtime(store, EventLog("-", store))):
        numbers(upto=5)
    told = capfd.readouterr()
    assert [json.loads(line)["event"] for line in told.err.splitlines()] == ["said", "made"]
    assert told.out == ""


def test_processes_share_a_log_and_no_line_is_torn(store: Store, tmp_path: Path) -> None:
    log, words = tmp_path / "log", "long " * 2000
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.starmap(_say, [(str(store.root), str(log), words)] * 8)
    lines = events(log)
    assert len(lines) == 8 * 50
    assert {e["line"] for e in lines} == {words}
    assert len({e["process"] for e in lines}) > 1


def _say(root: str, log: str, words: str) -> None:
    reporter = EventLog(log, Store(root))
    for _ in range(50):
        reporter.said(words)


@pytest.mark.parametrize("place", ["nowhere/log", "."])
def test_a_log_that_cannot_be_written_is_refused_before_anything_runs(
    store: Store, tmp_path: Path, place: str
) -> None:
    with pytest.raises(ConfigError, match=r"TRIBUNAL_LOG '.*' cannot be written \(.*\)"):
        EventLog(str(tmp_path / place), store)
    assert not store.root.exists()


def test_a_line_that_is_lost_is_told_and_the_run_goes_on(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    with running(Runtime(store, EventLog(str(log), store))):
        log.unlink()
        log.mkdir()
        ref = numbers(upto=5)
    assert store.find(ref.kind, ref.key) == ref
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2  # one for "counting", one for the artifact
    assert all("a line of the log is lost" in line and str(log) in line for line in said)


def test_an_artifact_that_is_gone_still_has_its_line(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    gone = Ref("numbers", "0" * 32, "f" * 64)
    with pytest.raises(StoreError):
        store.manifest(gone.kind, gone.key)
    EventLog(str(log), store).finished("numbers", gone, 0.0, cached=True)
    assert [(e["key"], e["bytes"]) for e in events(log)] == [(gone.key, None)]


def test_a_tally_outlives_an_artifact_that_is_gone(store: Store) -> None:
    tally = Tally(store)
    tally.finished("numbers", Ref("numbers", "0" * 32, "f" * 64), 0.0, cached=False)
    assert (tally.made, tally.bytes) == (1, 0)


def test_a_part_does_not_end_the_whole_in_the_bar() -> None:
    ref = Ref("shards", "0" * 32, "f" * 64)
    told = io.StringIO()
    with Progressing(Console(file=told, width=200), 8) as bar:
        bar.started("trials 0-3", 4)
        bar.advanced(1, 2)
        bar.finished("trials 0-3, part 1 of 2", ref, 1.0, cached=False)
        bar.advanced(2, 2)
        bar.finished("trials 0-3, part 2 of 2", ref, 1.0, cached=False)
        bar.finished("trials 0-3", ref, 2.0, cached=False)
    shares = [line.split("%")[0].strip() for line in told.getvalue().splitlines()]
    assert shares == ["25", "50", "50"]


def test_every_reporter_is_told_all(store: Store, tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    tally = Tally(store)
    reporters = Reporters(*(EventLog(str(place), store) for place in places), tally)
    with running(Runtime(store, reporters)):
        ref = numbers(upto=5)
        numbers(upto=5)
    assert [len(events(place)) for place in places] == [3, 3]
    size = store.manifest(ref.kind, ref.key).bytes
    assert (tally.made, tally.cached, tally.bytes) == (1, 1, size)
    assert tally.line() == f"1 artifacts made ({size} B), 1 found in the store"


def test_the_marks_can_be_queried_and_are_no_part_of_a_key(store: Store, tmp_path: Path) -> None:
    ballast = bytearray(64 << 20)
    with running(Runtime(store)):
        first = numbers(upto=5)
    del ballast
    ((kind, peak),) = user_query(store, MARKS).rows
    assert kind == "numbers"
    assert 64 << 20 < int(peak) < 1 << 44
    other = Store(tmp_path / "other")
    with running(Runtime(other)):
        assert numbers(upto=5) == first


def test_without_a_gpu_there_is_no_mark_of_one(store: Store) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        pytest.skip("this process has used a GPU")
    with running(Runtime(store)):
        ref = numbers(upto=5)
    assert "peak_cuda_bytes" not in store.manifest(ref.kind, ref.key).provenance


@stage("tensors", version=1)
def tensors(*, megabytes: int) -> Made:
    import torch

    made = torch.zeros(megabytes << 20, dtype=torch.uint8, device="cuda")
    return Made(pl.DataFrame({"bytes": [made.numel()]}))


def test_a_gpus_mark_is_the_artifacts_own(store: Store) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.cuda.init()
    marks = []
    with running(Runtime(store)):
        for megabytes in (64, 8):
            ref = tensors(megabytes=megabytes)
            provenance = store.manifest(ref.kind, ref.key).provenance
            marks.append(provenance["peak_cuda_bytes"]["cuda:0"])
    assert marks == [64 << 20, 8 << 20]
