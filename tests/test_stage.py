"""Stages: made once, keyed by role and content, rebuilt when corrupt, listed without running."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl
import pytest

from artifacts.errors import StoreError
from artifacts.store import Ref, Store
from tasks.stage import Made, Runtime, current, planning, running, stage

built: list[str] = []


@stage("numbers", version=1, ignore=("where",), label=lambda upto, **_: f"numbers to {upto}")
def numbers(*, upto: int, where: str = "here") -> Made:
    built.append(f"numbers {upto}")
    return Made(pl.DataFrame({"n": range(upto)}), {"where": "not told"})


@stage("pairs", version=1)
def pairs(*, parts: Mapping[str, Ref], offset: float = 0.0) -> Made:
    built.append("pairs")
    store = current().store
    rows = {name: store.read(ref)["n"].sum() + offset for name, ref in parts.items()}
    return Made(pl.DataFrame([rows]))


@pytest.fixture(autouse=True)
def _fresh(store: Store) -> Iterator[None]:
    built.clear()
    with running(Runtime(store)):
        yield


def test_a_stage_is_made_once(store: Store) -> None:
    assert numbers(upto=3) == numbers(upto=3)
    assert built == ["numbers 3"]
    assert store.read(numbers(upto=3))["n"].to_list() == [0, 1, 2]


def test_what_counts_changes_the_key_and_what_does_not_does_not() -> None:
    assert numbers(upto=3).key == numbers(upto=3, where="there").key
    assert numbers(upto=3).key != numbers(upto=4).key


def test_a_swap_of_roles_changes_the_key() -> None:
    a, b = numbers(upto=2), numbers(upto=5)
    assert pairs(parts={"x": a, "y": b}).key != pairs(parts={"x": b, "y": a}).key


def test_a_corrupt_artifact_is_reported_set_aside_and_rebuilt(store: Store) -> None:
    ref = numbers(upto=3)
    Path(store.data_url(ref)).write_bytes(b"torn")
    assert numbers(upto=3) == ref
    assert built == ["numbers 3", "numbers 3"]
    assert (store.root / ".quarantine").is_dir()


def test_downstream_is_not_rebuilt_when_upstream_gives_the_same_bytes(store: Store) -> None:
    ref = numbers(upto=3)
    pairs(parts={"x": ref})
    Path(store.data_url(ref)).unlink()
    pairs(parts={"x": numbers(upto=3)})
    assert built == ["numbers 3", "pairs", "numbers 3"]


def test_a_plan_runs_nothing_and_knows_what_waits(store: Store) -> None:
    numbers(upto=3)
    built.clear()
    with planning(store) as steps:
        ready, missing = numbers(upto=3), numbers(upto=9)
        pairs(parts={"x": ready, "y": missing})
    assert built == []
    assert [(s.label, s.cached, bool(s.key)) for s in steps] == [
        ("numbers to 3", True, True),
        ("numbers to 9", False, True),
        ("pairs", False, False),
    ]


def test_a_plan_of_what_is_stored_answers_with_the_references(store: Store) -> None:
    made = pairs(parts={"x": numbers(upto=3)})
    with planning(store):
        assert pairs(parts={"x": numbers(upto=3)}) == made


def test_a_failing_stage_stores_nothing(store: Store) -> None:
    with pytest.raises(StoreError):
        pairs(parts={"x": Ref("numbers", "0" * 32, "f" * 64)})
    assert list(store.entries()) == []


def test_notes_and_inputs_are_in_the_manifest(store: Store) -> None:
    ref = numbers(upto=3)
    made = store.manifest(*_place(pairs(parts={"x": ref}, offset=1.5)))
    assert made.identity == {"offset": 1.5}
    assert made.inputs["parts.x"]["digest"] == ref.digest
    assert store.manifest(*_place(ref)).notes == {"where": "not told"}


def test_no_stage_runs_outside_a_runtime() -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert "running(Runtime" in pool.apply(_outside)


def test_two_processes_make_an_artifact_once(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        found = pool.starmap(_make_slowly, [(str(store.root), str(log))] * 4)
    assert len(set(found)) == 1
    assert log.read_text() == "made\n"


@stage("slow", version=1, ignore=("log",))
def slow(*, log: str) -> Made:
    import time

    with open(log, "a") as file:
        file.write("made\n")
    time.sleep(0.5)
    return Made(pl.DataFrame({"n": [1]}))


def _make_slowly(root: str, log: str) -> str:
    with running(Runtime(Store(root))):
        return slow(log=log).digest


def _outside() -> str:
    try:
        numbers(upto=1)
    except RuntimeError as error:
        return str(error)
    return ""


def _place(ref: Ref) -> tuple[str, str]:
    return ref.kind, ref.key
