"""Torn files in every kind of artifact: noticed, told in one line, rebuilt to the same bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_tools import Launcher, Whole, assert_same, copy_store, one_line

from artifacts.errors import StoreError
from artifacts.store import MANIFEST, Store
from flows.pipeline import run_pipeline
from flows.settings import load_config
from tasks.stage import Runtime, running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

QUERIES = (("rank",), ("show", "0"), ("sql", "SELECT count(*) FROM trials"))
CORRUPTIONS = 50
KINDS = (
    *("prompts", "near_duplicates", "models", "activations", "directions", "baseline"),
    *("protocols", "studies", "generations", "selections", "winners", "tests"),
    *("leaderboards", "figures"),
)
Tear = Callable[[Path], object]


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


TEARS: dict[str, Tear] = {"cut": cut, "blank": blank, "empty": empty, "missing": Path.unlink}


@pytest.fixture(scope="module")
def finished(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The finished study, to be torn and rebuilt by one test after another."""
    store = copy_store(whole, tmp_path_factory.mktemp("torn") / "store")
    with running(Runtime(store)):
        yield store


@pytest.fixture(scope="module", autouse=True)
def _tell(figure: Callable[[str, str], None]) -> Iterator[None]:
    started = time.monotonic()
    yield
    many = f"{len(KINDS)} kinds x 2 files x {len(TEARS)} tears + {CORRUPTIONS} random"
    figure("torn files", f"{many}, each noticed and rebuilt, {time.monotonic() - started:.0f} s")


def test_every_kind_of_the_study_is_torn_here(whole: Whole) -> None:
    assert set(KINDS) == set(whole.kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_artifact_is_told_in_one_line_and_rebuilt(
    kind: str, whole: Whole, launcher: Launcher, finished: Store
) -> None:
    place = next(p for p in whole.places if p[0] == kind)
    folder, named = finished.folder(*place), "/".join(place)
    data = folder / finished.manifest(*place).data
    for how, tear in TEARS.items():
        for path in (data, folder / MANIFEST):
            tear(path)
            with pytest.raises(StoreError, match=named):
                finished.check(*place)
            if how == "cut":
                assert_told(launcher, finished, named)
            if (how, path) == ("blank", data):
                assert_queries_are_calm(launcher, finished)
            said = rebuild(whole, finished)
            assert [line for line in said if named in line], (how, path.name)
            assert finished.check(*place).sha256 == whole.digests[named]
    (folder / "junk.parquet").write_bytes(b"junk")
    assert_queries_are_calm(launcher, finished)
    assert_same(whole, finished, launcher)


def assert_told(launcher: Launcher, store: Store, named: str) -> None:
    """`verify` names the artifact and no other; queries work without it or say why not."""
    done = launcher.run(store, "store", "verify")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if "'" in line]
    assert len(lines) == 1
    assert named in lines[0]
    assert_queries_are_calm(launcher, store)


def assert_queries_are_calm(launcher: Launcher, store: Store) -> None:
    """Every query answers, or says in one line what is wrong."""
    for query in QUERIES:
        done = launcher.run(store, *query)
        if done.returncode != 0:
            one_line(done)


def rebuild(whole: Whole, store: Store) -> list[str]:
    """Run the study again; what was said of it."""
    heard = Hearing()
    with running(Runtime(store, heard)):
        run_pipeline(load_config(str(whole.config)))
    return heard.lines


class Hearing:
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def started(self, *_: object) -> None: ...
    def advanced(self, *_: object) -> None: ...
    def finished(self, *_: object, **__: object) -> None: ...
    def said(self, line: str) -> None:
        self.lines.append(line)


def corrupt(store: Store, dice: random.Random) -> str:
    """Flip, cut or delete one file of one artifact."""
    kind, key = dice.choice(list(store.entries()))
    path = dice.choice(sorted(p for p in store.folder(kind, key).iterdir() if p.stem != "junk"))
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


def test_every_corruption_is_noticed_and_rebuilt(whole: Whole, finished: Store) -> None:
    dice = random.Random(1)
    for _ in range(CORRUPTIONS):
        what = corrupt(finished, dice)
        assert digests_verified(finished) != whole.digests, what
        rebuild(whole, finished)
        assert digests_verified(finished) == whole.digests, what


def digests_verified(store: Store) -> dict[str, str]:
    """Content of every artifact that verifies."""
    found = ((place, store.find(*place)) for place in store.entries())
    return {"/".join(place): ref.digest for place, ref in found if ref}
