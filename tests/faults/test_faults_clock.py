"""A clock that is wrong or jumps, and `gc` beside running builds: nothing that is needed goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
from fault_tools import (
    Launcher,
    Watch,
    Whole,
    artifacts_in,
    assert_same,
    assert_tidy,
    needs,
    wait_until,
)
from small_study import digests

from artifacts.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

JUMPS = ("+365d", "-365d", "+2h", "-2h")
ROUNDS = 3


class Clock:
    """The clock of one launcher's processes, through libfaketime; monotonic time stays true.

    What files say of their age is not shifted with it, as when a clock is set after they were
    written.
    """

    def __init__(self, folder: Path) -> None:
        library = Path(needs("faketime"))
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        assert found, f"no libfaketime beside {library}"
        self.file = folder / "clock"
        self.set("+0d")
        self.settings = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, offset: str) -> None:
        draft = self.file.with_suffix(".new")
        draft.write_text(offset)
        draft.rename(self.file)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def elsewhen(
    clock: Clock, config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Launcher]:
    """Runs commands under that clock; its first study is made with the clock a year ahead."""
    folder = tmp_path_factory.mktemp("elsewhen")
    clock.set("+365d")
    first = (Store(folder / "store"), ["run", str(config)])
    found = Launcher(folder, first, clock.settings)
    yield found
    found.close()


def test_a_clock_a_year_ahead_or_back_changes_nothing(
    whole: Whole,
    elsewhen: Launcher,
    clock: Clock,
    tmp_path: Path,
    figure: Callable[[str, str], None],
) -> None:
    ahead, back = Store(elsewhen.folder / "store"), Store(tmp_path / "back")
    clock.set("-365d")
    assert elsewhen.run(back, "run", str(whole.config)).returncode == 0
    years = {year_of(store) for store in (ahead, whole.store, back)}
    assert len(years) == 3, years  # the clock was really another
    for store in (ahead, back):
        assert_same(whole, store, elsewhen)
        for offset in JUMPS:  # nothing is made again, whatever the time
            clock.set(offset)
            done = elsewhen.run(store, "run", str(whole.config))
            assert done.returncode == 0, done.stderr
            assert "made in" not in done.stderr
    figure("clock", "runs a year ahead and a year back; 8 re-runs at other times made nothing")


def year_of(store: Store) -> str:
    created = [manifest.provenance["created"] for manifest in store.manifests("generations")]
    return str(created[0][:4])


def test_a_clock_that_jumps_during_the_run_changes_nothing(
    whole: Whole, elsewhen: Launcher, clock: Clock, store: Store, figure: Callable[[str, str], None]
) -> None:
    clock.set("+0d")
    victim, jumps = elsewhen.start(store, "run", str(whole.config)), 0
    for offset in cycle(JUMPS):
        if victim.ended():
            break
        clock.set(offset)
        jumps += 1
        time.sleep(0.15)
    done = victim.wait()
    assert done.returncode == 0, done.stderr
    clock.set("+0d")
    assert jumps > 5
    assert_same(whole, store, elsewhen)
    assert_tidy(whole, store, elsewhen)
    figure("jumping clock", f"{jumps} jumps during one run")


def test_gc_with_the_clock_ahead_takes_nothing_from_a_running_build(
    whole: Whole, launcher: Launcher, elsewhen: Launcher, clock: Clock, store: Store
) -> None:
    watch, clock_is = Watch(whole, store), cycle(JUMPS)
    victim = launcher.start(store, "run", str(whole.config))
    wait_until(lambda: artifacts_in(store) > 2)
    collected = 0
    while not victim.ended():
        clock.set(next(clock_is))
        assert elsewhen.run(store, "store", "gc", "--yes").returncode == 0
        collected += 1
        watch.check()
    assert victim.wait().returncode == 0
    assert collected > 1
    assert watch.check() == len(whole.places)
    assert_same(whole, store, launcher)


def test_gc_with_the_clock_ahead_takes_what_no_build_uses(
    whole: Whole, launcher: Launcher, elsewhen: Launcher, clock: Clock, store: Store
) -> None:
    victim = launcher.start(store, "run", str(whole.config))
    wait_until(lambda: artifacts_in(store) > 2)
    victim.kill()
    victim.wait()
    clock.set("+2h")
    assert elsewhen.run(store, "store", "gc", "--yes").returncode == 0
    assert artifacts_in(store) == 0
    assert launcher.run(store, "run", str(whole.config)).returncode == 0
    assert_same(whole, store, launcher)


def test_two_flows_and_a_gc_at_once(
    whole: Whole,
    launcher: Launcher,
    elsewhen: Launcher,
    clock: Clock,
    tmp_path: Path,
    figure: Callable[[str, str], None],
) -> None:
    clock.set("+2h")  # for `gc` everything is old
    rounds = [Store(tmp_path / f"store-{number}") for number in range(ROUNDS)]
    found = [two_flows_and_a_gc(whole, launcher, elsewhen, store) for store in rounds]
    collected, freed = (sum(counts) for counts in zip(*found, strict=True))
    assert collected > 2 * ROUNDS
    assert freed >= ROUNDS
    measured = f"{ROUNDS} rounds, {collected} collections freed {freed} places, none in use"
    figure("two flows and gc", measured)


# What whoever comes first decides: a study's stored config and, since the first freeze stands, its
# winner with all that is made of it. The longer flow may be first, with another winner.
FIRST_COME = ("studies", "winners", "tests", "leaderboards", "figures")


def two_flows_and_a_gc(
    whole: Whole, launcher: Launcher, collector: Launcher, store: Store
) -> tuple[int, int]:
    """One round over a store in which a run died before its study had a name; collections, and
    what they freed."""

    def collect() -> int:
        done = collector.run(store, "store", "gc", "--yes")
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1].split()[0])

    usual = ("run", str(whole.config))
    longer = (*usual, "--set", "search.trials=6")
    stopped = launcher.start(store, *usual, "--set", "directions.winsorization=0.9")
    wait_until(lambda: any(kind == "directions" for kind, _ in store.entries()))
    stopped.kill()
    assert stopped.wait().returncode == -9
    orphan = next(entry for entry in store.entries() if entry[0] == "directions")
    pair, freed = [launcher.start(store, *usual), launcher.start(store, *longer)], []
    while not all(victim.ended() for victim in pair):
        freed.append(collect())
    ends = [victim.wait() for victim in pair]
    assert [end.returncode for end in ends] == [0, 0], [end.stderr for end in ends]
    freed.append(collect())
    assert orphan not in store.entries()
    found = digests(store)
    for named, digest in whole.digests.items():
        if named.split("/")[0] not in FIRST_COME:
            assert found[named] == digest
    for arguments in (usual, longer):  # nothing is missing
        again = launcher.run(store, *arguments)
        assert again.returncode == 0, again.stderr
        assert "made in" not in again.stderr
    return len(freed), sum(freed)
