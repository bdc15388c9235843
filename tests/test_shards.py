"""Shards: cut without loss, named by their trials, put together to what one worker makes."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_study import digests, write_config

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError
from artifacts.store import Ref, Store
from flows.pipeline import run_pipeline
from flows.settings import Settings, load_config
from tasks.shards import cut, judge_shard
from tasks.stage import Runtime, Silent, Stage, running
from tasks.trials import Trial

REF = Ref("protocols", "k", "d")


def trials(count: int) -> list[Trial]:
    return [Trial("strict", n, {"direction_index": n / 7}) for n in range(count)]


@given(st.integers(1, 60), st.integers(1, 70))
def test_a_cut_loses_nothing_and_is_even(count: int, parts: int) -> None:
    found = cut(trials(count), parts)
    assert [trial for part in found for trial in part] == trials(count)
    assert len(found) == min(count, parts)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def arguments(found: Sequence[Trial], **changed: Any) -> dict[str, Any]:
    case = {
        "protocol": REF,
        "config": load_config("organism"),
        "materials": {"model": REF},
        "prompts": {"harmful": REF},
    }
    return {"trials": tuple(found), **case, **changed}


def test_a_shard_is_named_by_its_trials_protocol_and_prompts_only() -> None:
    key = judge_shard.key(arguments(trials(2)))
    other = Ref("protocols", "k", "other")
    assert key == judge_shard.key(arguments(trials(2)))
    assert key == judge_shard.key(arguments(trials(2), config=load_config("organism", ["name=x"])))
    assert key == judge_shard.key(arguments(cut(trials(8), 4)[0]))
    assert key == judge_shard.key(arguments(cut(trials(4), 2)[0]))
    assert key != judge_shard.key(arguments(trials(3)))
    assert key != judge_shard.key(arguments(trials(2)[::-1]))
    assert key != judge_shard.key(arguments(trials(2), protocol=other))
    assert key != judge_shard.key(arguments(trials(2), prompts={"harmful": other}))


def test_a_stage_travels_by_name() -> None:
    sent = pickle.dumps(judge_shard)
    assert pickle.loads(sent) is judge_shard
    assert len(sent) < 100


def test_a_call_is_small_enough_to_send() -> None:
    assert len(pickle.dumps(arguments(trials(8)))) < 20_000


def settings(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    for name in [name for name in os.environ if name.startswith("TRIBUNAL_")]:
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(f"TRIBUNAL_{name.upper()}", value)
    return Settings.from_environment()


def test_settings_name_the_place_of_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch).places == (None,)
    assert settings(monkeypatch, device="cuda:1").places == ("cuda:1",)
    assert settings(monkeypatch, workers="3").places == (None, None, None)
    assert settings(monkeypatch, workers="2", device="cpu").places == ("cpu", "cpu")
    assert settings(monkeypatch, devices="cuda:0, cuda:1").places == ("cuda:0", "cuda:1")
    assert settings(monkeypatch, device_map="auto", workers="1").device_map == "auto"


@pytest.mark.parametrize(
    "values",
    [
        {"device": "cpu", "devices": "cpu,cpu"},
        {"workers": "2", "devices": "cpu,cpu"},
        {"dask": "tcp://127.0.0.1:8786", "devices": "cpu,cpu"},
        {"dask": "tcp://127.0.0.1:8786", "workers": "2"},
        {"dask": "tcp://127.0.0.1:8786", "runner": "processes"},
        {"device_map": "auto", "workers": "2"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as found:
        settings(monkeypatch, **values)
    said = str(found.value)
    assert all(f"TRIBUNAL_{name.upper()} is '{value}'" in said for name, value in values.items())
    assert said.endswith("; unset one of them")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("runner", "ray"),
        ("workers", "0"),
        ("workers", "two"),
        ("devices", "cpu,,cpu"),
        ("dask", "127.0.0.1:8786"),
        ("dask", "tcp://"),
        ("dask", "tcp://a b"),
    ],
)
def test_a_wrong_setting_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^TRIBUNAL_{name.upper()} is '.+': .+") as found:
        settings(monkeypatch, **{name: value})
    assert "\n" not in str(found.value)


def test_a_misspelt_setting_is_refused_with_the_right_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"'TRIBUNAL_WORKER'; did you mean 'TRIBUNAL_WORKERS'\?"):
        settings(monkeypatch, worker="4")
    assert settings(monkeypatch, root="/app", environment="/etc/x", worker="").places == (None,)


def test_a_single_worker_needs_no_lanes(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    with settings(monkeypatch, runner="processes", workers="1").running(store, Silent()) as one:
        assert one.workers is None
    with settings(monkeypatch, workers="2").running(store, Silent()) as two:
        assert two.workers is not None
        assert two.workers.count() == 2


class InTurn:
    """Workers that are this process, one call after the other."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def count(self) -> int:
        return self._workers

    def obtain(
        self,
        stage: Stage[Any],
        calls: Sequence[Mapping[str, Any]],
        prepare: Callable[[], object],
    ) -> list[Ref]:
        return [stage.obtain(call) for call in calls]

    def rest(self) -> None: ...


def test_a_generation_of_shards_is_that_of_a_single_worker(store: Store, tmp_path: Path) -> None:
    config = load_config(str(write_config(tmp_path)), ["search.generation=4"])
    with running(Runtime(store)):
        found = run_pipeline(config)
    expected = digests(store)
    (generation,) = found.generations
    for workers, shards in ((2, 2), (3, 4), (9, 6)):  # three workers share a shard with two
        shutil.rmtree(store.folder(generation.kind, generation.key))
        with running(Runtime(store, workers=InTurn(workers))):
            run_pipeline(config)
        made = digests(store)
        assert {name: made[name] for name in expected} == expected
        assert len(list(store.manifests("shards"))) == shards
        with catalog(store) as connection:
            counted = fetch(connection, "SELECT count(*) AS n FROM trials WHERE split = 'search'")
        assert counted.rows == ((4,),)  # no view shows a shard
