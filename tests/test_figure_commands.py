"""The commands of the four figures: what they refuse, and that a refusal leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_study import tribunal

from artifacts.figure_schemas import FIGURES
from artifacts.store import Store
from flows.figures.config import load_figure_config, sources
from flows.figures.figure import ABOUT, figure_named
from flows.housekeeping import ROOTS

MODEL = '[model]\nid = "organism"\n'


@pytest.mark.parametrize("name", ABOUT)
def test_a_figure_is_found_by_its_name_and_in_the_shipped_config(name: str) -> None:
    assert figure_named(name).name == name
    spec = getattr(load_figure_config("organism", name), name)
    assert list(sources(spec)), "it names its prompt sets"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["heads", "organsim"], "unknown config 'organsim'; did you mean 'organism'?"),
        (["norms", "{folder}/other.toml"], "has no table [norms]"),
        (["activity", "--set", "activity.recepi=pca"], "did you mean 'activity.recipe'?"),
        (["divergence", "--set", "divergence.late=7"], "divergence.late is '7'"),
        (["heads", "--out", "{folder}/file"], "is a file; give a folder"),
        (
            ["heads", "--set", "heads.heldout.source=nowhere.jsonl"],
            "no file or folder 'nowhere.jsonl'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other.toml").write_text(MODEL)
    store = Store(tmp_path / "store")
    done = tribunal(store, *(part.format(folder=tmp_path) for part in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("tribunal: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(store.entries())


def test_garbage_collection_keeps_what_figures_say() -> None:
    assert {"pictures", *FIGURES} <= set(ROOTS)
