"""kill -9 of flow, worker and server at random moments: nothing lost, nothing made twice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_tools import (
    RUN_KILLS,
    Launcher,
    Watch,
    Whole,
    artifacts_in,
    assert_same,
    assert_tidy,
    histogram,
    processes_on,
    spread,
    wait_until,
)

from artifacts.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

KILLS_PER_STUDY = 6
LANES = 2  # studies at once


def test_runs_killed_at_random_moments_end_as_if_they_were_not(
    whole: Whole, launcher: Launcher, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    started = time.monotonic()

    def lane(number: int) -> list[str]:
        dice, phases = random.Random(number), []
        while len(phases) < RUN_KILLS / LANES:
            store = Store(tmp_path / f"lane-{number}-{len(phases)}")
            phases += study_with_killed_runs(whole, launcher, store, dice)
        return phases

    with ThreadPoolExecutor(LANES) as pool:
        phases = [phase for found in pool.map(lane, range(LANES)) for phase in found]
    assert len(phases) >= RUN_KILLS
    assert len({phase.split("/")[1] for phase in phases}) >= 8, histogram(phases)
    seconds = time.monotonic() - started
    figure("kill -9 of runs", f"{len(phases)} kills in {seconds:.0f} s; {histogram(phases)}")


def study_with_killed_runs(
    whole: Whole, launcher: Launcher, store: Store, dice: random.Random
) -> list[str]:
    """Kill the study's runs until it is near its end, let the last one finish; what was hit."""
    watch, hit = Watch(whole, store), []
    for position in spread(dice, whole, KILLS_PER_STUDY):
        how = dice.choice(("moment", "write"))
        kill = kill_at_moment if how == "moment" else kill_at_write
        if kill(whole, launcher, store, position, dice):
            hit.append(f"{how}/{watch.now_making()}")
        watch.check()
    done = launcher.run(store, "run", str(whole.config))
    assert done.returncode == 0, done.stderr
    assert watch.check() == len(whole.places)
    assert_same(whole, store, launcher)
    assert_tidy(whole, store, launcher)
    assert processes_on(store) == []
    return hit


def kill_at_moment(
    whole: Whole, launcher: Launcher, store: Store, position: int, dice: random.Random
) -> bool:
    """Kill a run at a random moment of the making of artifact number `position`."""
    victim = launcher.start(store, "run", str(whole.config))
    wait_until(lambda: artifacts_in(store) >= position or victim.ended())
    time.sleep(dice.uniform(0, 0.02 + (*whole.seconds, 0.1)[position]))
    victim.kill()
    return victim.wait().returncode == -9


def kill_at_write(
    whole: Whole, launcher: Launcher, store: Store, position: int, dice: random.Random
) -> bool:
    """Kill a run just before a random write into the store, about artifact number `position`."""
    per_artifact = whole.writes / len(whole.places)
    ahead = max(position - artifacts_in(store), 0) * per_artifact
    last = int(ahead) + dice.randint(1, int(per_artifact) + 1)
    return launcher.start(store, "run", str(whole.config), last_write=last).wait().returncode == -9
