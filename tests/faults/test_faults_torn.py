"""Torn files in every kind of artifact: noticed, told in one line, rebuilt to the same bytes."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fault_tools import Launcher, Whole, copy_store, one_line
from small_study import digests, trial_table

import tasks
from artifacts.catalog import catalog, fetch, write_database
from artifacts.errors import StoreError
from artifacts.schemas import STORED, VIEWS
from artifacts.store import MANIFEST, Store
from flows.categories import store_categories
from flows.drift import check_winners, winners_to_check
from flows.pipeline import Benchmark, run_pipeline, split_of
from flows.settings import load_config, validate_stored
from tasks.comparisons import Side, compare_trials
from tasks.damage import measure_damage
from tasks.relabel import judged_artifacts, relabel
from tasks.reproduce import judge_reproduction
from tasks.shards import judge_shard
from tasks.stage import Runtime, Silent, Stage, running
from tasks.stored_trials import stored_trial
from tasks.trials import trial_of

pytestmark = [pytest.mark.slow, pytest.mark.faults]

CORRUPTIONS = 30
ELSEWHERE = ("judgements", "capabilities")  # tests/test_judges.py; lm-eval is an extra
NO_VIEWS = ("figures", "shards")
KINDS = (*(kind for kind in STORED if kind not in ELSEWHERE), *NO_VIEWS, "reproductions")
AFTERWARDS = (  # not made by a plain run
    *("shards", "labels", "retests", "reselections", "drift"),
    *("categories", "sequence_kl", "comparisons", "reproductions"),
)


def cut(path: Path) -> None:
    """Half of it is there."""
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def blank(path: Path) -> None:
    """It has its length, but the second half never reached the disk."""
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))


def empty(path: Path) -> None:
    """Nothing is in it."""
    path.write_bytes(b"")


TEARS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "data": (cut, blank, empty, Path.unlink),
    "manifest": (cut, Path.unlink),
}


class Hearing(Silent):
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def said(self, line: str) -> None:
        self.lines.append(line)


@dataclass(frozen=True)
class Torn:
    """A finished study with one artifact at least of every kind, to be torn and made again."""

    whole: Whole

    @property
    def store(self) -> Store:
        return self.whole.store

    def make(self, more: bool) -> list[str]:
        """Ask for every artifact of the study, and of what came after it; what was said."""
        heard = Hearing()
        with running(Runtime(self.store, heard)):
            found = run_pipeline(load_config(str(self.whole.config)))
            if more:
                self._make_more(found)
        return heard.lines

    def _make_more(self, found: Benchmark) -> None:
        """A shard, other labels, categories, damage, a comparison, a reproduction, a retest."""
        config = load_config(str(self.whole.config))
        rows = self.store.read(found.generations[0]).drop("responses").to_dicts()
        trials = [trial_of(row) for row in rows]
        with_what = {
            "protocol": found.protocol,
            "config": config,
            "materials": {n: getattr(found, n) for n in ("model", "directions", "baseline")},
            "prompts": split_of(found.prompts, "search"),
        }
        judge_shard(trials=trials, whole=False, previous=None, **with_what)
        for judged in judged_artifacts():
            relabel(judged=judged, labeller="prefix-strict")
        store_categories(config, "kind")
        study = str(self.store.read(found.study, ["study"]).item())
        measure_damage(stored_trial(self.store, study, 0, validate_stored))
        arm = config.search.preset
        winner = Side(found.protocol.key, arm, self.store.read(found.winner)["trial"].item())
        unedited = Side(found.protocol.key, "unedited", None)
        compare_trials(first=found.test, of_first=winner, second=found.test, of_second=unedited)
        judge_reproduction(
            source={"source": "a list", **dict.fromkeys(("source_tool", "source_trial"))},
            points=[dict(trials[0].parameters)],
            searched=(),
            **with_what,
        )
        outcomes = check_winners(winners_to_check(self.store, None), "again")
        assert [outcome.error for outcome in outcomes] == [None]


@pytest.fixture(scope="module")
def torn(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Torn:
    """One store for all these tests: each leaves it as it found it."""
    store = copy_store(whole, tmp_path_factory.mktemp("torn") / "store")
    Torn(replace(whole, store=store)).make(more=True)
    places = {(m.kind, m.key): None for m in store.manifests()}
    return Torn(
        replace(
            whole,
            store=store,
            places=(*whole.places, *(place for place in places if place not in whole.places)),
            digests=digests(store),
            trials=trial_table(store),
        )
    )


@pytest.fixture(scope="module")
def counted() -> Counter[str]:
    """Tears that were noticed and rebuilt, by kind."""
    return Counter()


def test_every_kind_that_a_stage_makes_is_torn_here(torn: Torn) -> None:
    modules = [
        importlib.import_module(f"tasks.{m.name}") for m in pkgutil.iter_modules(tasks.__path__)
    ]
    stages = [x for module in modules for x in vars(module).values() if isinstance(x, Stage)]
    made = {made_by.kind for made_by in stages} - set(ELSEWHERE)
    assert made == set(KINDS) == set(torn.whole.kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_artifact_is_told_left_out_and_rebuilt(
    kind: str, torn: Torn, launcher: Launcher, counted: Counter[str]
) -> None:
    store, whole = torn.store, torn.whole
    place = next(p for p in whole.places if p[0] == kind)
    folder, named = store.folder(*place), "/".join(place)
    files = {"data": folder / store.manifest(*place).data, "manifest": folder / MANIFEST}
    for which, tear in ((which, tear) for which, tears in TEARS.items() for tear in tears):
        tear(files[which])
        with pytest.raises(StoreError, match=named):
            store.check(*place)
        if tear in (cut, blank):
            assert_left_out(store, *place)
        if (which, tear) == ("data", cut):
            assert_told(launcher, store, named)
        said = torn.make(more=kind in AFTERWARDS)
        assert [line for line in said if named in line], (which, tear.__name__)
        assert store.check(*place).sha256 == whole.digests[named]
        counted[kind] += 1
    assert digests(store) == whole.digests
    assert trial_table(store).equals(whole.trials, null_equal=True)


def assert_left_out(store: Store, kind: str, key: str) -> None:
    """Every view answers, without the artifact; and so does the database file."""
    assert write_database(store)
    with catalog(store) as connection:
        for view in VIEWS:
            fetch(connection, f"SELECT * FROM {view}")
        if kind in STORED:
            rows = fetch(connection, f"SELECT key FROM stored_{kind}").rows
            assert (key,) not in rows


def assert_told(launcher: Launcher, store: Store, named: str) -> None:
    """`verify` names the artifact and no other; a ranking comes without it, which it says."""
    done = launcher.run(store, "store", "verify")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if "'" in line]
    assert len(lines) == 1
    assert named in lines[0]
    ranked = launcher.run(store, "rank")
    warning = "tribunal: damaged artifacts left out: 1; see: tribunal store verify"
    first, *rest = ranked.stderr.splitlines()
    assert first == warning
    if ranked.returncode != 0:
        one_line(replace(ranked, stderr="\n".join(rest)))


def corrupt(store: Store, dice: random.Random) -> str:
    """Flip, cut or delete one file of one artifact."""
    kind, key = dice.choice(list(store.entries()))
    path = dice.choice(sorted(store.folder(kind, key).iterdir()))
    how = dice.choice(["flip", "cut", "delete"])
    content = path.read_bytes()
    if how == "flip":
        place = dice.randrange(len(content))
        flipped = content[place] ^ (1 << dice.randrange(8))
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
    elif how == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    else:
        path.unlink()
    return f"{how} {kind}/{path.name}"


def test_every_corruption_is_noticed_and_rebuilt(
    torn: Torn, counted: Counter[str], figure: Callable[[str, str], None]
) -> None:
    dice = random.Random(1)
    for _ in range(CORRUPTIONS):
        what = corrupt(torn.store, dice)
        assert verified(torn.store) != torn.whole.digests, what
        torn.make(more=True)
        assert verified(torn.store) == torn.whole.digests, what
    told = f"{len(counted)} kinds, {counted.total()} tears"
    figure("torn files", f"{told} and {CORRUPTIONS} random corruptions noticed and rebuilt")


def verified(store: Store) -> dict[str, str]:
    """Content of every artifact that verifies."""
    found = ((place, store.find(*place)) for place in store.entries())
    return {"/".join(place): ref.digest for place, ref in found if ref}
