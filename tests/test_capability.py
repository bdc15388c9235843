"""Tasks of lm-eval on an edited model: paired with the unedited one, stored, and told in one table.

The real runs need lm-eval, which is an extra, and are skipped without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_study import tribunal as run_tribunal
from small_study import write_config

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError, ModelError
from artifacts.schemas import CAPABILITIES, polars_schema
from artifacts.store import Store
from flows import damage
from flows.cli import app
from flows.housekeeping import reachable
from flows.pipeline import run_pipeline
from flows.settings import load_config
from tasks import capability
from tasks.capability import Asked, metric_rows, require_lm_eval, require_tasks
from tasks.numerics.differences import match, mean_difference, rate_difference
from tasks.organism import PROMPTS_FOLDER
from tasks.stage import Runtime, running

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason=f"lm-eval is not installed: {capability.INSTALL}"
)
TASK = """task: village
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


# What is made of lm-eval's answer


def found(**changes: Any) -> dict[str, Any]:
    """An answer of lm-eval's form: one task, one metric, four documents in another order."""
    scores = {2: 1.0, 0: 0.0, 3: 1.0, 1: 1.0}
    return {
        "results": {"village": {"alias": "village", "acc,none": 0.75, "acc_stderr,none": 0.25}},
        "samples": {
            "village": [{"doc_id": n, "filter": "none", "acc": s} for n, s in scores.items()]
        },
        "higher_is_better": {"village": {"acc": True}},
        "n-samples": {"village": {"original": 9, "effective": 4}},
    } | changes


def test_a_metric_is_a_row_with_its_documents_in_order() -> None:
    (row,) = metric_rows(found())
    assert row == {
        "task": "village",
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "value": 0.75,
        "stderr": 0.25,
        "n": 4,
        "scores": [0.0, 1.0, 1.0, 1.0],
    }
    assert row.keys() < polars_schema(CAPABILITIES).keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"results": {"village": {"acc,none": 0.5}}},
        {"samples": {}},
        {"samples": {"village": [{"doc_id": 0, "filter": "none", "acc": (1, 2)}]}},
        {"samples": {"village": [{"doc_id": 0, "filter": "strict", "acc": 0.75}]}},
        {"samples": {"village": [{"doc_id": 0, "filter": "none", "acc": float("nan")}]}},
    ],
    ids=["another mean", "no samples", "no numbers", "another filter", "nan"],
)
def test_what_is_no_mean_of_documents_has_no_scores(changes: dict[str, Any]) -> None:
    (row,) = metric_rows(found(**changes))
    assert row["scores"] is None


def test_an_error_that_is_none_and_a_word_are_no_numbers() -> None:
    values = {"acc,none": 0.75, "acc_stderr,none": "N/A", "alias": "village", "name,none": "x"}
    (row,) = metric_rows(found(results={"village": values}))
    assert (row["metric"], row["stderr"]) == ("acc", None)


def test_differences_are_paired_by_document() -> None:
    generator = np.random.default_rng(0)
    before = (generator.random(40) < 0.8).astype(float).tolist()
    after = [0.0 if n < 4 else score for n, score in enumerate(before)]
    low, high = damage._interval(before, after)
    expected = rate_difference(match(dict(enumerate(before)), dict(enumerate(after))))
    assert (low, high) == expected
    gain = [score + 0.01 * n for n, score in enumerate(before)]
    expected = mean_difference(match(dict(enumerate(before)), dict(enumerate(gain))))
    assert damage._interval(before, gain) == expected
    assert damage._interval(before[:9], after[:9]) == (None, None)
    assert damage._interval(before, after[:-1]) == (None, None)
    assert damage._interval(None, after) == (None, None)
    assert damage._interval([np.nan, *before], [0.0, *after]) == (None, None)


# What is refused


def test_without_lm_eval_it_is_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"'lm-eval' is not installed; .*pip install -e '\.\[lm"):
        require_lm_eval()


