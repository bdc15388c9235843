"""Edits from elsewhere: what a source says and leaves out; a trial here comes out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from peer_files import attributes, iconoclast, journal, reproduce_json
from small_study import digests, trial_table, tribunal, write_config
from trial_rows import put_study, trial_row

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError, PeerError, TribunalError
from artifacts.store import Store
from flows.pipeline import run_pipeline
from flows.reproduce_commands import reproduce
from flows.reproducing import (
    Wanted,
    beyond,
    measured,
    own_recipe,
    rebuild,
    recipe_of,
    refuse_missing,
    same_to_the_bit,
    wanted,
)
from flows.settings import load_config
from tasks.peers.recipes import checked, printed
from tasks.reproduce import points_of
from tasks.stage import Runtime, running

SEED = """
| Metric | This Model | Baseline |
| Harmful Refusals (↓) | **0 / 20** (0.0%) | 1 / 20 |
| Benign Overrefusals (↓) | **0 / 64** (0.0%) | 0 / 64 |
| KL Divergence (↓) | **0.0447** | 0.1854 |
The optimal parameters are in trial #36 of the study:
- direction_method: median
- direction_scope: global
- direction_blend: 0.9344894769725937
- attn.o_proj: max_weight=0.9867, max_weight_position=17.91, min_weight=0.6043, min_weight_distance=14.65
- mlp.down_proj: max_weight=1.4307, max_weight_position=13.69, min_weight=1.3095, min_weight_distance=12.87
"""  # noqa: E501
CONSOLE = """
* Parameters:
  * direction_index = {index}
  * attn.o_proj.max_weight = 0.99
  * attn.o_proj.max_weight_position = 5.00
  * attn.o_proj.min_weight = 0.33
  * attn.o_proj.min_weight_distance = 2.50
  * mlp.down_proj.max_weight = 1.20
  * mlp.down_proj.max_weight_position = 4.00
  * mlp.down_proj.min_weight = 1.21
  * mlp.down_proj.min_weight_distance = 3.00
