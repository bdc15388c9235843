"""Disks that are full, read-only or slow: one clear line, or the same study."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_tools import (
    MOUNTED,
    Launcher,
    Watch,
    Whole,
    artifacts_in,
    assert_same,
    assert_tidy,
    copy_store,
    histogram,
    mount,
    needs,
    one_line,
    tmpfs,
    unmount,
    wait_until,
)

from artifacts.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

DISKS = 4  # too small in bytes, and as many with too few inodes, which shows only in the writing
READING = (
    ("rank",),
    ("show", "0"),
    ("sql", "SELECT count(*) FROM trials"),
    ("store", "verify"),
    ("store", "ls"),
    ("store", "gc"),
)
SLOW_CALLS = "openat,mkdir,rename,unlink,rmdir,fsync,lstat,pread64,pwrite64"
SLOW_BY = 4000  # microseconds that each of these calls of the file system takes longer


def test_a_full_disk_is_one_clear_line_and_a_larger_one_goes_on_from_there(
    whole: Whole, launcher: Launcher, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    hit, dice, files = [], random.Random(0), list(whole.store.root.rglob("*"))
    needed = sum(path.stat().st_size for path in files if path.is_file())
    for number in range(DISKS):
        share = (number + dice.random()) / DISKS
        size, inodes = int(needed * share) // 1024, int(len(files) * share)
        for limit in (f"size={size}k", f"nr_inodes={inodes}"):
            with tmpfs(tmp_path / limit, limit) as disk:
                hit.append(fill_and_enlarge(whole, launcher, disk))
    assert len(set(hit)) >= 4, hit
    measured = f"{DISKS} sizes below {needed // 1024} kB, {DISKS} below {len(files)} inodes"
    figure("full disk", f"{measured}; {histogram(hit)}")


def fill_and_enlarge(whole: Whole, launcher: Launcher, disk: Path) -> str:
    """Run the study where it has no room, give it room, run it again; what had no room."""
    store = Store(disk / "store")
    watch = Watch(whole, store)
    line = one_line(launcher.run(store, "run", str(whole.config)))
    assert line.startswith("tribunal: no space left for the store"), line
    watch.check()
    hit = watch.now_making()
    mount("-o", "remount,size=100m,nr_inodes=10000", str(disk))
    done = launcher.run(store, "run", str(whole.config))
    assert done.returncode == 0, done.stderr
    assert watch.check() == len(whole.places)
    assert_same(whole, store, launcher)
    assert_tidy(whole, store, launcher)
    return hit


def test_a_read_only_store_answers_and_says_why_it_cannot_grow(
    whole: Whole, launcher: Launcher, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    config = str(whole.config)
    with tmpfs(tmp_path / "disk", "size=100m") as disk:
        store = copy_store(whole, disk / "store")
        answers = {reading: launcher.run(store, *reading) for reading in READING}
        result = launcher.run(store, "run", config)
        mount("-o", "remount,ro", str(disk))
        for reading, writable in answers.items():
            done = launcher.run(store, *reading)
            assert done.returncode == 0, done.stderr
            assert without_times(done.stdout) == without_times(writable.stdout)
        again = launcher.run(store, "run", config)
        assert (again.returncode, again.stdout) == (0, result.stdout), again.stderr
        planned = launcher.run(store, "plan", config, "--set", "search.trials=6")
        assert planned.returncode == 0
        assert "missing" in planned.stdout
        for writing in (
            ("run", config, "--set", "search.trials=6"),
            ("relabel", "--labeller", "prefix-strict"),
        ):
            line = one_line(launcher.run(store, *writing))
            assert line.startswith("tribunal: cannot write to the store"), line
            assert "read-only" in line
    figure("read-only store", f"{len(READING) + 2} commands answer, 2 refuse in one line")


def without_times(text: str) -> str:
    """An answer without the seconds that it took."""
    return re.sub(r"\(\d+\.\d s\)", "", text)


def test_an_empty_read_only_place_is_one_line(
    whole: Whole, launcher: Launcher, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        mount("-o", "remount,ro", str(disk))
        line = one_line(launcher.run(Store(disk / "store"), "run", str(whole.config)))
        assert "cannot write to the store" in line


@contextmanager
def slow_file_system(behind: Path, place: Path) -> Iterator[None]:
    """A FUSE file system whose every call takes longer: bindfs, held back by strace."""
    behind.mkdir()
    place.mkdir()
    slowed = ("-e", f"inject={SLOW_CALLS}:delay_enter={SLOW_BY}")
    tracer = subprocess.Popen(
        [
            *(needs("strace"), "-f", "-qq", "-o", "/dev/null", "-e", f"trace={SLOW_CALLS}"),
            *(*slowed, needs("bindfs"), "-f", "-o", f"fsname={MOUNTED}", str(behind), str(place)),
        ],
        start_new_session=True,
    )
    try:
        wait_until(lambda: place.is_mount() or tracer.poll() is not None)
        if not place.is_mount():
            pytest.skip("this test mounts a FUSE file system, which needs root and /dev/fuse")
        yield
    finally:
        if place.is_mount():
            unmount(place)
        tracer.wait(60)


def test_two_runs_on_a_slow_file_system_make_the_study_once(
    whole: Whole, launcher: Launcher, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    with slow_file_system(tmp_path / "behind", tmp_path / "slow"):
        store, started = Store(tmp_path / "slow" / "store"), time.monotonic()
        pair = [launcher.start(store, "run", str(whole.config)) for _ in range(2)]
        ends = [victim.wait() for victim in pair]
        seconds = time.monotonic() - started
        assert [end.returncode for end in ends] == [0, 0], [end.stderr for end in ends]
        made = sum(end.stderr.count(": made in") for end in ends)
        assert made == len(whole.places)
        assert_same(whole, store, launcher)
        assert_tidy(whole, store, launcher)
    measured = f"{SLOW_BY / 1000:g} ms more per call; 2 runs in {seconds:.0f} s, {made} made once"
    figure("slow file system", measured)


def test_two_runs_make_each_artifact_once(
    whole: Whole, launcher: Launcher, store: Store, figure: Callable[[str, str], None]
) -> None:
    pair = [launcher.start(store, "run", str(whole.config)) for _ in range(2)]
    ends = [victim.wait() for victim in pair]
    assert [end.returncode for end in ends] == [0, 0], [end.stderr for end in ends]
    made = [end.stderr.count(": made in") for end in ends]
    assert sum(made) == len(whole.places)
    assert_same(whole, store, launcher)
    assert_tidy(whole, store, launcher)
    figure("two runs at once", f"{made[0]} + {made[1]} = {len(whole.places)} artifacts made")


def test_ctrl_c_is_one_line_and_exit_code_130(
    whole: Whole, launcher: Launcher, store: Store
) -> None:
    victim = launcher.start(store, "run", str(whole.config))
    wait_until(lambda: artifacts_in(store) >= len(whole.places) // 2 or victim.ended())
    victim.send(signal.SIGINT)
    done = victim.wait()
    assert done.returncode == 130
    assert "interrupted; nothing is lost" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    Watch(whole, store).check()
    assert launcher.run(store, "run", str(whole.config)).returncode == 0
    assert_tidy(whole, store, launcher)