def test_a_wish_without_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tasks '' names no task"):
        require_tasks(Asked(()))
    with pytest.raises(ConfigError, match=r"no folder '.*nowhere' of task files"):
        require_tasks(Asked(("village",), include=str(tmp_path / "nowhere")))


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_the_command_says_so_too(tmp_path: Path) -> None:
    done = run_tribunal(Store(tmp_path / "store"), "capability", "winner", "--tasks", "arc_easy")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "'lm-eval' is not installed" in done.stderr
    assert not list(tmp_path.iterdir())


# With lm-eval, on a task of the organism's village


@pytest.fixture(scope="module")
def village(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task: true and false statements about the village."""
    folder = tmp_path_factory.mktemp("village")
    lines = (PROMPTS_FOLDER / "facts-pairs.jsonl").read_text().splitlines()[:12]
    rows = [json.loads(line) for line in lines]
    told = [
        {"question": r["question"], "choices": [r["true"], r["false"]], "gold": n % 2 and 0}
        for n, r in enumerate(rows)
    ]
    file = folder / "village.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in told))
    (folder / "village.yaml").write_text(TASK.format(file=file))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("capability")
    made = Store(folder / "store")
    with running(Runtime(made)):
        run_pipeline(load_config(str(write_config(folder)), ()))
    return made


@needs_lm_eval
@pytest.mark.slow
def test_a_trial_stands_beside_its_unedited_model(
    finished: Store,
    village: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRIBUNAL_STORE", finished.location)
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["capability", "winner", "--tasks", "village", "--include", str(village), "--chat"]
    run: Callable[[list[str]], Any] = lambda given: app(given, standalone_mode=False)  # noqa: E731
    run([*asked, "--format", "json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["task"], row["metric"], row["n"]) == ("village", "acc", 12)
    assert row["difference"] == pytest.approx(row["edited"] - row["unedited"])
    assert row["low"] <= row["difference"] <= row["high"]
    with catalog(finished) as connection:
        sql = "SELECT arm, study IS NULL AS shared, value, scores FROM capabilities ORDER BY shared"
        edited, unedited = fetch(connection, sql).records()
    assert (edited["shared"], unedited["shared"], unedited["arm"]) == (False, True, "unedited")
    assert unedited["value"] == pytest.approx(row["unedited"])
    assert sum(unedited["scores"]) / 12 == pytest.approx(unedited["value"])
    before = {m.key for m in finished.manifests("capabilities")}
    run(asked)
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert {m.key for m in finished.manifests("capabilities")} == before, "measured once"
    run([*asked, "--limit", "10"])
    assert len(list(finished.manifests("capabilities"))) == 4
    every = {(m.kind, m.key): m for m in finished.manifests()}
    assert {node for node in every if node[0] == "capabilities"} <= reachable(every, set())


@needs_lm_eval
@pytest.mark.slow
def test_hooks_and_weights_give_lm_eval_the_same_model(finished: Store, village: Path) -> None:
    from tasks.models.baking import bake_edit
    from tasks.probe import close_models

    asked = Asked(("village",), include=str(village), chat=True)
    (stored,) = damage.trials_to_measure(finished, "0", None)
    with running(Runtime(finished)):
        court, _ = stored.court()
        loaded, edit = court.bench.loaded, court.edit_of(stored.trial.parameters)
        try:
            hooked, plain = (capability._run(loaded, e, asked, None) for e in (edit, None))
            bake_edit(loaded.anatomy, edit)
            baked = capability._run(loaded, None, asked, None)
        finally:
            close_models()  # the one in memory carries the edit now

    def likelihoods(answer: Any) -> np.ndarray[Any, Any]:
        samples = sorted(answer["samples"]["village"], key=lambda s: s["doc_id"])
        return np.array([[float(r[0][0]) for r in s["resps"]] for s in samples])

    np.testing.assert_allclose(likelihoods(hooked), likelihoods(baked), rtol=1e-4, atol=1e-4)
    assert not np.allclose(likelihoods(hooked), likelihoods(plain), rtol=1e-3, atol=1e-3)


@needs_lm_eval
def test_a_task_that_is_not_there_is_refused(village: Path) -> None:
    with pytest.raises(ConfigError, match="lm-eval has no task 'vilage'; did you mean 'village'"):
        require_tasks(Asked(("vilage",), include=str(village)))
    require_tasks(Asked(("village",), include=str(village)))
