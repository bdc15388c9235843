"""The store: whole or not there, whatever happens to it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from artifacts.errors import CorruptArtifact, StoreError
from artifacts.store import MANIFEST, Manifest, Ref, Store, parquet

FRAME = pl.DataFrame({"number": list(range(100)), "text": [f"row {n}" for n in range(100)]})


def draft(key: str = "a" * 32, **changes: object) -> Manifest:
    fields: dict[str, object] = {
        "kind": "things",
        "key": key,
        "version": 1,
        "data": "data.parquet",
        "sha256": "",
        "bytes": 0,
        "rows": FRAME.height,
        "identity": {"rank": 8},
        "inputs": {},
        "notes": {},
        "provenance": {"seconds": 0.5},
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def put(store: Store, key: str = "a" * 32, **changes: object) -> Ref:
    return store.put(draft(key, **changes), parquet(FRAME))


def test_what_is_put_is_read(store: Store) -> None:
    ref = put(store)
    assert store.read(ref).equals(FRAME)
    assert store.find("things", ref.key) == ref


def test_a_missing_artifact_is_not_found(store: Store) -> None:
    assert store.find("things", "b" * 32) is None
    with pytest.raises(StoreError, match="no artifact"):
        store.manifest("things", "b" * 32)


def test_reading_creates_nothing(store: Store) -> None:
    store.find("things", "a" * 32)
    list(store.entries())
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["data.parquet", MANIFEST])
def test_every_flipped_byte_is_noticed(store: Store, name: str) -> None:
    ref = put(store)
    path = store.folder(ref.kind, ref.key) / name
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 60):
        for mask in (0x01, 0x20, 0x29, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            assert store.find(ref.kind, ref.key) is None
    path.write_bytes(whole)
    assert store.find(ref.kind, ref.key) == ref


@pytest.mark.parametrize("name", ["data.parquet", MANIFEST])
def test_truncation_and_loss_are_noticed_and_reported(store: Store, name: str) -> None:
    ref = put(store)
    path = store.folder(ref.kind, ref.key) / name
    for broken in (path.read_bytes()[:-1], b""):
        path.write_bytes(broken)
        lines: list[str] = []
        assert store.find(ref.kind, ref.key, lines.append) is None
        assert "rebuilt" in lines[0]
        assert ref.key in lines[0]
    path.unlink()
    assert store.find(ref.kind, ref.key) is None


def test_a_corrupt_artifact_is_set_aside_when_it_is_made_again(store: Store) -> None:
    ref = put(store)
    (store.folder(ref.kind, ref.key) / "data.parquet").write_bytes(b"torn")
    assert put(store) == ref
    assert len(list((store.root / ".quarantine").iterdir())) == 1
    assert store.find(ref.kind, ref.key) == ref


def test_a_reference_does_not_read_other_content(store: Store) -> None:
    ref = put(store)
    with pytest.raises(CorruptArtifact, match="replaced"):
        store.read(Ref(ref.kind, ref.key, "0" * 64, ref.rows))


def test_an_artifact_copied_under_another_key_is_corrupt(store: Store) -> None:
    ref = put(store)
    store.folder("things", ref.key).rename(store.folder("things", "b" * 32))
    assert store.find("things", "b" * 32) is None


def test_a_failing_write_leaves_nothing(store: Store) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        store.put(draft(data="no/such/folder"), b"half")
    assert list(store.entries()) == []
    assert list((store.root / ".tmp").iterdir()) == []


def test_an_unwritable_store_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match=r"cannot write .* TRIBUNAL_STORE"):
        put(store)
    with pytest.raises(StoreError, match="cannot write"), store.lock("things", "a"):
        pass


def test_the_lineage_names_each_ancestor_once(store: Store) -> None:
    parent = put(store, "a" * 32)
    entry = {"kind": parent.kind, "key": parent.key, "digest": parent.digest}
    put(store, "b" * 32, inputs={"one": entry, "two": entry})
    assert [m.key for m in store.lineage("things", "b" * 32)] == ["b" * 32, "a" * 32]


HOLDER = """
import sys, time
from artifacts.store import Store
with Store(sys.argv[1]).lock("things", "k"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_holder(store: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    waited: list[bool] = []
    started = time.monotonic()
    with store.lock("things", "k", lambda: waited.append(True)):
        assert time.monotonic() - started < 10
    holder.wait()
    holder.stdout.close()


def test_a_held_lock_makes_others_wait_and_says_so(store: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("60", "0.6"), str(store.root)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    waited: list[bool] = []
    started = time.monotonic()
    with store.lock("things", "k", lambda: waited.append(True)):
        assert waited == [True]
        assert time.monotonic() - started > 0.2
    holder.wait()
    holder.stdout.close()
