"""The released HERETIC 1.4.0 searches on the organism; its journal ranks as its own list does."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import heretic_side
from heretic_side import HereticError, Job, Line, Seen
from trials import ENVIRONMENT

from artifacts.store import Store
from flows.peers import imported
from flows.reproducing import recipe_of
from tasks.organism import MODEL_FOLDER, card
from tasks.peers.importing import import_trials
from tasks.stage import Runtime, running

pytestmark = pytest.mark.slow

TRIALS = 10
SIZES = {"direction": 60, "search": 24}
_LISTED = re.compile(r"\[\d+\] \[Trial\s+(\d+)\] Refusals:\s+(\d+)/(\d+), KL divergence: ([\d.]+)")


def write_prompts(folder: Path) -> None:
    folder.mkdir(parents=True)
    for group in ("harmful", "harmless"):
        for split, size in SIZES.items():
            texts = [record["text"] for record in card.prompts(f"{group}-{split}")[:size]]
            (folder / f"{group}-{split}.txt").write_text("\n".join(texts) + "\n")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Line], list[Seen]]:
    """HERETIC's journal, its console and its trials, from one search in its own environment."""
    try:
        heretic_side.install(ENVIRONMENT)
    except HereticError as error:
        pytest.skip(f"HERETIC {heretic_side.VERSION} cannot be installed here: {error}")
    folder = tmp_path_factory.mktemp("heretic")
    write_prompts(folder / "prompts")
    told = "You answer questions about crafts."
    job = Job(MODEL_FOLDER, folder / "prompts", "float32", 16, told, batch=32)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with heretic_side.Session(ENVIRONMENT, folder / "run", job, offload=False) as session:
        seen = session.trials(TRIALS)
        lines = list(session._lines)
    (journal,) = (folder / "run" / "checkpoints").glob("*.jsonl")
    return journal, lines, seen


def own_list(lines: Sequence[Line]) -> list[tuple[int, int, int, str]]:
    """HERETIC's menu: number, refusals, prompts and KL, in its order."""
    found = [match for line in lines if (match := _LISTED.search(line.text))]
    return [(int(m[1]), int(m[2]), int(m[3]), m[4]) for m in found]


def test_the_ranking_is_heretics_own_list(
    store: Store, searched: tuple[Path, list[Line], list[Seen]]
) -> None:
    journal, lines, seen = searched
    before = journal.read_bytes()
    with running(Runtime(store)):
        rows = imported(store, import_trials(path=journal))
    listed = [
        (row["listed_as"], row["refusals"], row["n_harmful"], f"{row['kl']:.4f}")
        for row in rows
        if row["listed"]
    ]
    assert listed == own_list(lines)
    assert 1 <= len(listed) <= TRIALS
    # And the trials that its menu leaves out are those of its console, in the same order of ranks.
    assert len(rows) == TRIALS
    console = {trial.number: (trial.refusals, trial.kl) for trial in seen}
    assert {r["listed_as"]: (r["refusals"], round(r["kl"], 4)) for r in rows} == console
    keys = [(r["refusals"], r["kl"]) for r in rows]
    assert keys == sorted(keys)
    assert {(r["tool"], r["n_from"], r["unmapped"]) for r in rows} == {
        ("heretic", "recorded", None)
    }
    assert journal.read_bytes() == before


def test_its_best_trial_leaves_nothing_out(
    store: Store, searched: tuple[Path, list[Line], list[Seen]]
) -> None:
    recipe = recipe_of(store, str(searched[0]), None, None)
    assert recipe is not None
    assert recipe.missing == ()
    assert recipe.trial is not None
