"""KL along responses: that of float64 weights edited by hand, exactly 0 for no edit, told whole."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.special import rel_entr, softmax
from small_study import tribunal as run_tribunal
from small_study import write_config
from test_decoding import loaded, prompts, some_edit
from tiny_models import COMMON, LAYERS, each

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError, ModelError
from artifacts.store import Ref, Store
from flows import damage, results
from flows.cli import app
from flows.housekeeping import reachable
from flows.pipeline import run_pipeline
from flows.settings import load_config
from tasks.damage import measure_damage
from tasks.models import forced, lens
from tasks.models.anatomy import COMPONENTS
from tasks.models.baking import bake
from tasks.models.decoding import Response, decode
from tasks.models.editing import Edit, build_edit
from tasks.models.forced import Forced, forced_divergences
from tasks.models.loading import LoadedModel
from tasks.numerics.along import bins, course
from tasks.stage import Runtime, running


def answers(held: LoadedModel, new: int = 9) -> list[Response]:
    (said,) = decode(held, prompts(), max_new_tokens=new, rows=4)
    found = [Response(t, e) for t, e in zip(said.tokens, said.ended, strict=True)]
    return [*found[:-1], Response(found[-1].tokens[:3], True)]  # one that ends early, at least


def measured(held: LoadedModel, edit: Edit, rows: int = 4) -> list[Forced]:
    return forced_divergences(held, prompts(), answers(held), edit, rows=rows)


def plain(base: Any, edited: Any, prompt: list[int], response: Response) -> np.ndarray[Any, Any]:
    """One unpadded pass of each float64 model, every logit, scipy's relative entropy."""
    ids = torch.tensor([[*prompt, *response.tokens]])
    with torch.no_grad():
        p, q = (softmax(m(input_ids=ids).logits[0].numpy(), axis=-1) for m in (base, edited))
    count = len(response.tokens) + response.ended
    first = len(prompt) - 1
    found: np.ndarray[Any, Any] = rel_entr(p, q).sum(-1)[first : first + count]
    return found


def test_it_is_the_float64_kl_of_weights_edited_by_hand() -> None:
    held = loaded("llama")
    generator = torch.Generator().manual_seed(5)
    vectors = torch.nn.functional.normalize(
        torch.randn(LAYERS, held.anatomy.hidden_size, generator=generator), dim=-1
    )
    weight = 6.0  # a large edit, whose KL differs from that the other way round
    edit = build_edit(
        held.anatomy,
        dict.fromkeys(COMPONENTS, vectors),
        dict.fromkeys(COMPONENTS, [weight] * LAYERS),
        "none",
        "module",
    )
    base = copy.deepcopy(held.model).double()
    edited = copy.deepcopy(base)
    for layer, v in zip(edited.model.layers, vectors.double(), strict=True):
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            matrix.data -= weight * torch.outer(v, v @ matrix.data)
    said = answers(held)
    for found, prompt, response in zip(measured(held, edit), prompts(), said, strict=True):
        expected = plain(base, edited, prompt, response)
        np.testing.assert_allclose(found.kl, expected, rtol=1e-3, atol=1e-6)
        wrong = plain(edited, base, prompt, response)
        assert not np.allclose(found.kl, wrong, rtol=1e-2, atol=1e-3), "KL has a direction"


@pytest.mark.parametrize("name", each([name for name in sorted(COMMON) if name != "llama"]))
def test_every_architecture_agrees_with_its_baked_weights(name: str) -> None:
    held = loaded(name)
    edit, arguments = some_edit(held, 3)
    baked = loaded(name)
    bake(baked.anatomy, **arguments)
    said = answers(held)
    found = measured(held, edit)
    for one, prompt, response in zip(found, prompts(), said, strict=True):
        expected = plain(held.model, baked.model, prompt, response)
        np.testing.assert_allclose(one.kl, expected, rtol=2e-2, atol=2e-4)


def test_no_edit_is_exactly_zero_and_any_edit_is_not() -> None:
    held = loaded()
    still = measured(held, Edit({}))
    assert all((one.kl == 0).all() and not one.changed.any() for one in still)
    moved = measured(held, some_edit(held, 1)[0])
    assert all((one.kl > 0).all() for one in moved)
    assert any(one.changed.any() for one in moved)