"""
ORGANISM = load_config("organism")


def test_the_seeds_report_leaves_out_one_parameter() -> None:
    recipe = printed(SEED, "seed")
    assert recipe.missing == ("direction_index",)
    assert recipe.trial == 36
    found = recipe.parameters
    assert (found["direction_scope"], found["direction_method"]) == ("global", "median")
    assert found["attn_o_proj_max_weight"] == 0.9867
    assert found["mlp_down_proj_min_weight"] == pytest.approx(1.3095 / 1.4307, rel=1e-15)
    assert dict(recipe.numbers) == {
        "refusals": 0,
        "n_harmful": 20,
        "overrefusals": 0,
        "n_harmless": 64,
        "kl": 0.0447,
    }
    with pytest.raises(PeerError, match=r"leaves out direction_index.*--search-missing"):
        refuse_missing(wanted(recipe, ORGANISM, None))


@pytest.mark.parametrize(
    ("index", "scope", "missing"),
    [("3.50", "global", ()), ("per layer", "per layer", ())],
)
def test_the_console_of_heretic(index: str, scope: str, missing: tuple[str, ...]) -> None:
    recipe = printed(CONSOLE.format(index=index), "console")
    assert recipe.parameters["direction_scope"] == scope
    assert recipe.missing == missing
    assert recipe.parameters["direction_method"] == "mean"
    assert "direction_method" in recipe.assumed[0]
    # Rounding to two decimals may carry min_weight past max_weight, which no trial has.
    assert recipe.parameters["mlp_down_proj_min_weight"] == 1.0
    refuse_missing(wanted(recipe, ORGANISM, None))


def test_the_model_card_of_heretic_says_the_same() -> None:
    rows = CONSOLE.format(index="3.50").splitlines()[2:]
    card = "\n".join(
        f"| **{name.strip(' *')}** | {value.strip()} |"
        for name, value in (r.split("=") for r in rows)
    )
    card += "\n| **KL divergence** | 0.0312 | 0 |\n| **Refusals** | 7/100 | 97/100 |\n"
    recipe = printed(card, "card")
    assert recipe.parameters == printed(CONSOLE.format(index="3.50"), "console").parameters
    assert (recipe.numbers["refusals"], recipe.numbers["n_harmful"]) == (7, 100)
    assert recipe.numbers["kl"] == 0.0312


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("0.99", "x"), None),
        (("attn.o_proj.max_weight = 0.99", ""), None),
        (("direction_index = 3.50", "direction_index = soon"), "'soon', which is no number"),
        (("direction_index = 3.50", "direction_method = best"), "'best', which is none of"),
        (("= 0.33", "= 0.33\nattn.o_proj.min_weight = 0.34"), "0.33 and 0.34"),
        (("= 0.33", "= 0.33\nattn.o_proj: weight=1"), "a 'weight', which is none of"),
    ],
)
def test_what_a_list_says_wrongly_or_not_at_all(change: tuple[str, str], says: str | None) -> None:
    text = CONSOLE.format(index="3.50").replace(*change)
    if says is None:
        assert printed(text, "list").missing == ("attn_o_proj_max_weight",)
        return
    with pytest.raises(PeerError) as raised:
        printed(text, "list")
    assert says in str(raised.value)


def test_a_list_without_parameters() -> None:
    with pytest.raises(PeerError, match="holds no parameter"):
        printed("Dear reader, nothing is here.", "letter")


@pytest.mark.parametrize("value", ["nan", "Infinity"])
def test_a_parameter_that_is_no_number(tmp_path: Path, value: str) -> None:
    path = tmp_path / "reproduce.json"
    told = json.dumps(reproduce_json()).replace("4.75", value.replace("nan", "NaN"))
    path.write_text(told)
    recipe = recipe_of(Store(tmp_path / "s"), str(path), None, None)
    assert recipe is not None
    with pytest.raises(PeerError, match="direction_index as"):
        checked(recipe)


def test_a_file_with_several_trials_gives_its_best_or_the_one_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    path = journal(tmp_path / "j", [attributes(5, 0.1, 1), attributes(2, 0.3, 2)])
    best, asked = (recipe_of(store, str(path), n, None) for n in (None, 1))
    assert best is not None
    assert asked is not None
    assert (best.numbers["refusals"], asked.numbers["refusals"]) == (2, 5)
    with pytest.raises(PeerError, match="no finished trial '9'"):
        recipe_of(store, str(path), 9, None)


def test_hybrid_needs_its_blend() -> None:
    text = CONSOLE.format(index="3.50") + "direction_method = hybrid"
    assert printed(text, "list").missing == ("direction_blend",)
    assert checked(printed(text, "list"))["direction_blend"] is None


def test_a_method_is_assumed_for_heretic_alone(tmp_path: Path) -> None:
    told = iconoclast(0, 0, 0.1)
    del told["direction_method"], told["direction_blend"]
    path = journal(tmp_path / "j", [told], name="iconoclast")
    recipe = recipe_of(Store(tmp_path / "s"), str(path), None, None)
    assert recipe is not None
    assert recipe.missing == ("direction_method",)


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    path = tmp_path / "reproduce.json"
    path.write_text(json.dumps(reproduce_json()))
    recipe = recipe_of(Store(tmp_path / "s"), str(path), None, None)
    assert recipe is not None
    told = wanted(recipe, ORGANISM, None).differences
    assert "row_normalization is 'full' in the source and 'none' here" in told
    same = load_config("organism", ["edit.row_normalization=full", "model.id=owner/model"])
    assert wanted(recipe, same, None).differences == ()


def test_another_models_layers_are_told_or_refused() -> None:
    assert len(beyond(printed(SEED, "seed"), 8)) == 2
    with pytest.raises(ConfigError, match=r"direction_index '17\.5'"):
        beyond(printed(CONSOLE.format(index="17.5"), "list"), 8)


SPACE = ORGANISM.search.space


def test_one_missing_parameter_is_a_grid_over_its_range() -> None:
    known = checked(printed(SEED, "seed"))
    points = points_of(known, ("direction_index",), SPACE, 8, 5)
    low, high = (7 * share for share in SPACE.direction_index)
    values = [point["direction_index"] for point in points]
    assert values == pytest.approx([low + n * (high - low) / 4 for n in range(5)])
    assert all(point | {"direction_index": None} == known for point in points)
    assert points_of(known, (), SPACE, 8, 5) == [known]


def test_several_missing_parameters_fill_their_ranges() -> None:
    names = ("direction_scope", "direction_index", "attn_o_proj_max_weight")
    points = points_of({}, names, SPACE, 8, 32)
    assert points == points_of({}, names, SPACE, 8, 32)
    assert {point["direction_scope"] for point in points} == set(SPACE.direction_scope)
    low, high = SPACE.attn_o_proj.max_weight
    weights = [point["attn_o_proj_max_weight"] for point in points]
    assert max(low, 0) <= min(weights) < max(low, 0) + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < max(weights) <= high


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "nowhere.txt"}, "no file 'nowhere.txt'"),
        ({"source": "village/99"}, "no trial '99'"),
        ({"source": "elsewhere/0"}, "no study 'elsewhere'"),
        ({"source": "village/0", "trials": 3}, "--trials '3' is for --search-missing"),
        ({"source": "village/0", "overrides": ["a=b"]}, "--set changes the config of --model"),
        ({"source": "seed.txt"}, "'seed.txt' says nothing of prompts"),
        ({"source": "seed.txt", "model": "organism"}, "'seed.txt' leaves out direction_index"),
    ],
)
def test_bad_calls_are_told_before_anything_is_made(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    says: str,
) -> None:
    put_study(store, trial_row(0))
    (tmp_path / "seed.txt").write_text(SEED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIBUNAL_STORE", store.location)
    before = digests(store)
    with pytest.raises(TribunalError) as raised:
        reproduce(**options)
    assert says in str(raised.value)
    assert digests(store) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A store with a small study, and its config."""
    folder = tmp_path_factory.mktemp("small")
    store, config = Store(folder / "store"), write_config(folder)
    with running(Runtime(store)):
        run_pipeline(load_config(str(config)))
    return store, config


