"""What `tribunal store gc` frees and what it never touches; `store verify` reads everything."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

from artifacts.errors import StoreError
from artifacts.store import MANIFEST, Manifest, Ref, Store
from flows.housekeeping import check_all, collect, unreachable

OLD = 7200.0  # seconds, more than an orphan needs to be collected


def put(store: Store, kind: str, name: str, inputs: Sequence[Ref] = (), age: float = OLD) -> Ref:
    """An artifact made from others, under the roles of their kinds, put `age` seconds ago."""
    roles = {ref.kind.rstrip("s"): ref for ref in inputs}
    entries = {r: {"kind": f.kind, "key": f.key, "digest": f.digest} for r, f in roles.items()}
    key = name.ljust(32, "0")
    draft = Manifest(kind, key, version=1, inputs=entries, provenance={"created": "2026-01-01"})
    ref = store.put(draft, name.encode())
    then = time.time() - age
    os.utime(store.folder(kind, key), (then, then))
    return ref


def study(store: Store) -> list[Ref]:
    """A small study with everything that belongs to it."""
    prompts = put(store, "prompts", "p")
    protocol = put(store, "protocols", "c", [prompts])
    generation = put(store, "generations", "e", [protocol])
    named = put(store, "studies", "d", [protocol])
    return [prompts, protocol, generation, named]


def paths(refs: Sequence[Ref]) -> set[str]:
    return {f"{ref.kind}/{ref.key}" for ref in refs}


def collected(store: Store) -> set[str]:
    return {place.path for place in unreachable(store)}


def test_what_a_study_reaches_stays(store: Store) -> None:
    study(store)
    put(store, "winners", "f", [put(store, "directions", "1")])
    put(store, "figures", "2", [put(store, "leaderboards", "3")])
    put(store, "drift", "4", [put(store, "remeasurements", "5")])
    assert collected(store) == set()


def test_what_nothing_reaches_goes(store: Store) -> None:
    kept = study(store)
    orphans = [put(store, "activations", "6"), put(store, "shards", "7")]
    unnamed = put(store, "protocols", "8")
    chain = put(store, "generations", "9", [unnamed])
    doomed = unreachable(store)
    assert {place.path for place in doomed} == paths([*orphans, unnamed, chain])
    assert {place.why for place in doomed} >= {"orphan activations", "orphan shards"}
    assert all(place.bytes > 1 for place in doomed)
    assert {place.path for place in collect(store, doomed)} == paths([*orphans, unnamed, chain])
    assert {f"{kind}/{key}" for kind, key in store.entries()} == paths(kept)


def test_an_overlap_stays_as_long_as_its_prompt_sets(store: Store) -> None:
    put(store, "near_duplicates", "8", study(store)[:1])
    unused = put(store, "prompts", "6")
    overlap = put(store, "near_duplicates", "9", [unused])
    assert collected(store) == paths([unused, overlap])


def test_listing_changes_nothing(store: Store) -> None:
    put(store, "activations", "6")
    before = store.place.sizes("")
    assert unreachable(store)
    assert store.place.sizes("") == before


def test_the_young_stay(store: Store) -> None:
    put(store, "activations", "6", age=60)
    put(store, "directions", "7", age=-(10**7))  # from the future: the clock was moved back
    assert collected(store) == set()


def test_what_a_running_build_uses_stays_with_all_it_was_made_from(store: Store) -> None:
    source = put(store, "activations", "6")
    used = put(store, "directions", "7", [source])
    other = put(store, "directions", "8")
    with store.building() as find:
        find(used.kind, used.key)
        assert collected(store) == paths([other])
    assert collected(store) == paths([source, used, other])


def test_what_a_build_began_to_use_after_the_listing_stays(store: Store) -> None:
    used, gone = put(store, "directions", "7"), put(store, "directions", "8")
    doomed = unreachable(store)
    with store.building() as find:
        find(used.kind, used.key)
        assert {place.path for place in collect(store, doomed)} == paths([gone])
        assert store.find(used.kind, used.key) == used


def test_what_a_finished_build_made_something_from_since_the_listing_stays(store: Store) -> None:
    used, gone = put(store, "directions", "7"), put(store, "directions", "8")
    doomed = unreachable(store)
    put(store, "winners", "9", [used])
    assert {place.path for place in collect(store, doomed)} == paths([gone])


def test_what_is_younger_than_a_running_build_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    young, old = put(store, "directions", "7", age=OLD), put(store, "directions", "8", age=9 * OLD)
    with store.building() as find:
        find("directions", "x")
        (run,) = (store.root / ".runs").iterdir()
        since, _, rest = run.name.partition("-")
        run.rename(run.with_name(f"{int(since) - int(3 * OLD * 1e9)}-{rest}"))
        assert collected(store) == paths([old])
        run.with_name(f"{int(since) - int(3 * OLD * 1e9)}-{rest}").rename(run)
    assert collected(store) == paths([young, old])


def test_a_torn_manifest_that_may_need_something_stops_the_collection(store: Store) -> None:
    *_, generation, named = study(store)
    put(store, "directions", "7")
    (store.folder(named.kind, named.key) / MANIFEST).write_text("{")
    with pytest.raises(StoreError, match=r"'studies/d0+' is damaged, so nobody knows .*verify"):
        unreachable(store)
    store.set_aside(named.kind, named.key)
    assert paths([generation]) <= collected(store)


def test_what_cannot_be_read_stops_the_collection(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    study(store)

    def fail(path: str) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr(store.place, "read", fail)
    with pytest.raises(StoreError, match="cannot read"):
        unreachable(store)
    count, bad = check_all(store, lambda done, total: None)
    assert count == len(bad) == 4
    assert {type(fault) for fault in bad.values()} == {StoreError}


BUILD = """
import sys, time
from artifacts.store import Store
with Store(sys.argv[1]).building() as find, Store(sys.argv[1]).lock("directions", "k"):
    find("directions", sys.argv[2])
    print("using", flush=True)
    time.sleep(60)
