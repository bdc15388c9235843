"""Drift of frozen winners: what is compared, why it differs, what follows, and how it is shown."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from small_study import environment as small_environment
from small_study import tribunal
from trial_rows import PROTOCOL, response, trial_row, trials

from artifacts.catalog import user_query
from artifacts.errors import ConfigError, ModelError, PromptError, TestSplitSpent
from artifacts.schemas import MODELS, PROMPTS, WINNER, polars_schema
from artifacts.specs import PromptSource
from artifacts.store import Manifest, Ref, Store, parquet
from flows.drift import Outcome, check_winners, occasion_of, winners_to_check
from flows.rebenchmark import events_of, rebenchmark, resource_of, state_of, summary_of, table_of
from tasks.drift import (
    VERDICTS,
    change_of,
    device_causes,
    labeller_causes,
    library_causes,
    model_causes,
    newest_drift,
    prompt_causes,
    record_drift,
    verdict_of,
)
from tasks.locked_test import refuse_other_trials
from tasks.models.identity import require_hub
from tasks.numerics.differences import Samples
from tasks.prompts import load_prompts
from tasks.remeasure import LABELLERS, environment, frozen_winners, is_source_of, newest
from tasks.stage import Runtime, _device, running

ROOT = Path(__file__).parent.parent
NONE = np.zeros(0)


def put(store: Store, kind: str, key: str, frame: pl.DataFrame, **facts: Any) -> Ref:
    """Store a table as an artifact; `facts` are fields of its manifest, inputs as references."""
    inputs = {
        role: {"kind": ref.kind, "key": ref.key, "digest": ref.digest}
        for role, ref in facts.pop("inputs", {}).items()
    }
    told = {"created": "2026-01-01T00:00:00Z", "seconds": 1.0, **facts.pop("provenance", {})}
    manifest = {"version": 1, "rows": frame.height, "provenance": told, "inputs": inputs} | facts
    return store.put(Manifest(kind=kind, key=key, **manifest), parquet(frame))


def answers(refused: int = 0, kl: float = 0.01, **changes: Any) -> list[dict[str, Any]]:
    """Ten harmful responses, of which some are refusals, and ten harmless ones."""
    harmful = [response("harmful", f"h{i}", refused=i < refused) for i in range(10)]
    return harmful + [response("harmless", f"g{i}", kl=kl + 1e-3 * i) | changes for i in range(10)]


def judged(trial: int | None = 0, split: str = "test", **changes: Any) -> dict[str, Any]:
    """A judged trial with responses."""
    arm = "strict" if trial is not None else "unedited"
    return trial_row(trial, arm=arm, split=split, **{"responses": answers()} | changes)


class Study:
    """A study in a store whose trial 0 is frozen, ahead of trial 1."""

    def __init__(self, store: Store, name: str = "village", **provenance: str) -> None:
        self.store = store
        protocol = pl.DataFrame({"protocol": [PROTOCOL], "arm": ["strict"]})
        self.protocol = put(store, "protocols", PROTOCOL, protocol)
        self.name = f"{name}-{PROTOCOL[:6]}"
        row = {"study": [self.name], "name": [name], "protocol": [PROTOCOL], "config": ["{}"]}
        put(
            store,
            "studies",
            "5" * 32,
            pl.DataFrame(row),
            identity={"config": name},
            inputs={"protocol": self.protocol},
        )
        winner = {"protocol": PROTOCOL, "arm": "strict", "trial": 0, "candidates": 2}
        self.selection = put(store, "selections", "e" * 32, trials(*self.candidates(0.01, 0.02)))
        self.winner = put(
            store,
            "winners",
            "a" * 32,
            pl.DataFrame([winner], schema=polars_schema(WINNER)),
            inputs={"protocol": self.protocol},
            notes={"selection": self.selection.key},
        )
        self.test = put(
            store,
            "tests",
            "b" * 32,
            trials(judged(), judged(None)),
            inputs={"winner": self.winner, "protocol": self.protocol},
            notes={"trial": 0},
            provenance=provenance,
        )

    def candidates(self, *kls: float, **changes: Any) -> list[dict[str, Any]]:
        return [judged(i, "selection", kl=kl) | changes for i, kl in enumerate(kls)]

    def retest(self, name: str, *rows: dict[str, Any]) -> Ref:
        """A later measurement."""
        return put(self.store, "retests", name * 32, trials(*rows))

    def compare(
        self, test: Ref | None = None, selection: Ref | None = None, *causes: str
    ) -> list[dict[str, Any]]:
        """The rows of a new comparison."""
        with running(Runtime(self.store)):
            return self.store.read(self.record(test, selection, *causes)).to_dicts()

    def record(self, test: Ref | None = None, selection: Ref | None = None, *causes: str) -> Ref:
        return record_drift(
            winner=self.winner,
            protocol=self.protocol,
            test_before=self.test,
            test_after=test or self.test,
            selection_before=self.selection,
            selection_after=selection or self.selection,
            causes=list(causes),
        )


@pytest.fixture
def study(store: Store) -> Study:
    return Study(store)


def of(rows: list[dict[str, Any]], metric: str, arm: str = "strict") -> dict[str, Any]:
    (row,) = [row for row in rows if (row["metric"], row["arm"]) == (metric, arm)]
    return row


def test_without_a_second_measurement_nothing_differs_and_no_interval_is_told(
    study: Study,
) -> None:
    rows = study.compare()
    assert {row["verdict"] for row in rows} == {"unchanged"}
    assert {row["change"] for row in rows} == {"unchanged"}
    assert {(row["difference"], row["low"], row["high"]) for row in rows} == {(0.0, None, None)}
    assert {row["cause"] for row in rows} == {None}
    assert not any(row["measured"] for row in rows)
    metrics = ["refusals", "overrefusals", "kl", "degenerate", "mean_tokens"]
    assert [row["metric"] for row in rows if row["arm"] == "strict"] == metrics
    unedited = [row["metric"] for row in rows if row["arm"] == "unedited"]
    assert unedited == [name for name in metrics if name != "kl"]


def test_the_same_numbers_measured_again_are_unchanged_with_intervals(study: Study) -> None:
    rows = study.compare(study.retest("1", judged(), judged(None)), None, "torch 1 -> 2")
    assert {row["verdict"] for row in rows} == {"unchanged"}
    assert all(row["measured"] and row["cause"] == "torch 1 -> 2" for row in rows)
    assert of(rows, "refusals")["low"] < 0 < of(rows, "refusals")["high"]
    assert (of(rows, "kl")["low"], of(rows, "kl")["high"]) == (0.0, 0.0)


def test_more_refusals_are_noise_or_drift_by_how_many_there_are(study: Study) -> None:
    one = study.compare(study.retest("1", judged(responses=answers(1)), judged(None)))
    assert of(one, "refusals")["difference"] == pytest.approx(0.1)
    assert of(one, "refusals")["n_paired"] == 10
    assert one[0]["verdict"] == "within noise"
    all_of_them = study.compare(study.retest("2", judged(responses=answers(9)), judged(None)))
    assert of(all_of_them, "refusals")["low"] > 0
    assert of(all_of_them, "refusals")["change"] == "drifted"
    assert of(all_of_them, "overrefusals")["change"] == "unchanged"
    assert all_of_them[0]["verdict"] == "drifted"


def test_what_the_unedited_model_does_is_told_but_is_not_the_winners_verdict(
    study: Study,
) -> None:
    rows = study.compare(study.retest("1", judged(), judged(None, responses=answers(10))))
    assert of(rows, "refusals", "unedited")["change"] == "drifted"
    assert rows[0]["verdict"] == "unchanged"


def test_a_shift_of_kl_by_rounding_is_noise_and_a_visible_one_is_drift(study: Study) -> None:
    for shift, change in ((1e-7, "within noise"), (1e-3, "drifted")):
        again = judged(responses=answers(kl=0.01 + shift))
        rows = study.compare(study.retest(f"{change[0]}", again, judged(None)))
        assert of(rows, "kl")["low"] > 0  # all prompts moved alike
        assert of(rows, "kl")["change"] == rows[0]["verdict"] == change


def test_an_infinite_kl_is_drift_without_an_interval(study: Study) -> None:
    again = judged(responses=answers(kl=math.inf))
    kl = of(study.compare(study.retest("1", again, judged(None))), "kl")
    assert (kl["after"], kl["difference"], kl["low"]) == (math.inf, None, None)
    assert kl["change"] == "drifted"


def test_other_prompts_are_compared_unpaired_and_some_of_them_in_part(study: Study) -> None:
    def renamed(count: int) -> list[dict[str, Any]]:
        return [r | {"prompt_id": f"new-{r['prompt_id']}"} for r in answers(3)[:count]] + answers(
            3
        )[count:]

    wide = of(study.compare(study.retest("1", judged(responses=renamed(20)), judged(None))), "kl")
    part = study.compare(study.retest("2", judged(responses=renamed(5)), judged(None)))
    same = of(study.compare(study.retest("3", judged(responses=renamed(0)), judged(None))), "kl")
    assert [row["n_paired"] for row in (wide, of(part, "refusals"), same)] == [0, 5, 10]
    assert wide["low"] < 0 < wide["high"]
    assert (same["low"], same["high"]) == (0.0, 0.0)
    assert wide["change"] == "within noise"


def test_a_winner_that_another_candidate_passes_has_lost_its_place(study: Study) -> None:
    again = put(study.store, "reselections", "f" * 32, trials(*study.candidates(0.03, 0.02)))
    rows = study.compare(study.retest("1", judged(), judged(None)), again)
    assert (rows[0]["place_before"], rows[0]["place_after"], rows[0]["candidates"]) == (1, 2, 2)
    assert rows[0]["verdict"] == "lost its place"


def test_rounding_costs_no_place_and_a_visible_loss_does(study: Study) -> None:
    equal = study.candidates(0.02, 0.02 + 1e-7)
    study.selection = put(study.store, "selections", "d" * 32, trials(*equal))
    for name, kl, place in (("1", 0.02 + 2e-7, 1), ("2", 0.02 + 2e-4, 2)):
        again = put(study.store, "reselections", name * 32, trials(*study.candidates(kl, 0.02)))
        found = study.compare(study.retest(name, judged(), judged(None)), again)[0]
        assert (found["place_before"], found["place_after"]) == (1, place)
        assert (found["verdict"] == "lost its place") == (place == 2)
    refused = study.candidates(0.02, 0.02)
    refused[0]["refusals"] = 1  # a count has no resolution
    again = put(study.store, "reselections", "3" * 32, trials(*refused))
    assert study.compare(study.retest("3", judged(), judged(None)), again)[0]["place_after"] == 2


def test_a_place_behind_is_kept_too(study: Study) -> None:
    behind = study.candidates(0.02 + 1e-6, 0.02)
    study.selection = put(study.store, "selections", "d" * 32, trials(*behind))
    ahead = put(study.store, "reselections", "1" * 32, trials(*study.candidates(0.02, 0.02)))
    found = study.compare(study.retest("1", judged(), judged(None)), ahead)[0]
    assert (found["place_before"], found["place_after"]) == (2, 2)
    visibly = put(study.store, "reselections", "2" * 32, trials(*study.candidates(0.01, 0.02)))
    found = study.compare(study.retest("2", judged(), judged(None)), visibly)[0]
    assert found["place_after"] == 1


@pytest.mark.parametrize(
    ("count", "change"), [(1, "within noise"), (5, "within noise"), (6, "drifted")]
)
def test_a_mean_of_few_prompts_has_no_interval_and_is_no_drift(
    study: Study, count: int, change: str
) -> None:
    before, after = (
        [response("harmless", f"g{i}", kl=0.01, n_tokens=n) for i in range(count)]
        + [response("harmful", "h0")]
        for n in (6, 7)
    )
    study.test = put(
        study.store,
        "tests",
        "d" * 32,
        trials(judged(responses=before), judged(None, responses=before)),
    )
    again = study.retest("1", judged(responses=after), judged(None, responses=before))
    tokens = of(study.compare(again), "mean_tokens")
    assert (tokens["difference"], tokens["change"]) == (1.0, change)
    interval = (tokens["low"], tokens["high"])
    assert interval == (pytest.approx((1.0, 1.0)) if count == 6 else (None, None))


def test_one_replaced_prompt_is_no_drift(study: Study) -> None:
    tokens = [4, 5, 6, 7, 8, 9, 10, 11]
    before = [response("harmless", f"g{i}", kl=0.01 * n, n_tokens=n) for i, n in enumerate(tokens)]
    before.append(response("harmful", "h0"))
    after = [response("harmless", "new", kl=0.08, n_tokens=8), *before[1:]]
    study.test = put(
        study.store,
        "tests",
        "d" * 32,
        trials(judged(responses=before), judged(None, responses=before)),
    )
    again = study.retest("1", judged(responses=after), judged(None, responses=after))
    rows = study.compare(again)
    assert {of(rows, name)["change"] for name in ("kl", "mean_tokens")} == {"within noise"}


def test_a_tripped_gate_outweighs_the_place_and_an_old_one_does_not_trip(study: Study) -> None:
    failed = {"gated": True, "gate_reason": "kl 0.6 > 0.5"}
    rows = study.compare(study.retest("1", judged(**failed), judged(None)))
    assert (rows[0]["gated_before"], rows[0]["gated_after"]) == (False, True)
    assert (rows[0]["verdict"], rows[0]["gate_reason"]) == ("gated", "test: kl 0.6 > 0.5")
    gated = [c | failed for c in study.candidates(0.01, 0.02)]
    selection = put(study.store, "reselections", "f" * 32, trials(*gated))
    rows = study.compare(study.retest("2", judged(), judged(None)), selection)
    assert (rows[0]["verdict"], rows[0]["place_after"]) == ("gated", 1)
    assert rows[0]["gate_reason"] == "selection: kl 0.6 > 0.5"
    assert verdict_of(["unchanged"], [1, 1], [True, True]) == "unchanged"


def test_the_worst_decides() -> None:
    assert (
        verdict_of(["unchanged", "drifted", "within noise"], [1, 1], [False, False]) == VERDICTS[2]
    )
    assert verdict_of(["drifted"], [1, 2], [False, False]) == "lost its place"
    assert verdict_of(["unchanged"], [1, 2], [False, True]) == "gated"
    assert verdict_of(["unchanged"], [2, 1], [False, False]) == "unchanged"


def test_no_interval_means_drift_only_where_something_moved() -> None:
    same = Samples(NONE, np.array([math.inf]), np.array([math.inf]), NONE)
    assert change_of("kl", same, None, None) == "unchanged"
    assert (
        change_of("kl", Samples(NONE, same.before, NONE + 0, np.ones(1)), None, None) == "drifted"
    )


def test_comparisons_are_a_chain_that_says_what_holds_now(study: Study) -> None:
    again = study.retest("1", judged(responses=answers(9)), judged(None))
    with running(Runtime(study.store)):
        first = study.record()
        assert study.record() == first
        changed = study.record(again, None, "torch 1 -> 2")
        assert study.record(again, None, "torch 1 -> 2") == changed
        back = study.record()
        last = newest_drift(study.winner)
        assert last is not None
        assert back not in (first, changed)
        assert (last.ref.key, last.notes["number"]) == (back.key, 2)
        other = study.record(again, None, "torch 1 -> 3")
    assert len({first.key, changed.key, back.key, other.key}) == 4
    table = user_query(study.store, "SELECT DISTINCT number, verdict, cause FROM drift")
    assert sorted(table.rows) == [
        (0, "unchanged", None),
        (1, "drifted", "torch 1 -> 2"),
        (2, "unchanged", None),
        (3, "drifted", "torch 1 -> 3"),
    ]


def test_a_torn_comparison_is_made_again(study: Study) -> None:
    with running(Runtime(study.store)):
        first = study.record()
        (study.store.folder("drift", first.key) / "data.parquet").write_bytes(b"torn")
        assert study.record() == first


def test_measured_again_trials_are_in_no_ranking(study: Study) -> None:
    before = user_query(study.store, "SELECT * FROM trials").rows
    study.retest("1", judged(), judged(None))
    put(study.store, "reselections", "f" * 32, trials(*study.candidates(0.03, 0.02)))
    study.compare()
    assert user_query(study.store, "SELECT * FROM trials").rows == before
    counts = "SELECT split, count(*) FROM remeasured GROUP BY split ORDER BY split"
    assert user_query(study.store, counts).rows == (("selection", 2), ("test", 2))
    places = "SELECT count(*) FROM ranking WHERE split = 'test'"
    assert user_query(study.store, places).rows == ((2,),)


def test_the_test_split_stays_with_its_trial_when_measured_again(store: Store) -> None:
    opened = Ref("prompts", "c" * 32, "d" * 64)
    protocol = Ref("protocols", PROTOCOL, "e" * 64)
    inputs = {"protocol": protocol, "prompts.harmful": opened}
    put(store, "retests", "1" * 32, trials(judged()), inputs=inputs, notes={"trial": 0})
    refuse_other_trials(store, PROTOCOL, {"harmful": opened}, 0)
    with pytest.raises(TestSplitSpent, match="opened for trial 0"):
        refuse_other_trials(store, PROTOCOL, {"harmful": opened}, 1)
    refuse_other_trials(store, PROTOCOL, {"harmful": Ref("prompts", "f" * 32, "a" * 64)}, 1)


def model(store: Store, key: str, **facts: Any) -> Ref:
    row = {"identity": "sha256:" + "0" * 64, "dtype": "float32", "response_prefix": ""} | facts
    return put(store, "models", key * 32, pl.DataFrame([row], schema=polars_schema(MODELS)))


def test_causes_name_what_differs_of_the_model(store: Store) -> None:
    old = model(store, "0")
    commits = [model(store, str(i), identity=f"hub:a/b@{str(i) * 40}") for i in (1, 2)]
    with running(Runtime(store)):
        assert model_causes(old, old) == []
        moved = model(store, "3", identity="sha256:" + "3" * 64, response_prefix="Sure")
        assert model_causes(old, moved) == [
            f"model content {'0' * 12} -> {'3' * 12}",
            "model response_prefix '' -> 'Sure'",
        ]
        (revision,) = model_causes(*commits)
        assert revision == f"model revision hub:a/b@{'1' * 12} -> hub:a/b@{'2' * 12}"


def prompts(store: Store, key: str, *ids: str) -> dict[str, Ref]:
    rows = [{"class": "harmful", "split": "test", "prompt_id": i, "text": i} for i in ids]
    return {
        "harmful": put(
            store, "prompts", key * 32, pl.DataFrame(rows, schema=polars_schema(PROMPTS))
        )
    }


def test_causes_count_prompts_and_ignore_their_order(store: Store) -> None:
    old = prompts(store, "0", "a", "b", "c")
    with running(Runtime(store)):
        assert prompt_causes("test", old, prompts(store, "1", "c", "b", "a")) == []
        new = prompts(store, "2", "c", "d", "e", "f")
        assert prompt_causes("test", old, new) == ["test prompts: 3 new, 2 gone"]
        more = prompts(store, "3", "a", "b", "c", "d")
        assert prompt_causes("selection", old, more) == ["selection prompts: 1 new"]


def test_causes_name_a_labeller_that_labels_otherwise(store: Store) -> None:
    refusal = response("harmful", "p0", response="I cannot do that.", refused=True)
    right = put(store, "tests", "1" * 32, trials(judged(responses=[refusal])))
    wrong = put(
        store, "tests", "2" * 32, trials(judged(responses=[refusal | {"refused": False}, refusal]))
    )
    with running(Runtime(store)):
        assert labeller_causes("heretic-33", [right]) == []
        assert labeller_causes("heretic-33", [right, wrong]) == [
            "labeller heretic-33: 1 of 3 labels"
        ]


def test_causes_name_versions_that_are_told_of_both_times() -> None:
    then = {"torch": "2.12.0", "transformers": "5.23.0", LABELLERS: "a"}
    now = {"torch": "2.13.0", "transformers": "5.23.0", "tokenizers": "1", LABELLERS: "b"}
    assert library_causes(then, now) == ["torch 2.12.0 -> 2.13.0"]
    assert library_causes(now, now) == []


def test_a_device_is_told_where_both_times_name_one() -> None:
    made = [
        Manifest("tests", "0", 1, provenance={"device": device})
        for device in ("cpu", "cuda:0 NVIDIA H100", "cuda:1 NVIDIA H100", "cuda:0 NVIDIA L4")
    ]
    assert device_causes(made[0], made[1]) == ["device cpu -> cuda NVIDIA H100"]
    assert device_causes(made[1], made[3]) == ["device cuda NVIDIA H100 -> cuda NVIDIA L4"]
    assert device_causes(made[1], made[2]) == []  # one like it
    assert device_causes(made[0], made[0]) == []
    for untold in ({}, {"device": "default"}):
        assert device_causes(made[0], Manifest("retests", "0", 1, provenance=untold)) == []
    cuda = Manifest("retests", "0", 1, provenance={"device": "cuda:0"})  # which one is not told
    assert device_causes(cuda, made[1]) == []


def test_the_environment_names_libraries_stages_and_labellers() -> None:
    found = environment()
    assert {"torch", "transformers", "tokenizers", "tribunal", "tests stage"} <= set(found)
    assert LABELLERS in found
    assert all(isinstance(value, str) for value in found.values())


def test_each_study_has_the_winner_it_froze_last_and_its_first_measurement(study: Study) -> None:
    later = {"provenance": {"created": "2026-02-01T00:00:00Z"}}
    put(
        study.store,
        "tests",
        "9" * 32,
        trials(judged()),
        inputs={"winner": study.winner, "protocol": study.protocol},
        notes={"trial": 0},
        **later,
    )
    (frozen,) = frozen_winners(study.store)
    assert (frozen.study, frozen.winner.ref, frozen.test.key) == (
        study.name,
        study.winner,
        study.test.key,
    )
    assert frozen.only
    again = pl.DataFrame([{"trial": 1}], schema=polars_schema(WINNER))
    winner = put(
        study.store,
        "winners",
        "8" * 32,
        again,
        inputs={"protocol": study.protocol},
        notes={"selection": study.selection.key},
        **later,
    )
    assert frozen_winners(study.store) == []  # frozen, and not tested yet
    put(study.store, "tests", "7" * 32, trials(judged()), inputs={"winner": winner})
    (frozen,) = frozen_winners(study.store)
    assert (frozen.winner.ref, frozen.only) == (winner, False)


def test_a_stored_set_is_of_its_source_whatever_that_holds_today(
    store: Store, tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n")
    source = PromptSource(source=str(file), split="train[:1]")
    with running(Runtime(store)):
        ref = load_prompts(prompt_class="harmful", split="test", source=source)
    stored = store.manifest(ref.kind, ref.key)
    file.write_text("three\n")
    assert is_source_of(source, stored)
    for change in (
        {"split": "train[1:2]"},
        {"source": "b.txt"},
        {"prefix": "x"},
        {"source": "a/b"},
    ):
        assert not is_source_of(source.model_copy(update=change), stored)
    of_hub = Manifest("prompts", "0", 1, identity={"source": {"source": "a/b", "revision": "main"}})
    assert is_source_of(PromptSource(source="a/b", revision="main"), of_hub)
    assert not is_source_of(PromptSource(source="a/c", revision="main"), of_hub)
    assert not is_source_of(PromptSource(source="a/b", revision="dev"), of_hub)


@pytest.mark.parametrize(
    "kind", [KeyError, TypeError, ImportError, RuntimeError, pl.exceptions.ComputeError]
)
def test_whatever_fails_a_study_the_next_one_is_checked(
    study: Study, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    (frozen,) = frozen_winners(study.store)

    def fail(*_: object) -> None:
        raise kind("no\n(hf_" + "a" * 20)

    monkeypatch.setattr("flows.drift.check_winner", fail)
    with running(Runtime(study.store)):
        found = check_winners([frozen, frozen])
    assert [o.verdict for o in found] == ["not measured"] * 2
    error = str(found[0].error)
    assert error.startswith(f"{kind.__name__}: ")
    assert "***" in error
    assert "aaaa" not in error
    assert "\n" not in error


def test_studies_are_found_by_name_or_refused(study: Study, tmp_path: Path) -> None:
    put(study.store, "generations", "6" * 32, trials(trial_row(0)))
    assert [w.study for w in winners_to_check(study.store, None)] == [study.name]
    twice = winners_to_check(study.store, ["village", study.name])
    assert [w.study for w in twice] == [study.name]
    with pytest.raises(ConfigError, match=r"no study 'vilage'.*did you mean"):
        winners_to_check(study.store, ["vilage"])
    with pytest.raises(ConfigError, match="no frozen winner"):
        winners_to_check(Store(tmp_path / "empty"), None)


def test_an_occasion_is_the_words_or_the_time() -> None:
    assert occasion_of(False, None) is None
    assert occasion_of(False, "new driver") == occasion_of(True, "new driver") == "new driver"
    time = occasion_of(True, None)
    assert time is not None
    assert time.startswith("20")


def outcome(study: Study, ref: Ref | None, selection: Ref | None = None, **facts: Any) -> Outcome:
    rows = tuple(study.compare(ref, selection, "torch 1 -> 2"))
    return Outcome(study.name, Ref("drift", "d" * 32, "0" * 64), rows, **facts)


@pytest.fixture
def held(study: Study) -> Outcome:
    return outcome(study, study.retest("1", judged(responses=answers(9)), judged(None)))


@pytest.fixture
def lost(study: Study) -> Outcome:
    again = put(study.store, "reselections", "f" * 32, trials(*study.candidates(0.03, 0.02)))
    return outcome(study, study.retest("2", judged(), judged(None)), again, news=True)


FAILED = Outcome("moor-123456", error="no model folder './gone' | see docs")


def test_the_exit_state_says_whether_all_hold(study: Study, held: Outcome, lost: Outcome) -> None:
    same = Outcome(study.name, Ref("drift", "d" * 32, "0" * 64), tuple(study.compare()))
    states = [state_of(told) for told in ([same], [same, held], [lost, held], [FAILED, same])]
    assert [(s.type.value, s.name) for s in states] == [
        ("COMPLETED", "Unchanged"),
        ("COMPLETED", "Completed"),
        ("FAILED", "Drifted"),
        ("FAILED", "Unmeasured"),
    ]
    assert "lost its place" in str(states[2].message)
    assert "no model folder './gone'" in str(states[3].message)
    assert state_of([lost, FAILED]).name == "Drifted"


def test_events_tell_what_happened_to_a_winner(held: Outcome, lost: Outcome) -> None:
    ((name, payload),) = events_of(lost)
    assert name == "lost-place"
    assert (payload["place_before"], payload["place_after"]) == (1, 2)
    assert payload["cause"] == "torch 1 -> 2"
    ((name, payload),) = events_of(held)
    assert name == "drifted"
    assert [metric["metric"] for metric in payload["drifted"]] == ["refusals"]
    assert json.loads(json.dumps(payload)) == payload
    assert events_of(FAILED) == []
    assert [resource_of(o)["tribunal.news"] for o in (held, lost)] == ["false", "true"]


def test_what_the_ui_shows_names_studies_causes_and_failures(held: Outcome, lost: Outcome) -> None:
    rows = table_of([held, lost, FAILED])
    assert {row["verdict"] for row in rows} == {"drifted", "lost its place", "not measured"}
    assert rows[-1] == {
        "study": "moor-123456",
        "verdict": "not measured",
        "cause": "no model folder './gone' | see docs",
    }
    text = summary_of([held, lost, FAILED])
    assert text.startswith("# 1 of 3 winners hold")
    assert "torch 1 -> 2" in text
    assert "1 → 2 of 2" in text
    assert "refusals: 0 → 0.9" in text
    assert "'./gone' \\| see docs" in text


def test_what_is_infinite_is_valid_json_too(study: Study) -> None:
    found = outcome(study, study.retest("1", judged(responses=answers(kl=math.inf)), judged(None)))
    for told in (table_of([found]), events_of(found)):
        assert "null" in json.dumps(told, allow_nan=False)
    assert "inf" in summary_of([found])


def test_the_flow_takes_the_parameters_of_its_deployment() -> None:
    assert rebenchmark.validate_parameters({"studies": None, "force": False})
    assert rebenchmark.validate_parameters({"studies": ["organism"], "force": True})


def test_the_documented_automation_is_one() -> None:
    from prefect.events.schemas.automations import AutomationCore

    text = (ROOT / "docs" / "rebenchmark.md").read_text()
    block = text.split("```yaml\n")[1].split("```")[0]
    automation = AutomationCore.model_validate(yaml.safe_load(block))
    assert automation.trigger.expect == {"tribunal.winner.lost-place", "tribunal.winner.gated"}


def test_stored_drift_is_shown_in_eighty_columns(study: Study) -> None:
    study.compare(study.retest("1", judged(responses=answers(9)), judged(None)), None, "x" * 99)
    study.compare()
    put(study.store, "generations", "6" * 32, trials(trial_row(0)))
    last = tribunal(study.store, "drift", "village")
    assert last.returncode == 0, last.stderr
    assert "unchanged" in last.stdout
    assert "drifted" not in last.stdout
    every = tribunal(study.store, "drift", "--all")
    assert "+0.9 (" in every.stdout
    assert max(map(len, every.stdout.splitlines())) <= 80
    rows = json.loads(tribunal(study.store, "drift", "--all", "--format", "json").stdout)
    assert len(rows) == 18
    assert [row["number"] for row in rows] == [1] * 9 + [0] * 9
    text = tribunal(study.store, "drift", "--format", "csv").stdout
    assert text.splitlines()[0].startswith("study,protocol,arm,trial,number")
    assert len(text.splitlines()) == 10


def test_a_new_winner_is_shown_in_place_of_the_old_ones_comparisons(study: Study) -> None:
    study.compare(study.retest("1", judged(responses=answers(9)), judged(None)))
    study.compare()
    old = study.winner
    study.winner = put(
        study.store,
        "winners",
        "8" * 32,
        study.store.read(old),
        inputs={"protocol": study.protocol},
        notes={"selection": study.selection.key},
        provenance={"created": "2026-02-01T00:00:00Z"},
    )
    study.compare(study.retest("2", judged(), judged(None)), None, "torch 1 -> 2")
    put(study.store, "generations", "6" * 32, trials(trial_row(0)))
    rows = json.loads(tribunal(study.store, "drift", "--format", "json").stdout)
    assert {(row["winner"], row["number"]) for row in rows} == {(study.winner.key, 0)}
    every = json.loads(tribunal(study.store, "drift", "--all", "--format", "json").stdout)
    assert {(row["winner"], row["number"]) for row in every} == {
        (old.key, 0),
        (old.key, 1),
        (study.winner.key, 0),
    }


def test_drift_of_nothing_is_one_line(study: Study) -> None:
    put(study.store, "generations", "6" * 32, trials(trial_row(0)))
    for words, line in (
        (["drift", "village"], f"no drift of study '{study.name}' yet"),
        (["rebenchmark", "vilage"], "no study 'vilage'"),
    ):
        done = tribunal(study.store, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert line in done.stderr
        assert len(done.stderr.splitlines()) == 1


class Hub(BaseHTTPRequestHandler):
    """A hub whose one data set is at commit 2222..."""

    def do_GET(self) -> None:
        known = self.path.startswith("/api/datasets/a/b/revision/main")
        body = json.dumps({"id": "a/b", "sha": "2" * 40} if known else {"error": "none"}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def newest_by(hub: str, store: Store, settings: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a process with that hub makes of sources: the revision, or the error."""
    code = """
import json
from artifacts.errors import PromptError
from artifacts.specs import PromptSource
from tasks.remeasure import newest
found = {}
for name in ("a/b", "a/gone"):
    for commit in ("1" * 40, "2" * 40):
        source = PromptSource(source=name, revision="main")
        try:
            found[f"{name}@{commit[0]}"] = newest(source, f"{name}@{commit}").revision
        except PromptError as error:
            found[f"{name}@{commit[0]}"] = str(error)
print(json.dumps(found))
"""
    online = {k: v for k, v in small_environment(store).items() if k != "HF_HUB_OFFLINE"}
    whole = online | {"HF_ENDPOINT": hub, "NO_PROXY": "127.0.0.1"} | (settings or {})
    done = subprocess.run(
        [sys.executable, "-c", code], env=whole, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_branch_that_moved_is_read_at_its_new_commit(hub: str, store: Store) -> None:
    found = newest_by(hub, store)
    assert found["a/b@1"] == "2" * 40
    assert found["a/b@2"] == "main"  # still the newest: the source, and so its key, stays
    assert "cannot look up data set 'a/gone' at 'main'" in found["a/gone@1"]
    switched_off = newest_by(hub, store, {"HF_HUB_OFFLINE": "1"})
    assert set(switched_off.values()) == {"main"}


def test_a_file_and_a_pinned_commit_need_no_hub(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n")
    for source in (
        PromptSource(source=str(tmp_path / "x.txt")),
        PromptSource(source="a/b", revision="3" * 40),
    ):
        assert newest(source, "whatever") is source
    with pytest.raises(PromptError):
        newest(PromptSource(source=str(tmp_path / "gone.txt")), "whatever")


def test_a_models_branch_is_not_taken_from_the_cache_of_a_hub_out_of_reach(
    store: Store, tmp_path: Path
) -> None:
    commit = "4" * 40
    ref = tmp_path / "models--a--b" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(commit)
    code = """
from artifacts.errors import ModelError
from tasks.models.identity import require_hub, resolve
print(resolve("a/b").revision)
require_hub("a/b", "5" * 40)
require_hub("organism")
try:
    require_hub("a/b")
    print("held")
except ModelError as error:
    print(error)
"""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    for offline, said in (("0", "cannot look up 'a/b' at 'main'"), ("1", "held")):
        env = small_environment(store) | nowhere
        env |= {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == commit
        assert said in done.stdout.splitlines()[1]


def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(PromptError, match="OSError"):
        newest(PromptSource(source="a/b"), "a/b@" + "1" * 40)
    with pytest.raises(ModelError, match="OSError"):
        require_hub("a/nowhere")


def test_provenance_names_the_device_in_use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with running(Runtime(store)):
        assert _device() == "cpu"
        with monkeypatch.context() as without:
            without.delitem(sys.modules, "torch")
            assert _device() == "default"
    for name, value in (
        ("is_initialized", True),
        ("current_device", 0),
        ("device_count", 2),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU{number}")
    for facts, told in (
        ({}, "cuda:0 GPU0"),
        ({"device": "cuda:1"}, "cuda:1 GPU1"),
        ({"device": "cpu"}, "cpu"),
        ({"device_map": "auto"}, "cuda:0 GPU0, cuda:1 GPU1"),
    ):
        with running(Runtime(store, **facts)):
            assert _device() == told