def rebuilt(store: Store, what: Wanted, points: int = 1) -> list[dict[str, Any]]:
    with running(Runtime(store)):
        return measured(store, rebuild(what, points, store))


@pytest.mark.slow
def test_every_trial_here_comes_out_to_the_bit(small: tuple[Store, Path]) -> None:
    store, config = small
    before = trial_table(store)
    for row in before.filter(pl.col("split") == "search").to_dicts():
        name = f"{row['study']}/{row['trial']}"
        found = own_recipe(store, name, None)
        assert found[2] is not None
        stored = found[2].row
        (now,) = rebuilt(store, wanted(*found))
        same, of = same_to_the_bit(now, stored)
        assert same == of == len(stored["responses"])
        assert now["kl"] == row["kl"]
        if not row["stopped"]:
            assert (now["refusals"], now["overrefusals"]) == (row["refusals"], row["overrefusals"])
    assert trial_table(store).equals(before, null_equal=True)  # and stays in no ranking
    # With another edit of the same parameters nothing comes out the same.
    other = load_config(str(config), ["edit.row_normalization=full"])
    recipe, _, none = own_recipe(store, name, other)
    (changed,) = rebuilt(store, wanted(recipe, other, none))
    assert none is None
    assert changed["kl"] != now["kl"]
    assert same_to_the_bit(changed, stored)[0] < of


@pytest.mark.slow
def test_what_the_seed_leaves_out_is_searched_if_asked(
    small: tuple[Store, Path], tmp_path: Path
) -> None:
    store, config = small
    path = tmp_path / "seed.txt"
    path.write_text(SEED)
    search = ("--search-missing", "--trials", "3", "--format", "json")
    done = tribunal(store, "reproduce", str(path), "--model", str(config), *search)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["left_out"] == ["direction_index"]
    ranked = [(r["gated"], r["refusals"], r["overrefusals"], r["kl"]) for r in found["measured"]]
    assert ranked == sorted(ranked)
    assert len({r["direction_index"] for r in found["measured"]}) == 3
    assert found["numbers"]["refusals_interval"][1] == pytest.approx(0.1684, abs=1e-4)
    sql = "SELECT count(*), any_value(source_kl), any_value(points) FROM reproductions"
    where = f" WHERE source = '{path.name}'"
    with catalog(store) as connection:
        assert fetch(connection, sql + where).rows == ((3, 0.0447, 3),)