def test_batches_padding_and_chunks_change_nothing_but_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = loaded()
    edit, _ = some_edit(held, 2)
    alone = measured(held, edit, rows=1)
    together = measured(held, edit, rows=9)
    monkeypatch.setattr(forced, "LENS_NUMBERS", 1)  # one place at a time
    monkeypatch.setattr(lens, "PASS_TOKENS", 20)
    chunked = measured(held, edit, rows=9)
    for one, other, third in zip(alone, together, chunked, strict=True):
        np.testing.assert_allclose(one.kl, other.kl, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(one.kl, third.kl, rtol=1e-3, atol=1e-7)


def test_the_end_of_a_response_is_a_token_and_what_follows_is_none() -> None:
    held = loaded()
    edit, _ = some_edit(held, 2)
    (prompt,) = prompts(1)
    tokens = [5, 9, 11]
    ended, cut = (
        forced_divergences(held, [prompt], [Response(tokens, end)], edit, rows=1)[0]
        for end in (True, False)
    )
    assert (ended.kl.size, cut.kl.size) == (4, 3)
    np.testing.assert_allclose(ended.kl[:3], cut.kl, rtol=1e-4)
    (silent,) = forced_divergences(held, [prompt], [Response([], True)], edit, rows=1)
    np.testing.assert_allclose(silent.kl, ended.kl[:1], rtol=1e-4)


def test_what_cannot_be_measured_is_refused() -> None:
    held = loaded()
    (prompt,) = prompts(1)
    with pytest.raises(ModelError, match="answer 0 has no tokens"):
        forced_divergences(held, [prompt], [Response([], False)], Edit({}), rows=1)
    with pytest.raises(ValueError, match="zip"):
        forced_divergences(held, [prompt], [], Edit({}), rows=1)
    with torch.no_grad():
        held.model.get_output_embeddings().weight[7] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        forced_divergences(held, [prompt], [Response([5], False)], Edit({}), rows=1)


# In one line


def test_a_course_is_its_numbers() -> None:
    found = course(np.array([0.5, 0.1, 0.3, 0.9, 0.2]))
    assert (found.first, found.max, found.max_at) == (0.5, 0.9, 3)
    assert found.sum == pytest.approx(2.0)
    assert found.mean == pytest.approx(0.4)
    assert found.curve == pytest.approx((0.5, 0.1, 0.6, 0.2))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 9, 64, 65])
def test_the_bins_of_a_curve_are_the_response_once(size: int) -> None:
    covered = [token for start, end in bins(size) for token in range(start, end)]
    assert covered == list(range(size))
    assert [end - start for start, end in bins(64)] == [1, 1, 2, 4, 8, 16, 32]
    weights = np.array([end - start for start, end in bins(size)])
    values = np.random.default_rng(size).random(size)
    assert np.average(course(values).curve, weights=weights) == pytest.approx(values.mean())


@pytest.mark.parametrize("values", [[], [0.1, math.nan]], ids=["none", "nan"])
def test_no_course_without_numbers(values: list[float]) -> None:
    with pytest.raises(ValueError, match="needs numbers along tokens"):
        course(np.array(values))


# On a study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished study, whose damage the tests below measure."""
    folder = tmp_path_factory.mktemp("damage")
    made = Store(folder / "store")
    with running(Runtime(made)):
        run_pipeline(load_config(str(write_config(folder)), ()))
    return made


def damaged(store: Store, text: str) -> tuple[pl.DataFrame, Ref]:
    (stored,) = damage.trials_to_measure(store, text, None)
    with running(Runtime(store)):
        ref = measure_damage(stored)
    return store.read(ref), ref


def test_its_first_token_is_the_kl_of_the_ranking(finished: Store) -> None:
    frame, _ = damaged(finished, "winner")
    study = results.find_study(finished, None)
    with catalog(finished) as connection:
        sql = (
            "SELECT prompt_id, kl FROM responses WHERE study = ? AND trial = ? "
            "AND split = 'search' AND class = 'harmless'"
        )
        known = dict(fetch(connection, sql, [study, int(frame["trial"][0])]).rows)
    assert frame.height == len(known) == 8
    for row in frame.to_dicts():
        assert row["kl_first"] == pytest.approx(known[row["prompt_id"]], abs=1e-6)
        assert row["kl_sum"] == pytest.approx(row["kl_mean"] * row["n_tokens"])
        assert 1 <= row["n_tokens"] <= 12
        assert 0 <= row["changed"] <= row["n_tokens"]
    (named,) = (m for m in finished.manifests("sequence_kl"))
    assert named.notes["responses_differ"] == 0


def test_a_trial_is_measured_once_and_trials_apart(finished: Store) -> None:
    _, first = damaged(finished, "0")
    assert damaged(finished, "0")[1] == first
    frame, other = damaged(finished, "1")
    assert other.key != first.key
    assert set(frame["trial"]) == {1}


def test_it_stays_as_long_as_its_study(finished: Store) -> None:
    _, ref = damaged(finished, "0")
    every = {(m.kind, m.key): m for m in finished.manifests()}
    assert (ref.kind, ref.key) in reachable(every, set())
    roots = ("studies", "winners", "tests", "leaderboards", "figures")
    orphans = {node: m for node, m in every.items() if node[0] not in roots}
    assert (ref.kind, ref.key) not in reachable(orphans, set())


@pytest.mark.slow
def test_the_command_tells_the_winner_and_its_fellow_candidates(
    finished: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIBUNAL_STORE", finished.location)
    monkeypatch.setenv("COLUMNS", "80")
    run: Callable[[list[str]], Any] = lambda given: app(given, standalone_mode=False)  # noqa: E731
    run(["damage"])
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    run(["damage", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2
    assert [row["frozen"] for row in rows] == [True, False]
    for row in rows:
        frame, _ = damaged(finished, str(row["trial"]))
        assert row["kl_mean"] == pytest.approx(frame["kl_mean"].mean())
        low, high = row["kl_mean_interval"]
        assert low <= row["kl_mean"] <= high
        assert f"{row['trial']}" in table
    with pytest.raises(ConfigError, match="no trial '99'"):
        run(["damage", "99"])


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    empty = Store(tmp_path / "store")
    done = run_tribunal(empty, "damage")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "no study in the store" in done.stderr
    assert not list(tmp_path.iterdir())