"""


def test_a_killed_build_protects_nothing(store: Store) -> None:
    ref = put(store, "directions", "7")
    workshop = store.root / ".tmp" / "directions-k-0123"
    workshop.mkdir(parents=True)
    build = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(store.root), ref.key], stdout=subprocess.PIPE, text=True
    )
    assert build.stdout is not None
    try:
        assert build.stdout.readline() == "using\n"
        assert collected(store) == set()
    finally:
        build.kill()
        build.wait()
        build.stdout.close()
    assert collected(store) == {".tmp/directions-k-0123", *paths([ref])}


def test_corrupt_orphans_and_quarantine_go(store: Store) -> None:
    torn, set_aside = put(store, "directions", "7"), put(store, "directions", "8")
    folder = store.folder(torn.kind, torn.key)
    (folder / MANIFEST).write_bytes(b"{")
    os.utime(folder, (0, 0))
    store.set_aside(set_aside.kind, set_aside.key)
    why = {place.why for place in unreachable(store)}
    assert why == {"corrupt", "leftover"}
    assert len(list(collect(store, unreachable(store)))) == 2
    assert store.place.sizes("") == {}


def test_a_corrupt_artifact_that_a_study_needs_is_left_to_be_rebuilt(store: Store) -> None:
    prompts, *_ = study(store)
    (store.folder(prompts.kind, prompts.key) / "data.parquet").write_bytes(b"")
    assert collected(store) == set()


def test_verify_reads_all_and_names_what_is_not_whole(store: Store) -> None:
    refs = [put(store, "directions", f"{n:02}") for n in range(30)]
    broken = refs[7]
    (store.folder(broken.kind, broken.key) / "data.parquet").write_bytes(b"x")
    seen: list[Any] = []
    count, bad = check_all(store, lambda done, total: seen.append((done, total)))
    assert (count, list(bad)) == (30, [(broken.kind, broken.key)])
    assert seen == [(n, 30) for n in range(1, 31)]


@pytest.mark.parametrize("arguments", [["gc"], ["gc", "--yes"], ["verify"]])
def test_the_commands_on_an_empty_store(store: Store, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows", "store", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRIBUNAL_STORE": store.location},
        check=True,
    )
    assert done.stdout.startswith(("0 places", "0 of 0 artifacts"))
    assert not store.root.exists()


def test_what_is_finished_while_gc_looks_is_not_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifests are read first and sizes after them; between the two a run may finish something."""
    *before, _ = study(store)
    known = [store.manifest(ref.kind, ref.key) for ref in before]
    monkeypatch.setattr(Store, "manifests", lambda self, kind=None: iter(known))
    assert not {path for path in collected(store) if path.startswith("studies/")}
