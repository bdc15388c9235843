"""What every place promises a store: a folder of this machine, and object storage in memory."""

from __future__ import annotations

import errno
import threading
import time
import uuid
from pathlib import Path

import polars as pl
import pytest

from artifacts import object_reader
from artifacts.errors import StoreError
from artifacts.object_place import ObjectPlace
from artifacts.places import MANIFEST, LocalPlace, Place, size_text
from artifacts.store import Manifest, Ref, Store, parquet

FRAME = pl.DataFrame({"number": [1, 2, 3]})


@pytest.fixture(params=["folder", "object storage"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"memory://{uuid.uuid4().hex}/a store"


@pytest.fixture
def place(location: str) -> Place:
    return Store(location).place


@pytest.fixture
def anywhere(location: str) -> Store:
    return Store(location)


def put(store: Store, key: str = "a" * 32, frame: pl.DataFrame = FRAME) -> Ref:
    draft = Manifest("things", key, version=1, rows=frame.height, provenance={"created": "x"})
    return store.put(draft, parquet(frame))


def test_what_is_put_is_read(anywhere: Store) -> None:
    ref = put(anywhere)
    assert anywhere.read(ref).equals(FRAME)
    assert anywhere.find("things", ref.key) == ref
    assert list(anywhere.entries()) == [("things", ref.key)]
    assert [m.ref for m in anywhere.manifests()] == [ref]
    assert anywhere.data_url(ref).startswith(anywhere.location)


def test_what_is_not_there_is_not_found(anywhere: Store) -> None:
    assert anywhere.find("things", "a" * 32) is None
    assert list(anywhere.entries()) == []
    assert list(anywhere.manifests()) == []
    assert anywhere.place.sizes("") == {}
    with pytest.raises(StoreError, match="no artifact"):
        anywhere.manifest("things", "a" * 32)


def test_the_first_of_two_writers_wins_and_both_get_its_artifact(anywhere: Store) -> None:
    first = put(anywhere)
    assert put(anywhere, frame=pl.DataFrame({"number": [4]})) == first
    assert anywhere.read(first).equals(FRAME)


def test_a_folder_is_published_once(place: Place) -> None:
    assert place.publish("things/k", {"data-1": b"1", MANIFEST: b"first"})
    assert not place.publish("things/k", {"data-2": b"2", MANIFEST: b"second"})
    assert place.read(f"things/k/{MANIFEST}") == b"first"
    assert place.read("things/k/data-1") == b"1"


def test_many_writers_of_one_key_leave_one_whole_artifact(location: str) -> None:
    refs: list[Ref] = []

    def write(number: int) -> None:
        refs.append(put(Store(location), frame=pl.DataFrame({"number": [number]})))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(refs)) == 1
    assert Store(location).check("things", refs[0].key).ref == refs[0]


def test_what_is_torn_is_set_aside_and_made_again(anywhere: Store) -> None:
    ref = put(anywhere)
    path = f"things/{ref.key}/{anywhere.manifest('things', ref.key).data}"
    overwrite(anywhere.place, path, b"torn")
    said: list[str] = []
    assert anywhere.find("things", ref.key, said.append) is None
    assert "not what was written" in said[0]
    assert put(anywhere) == ref
    assert anywhere.find("things", ref.key) == ref
    assert len(anywhere.place.folders(".quarantine")) == 1


def test_a_torn_manifest_is_set_aside_too(anywhere: Store) -> None:
    ref = put(anywhere)
    overwrite(anywhere.place, f"things/{ref.key}/{MANIFEST}", b"{")
    assert anywhere.find("things", ref.key) is None
    assert list(anywhere.manifests()) == []
    assert put(anywhere) == ref


def test_what_cannot_be_read_now_is_neither_missing_nor_corrupt(
    anywhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = put(anywhere)
    with monkeypatch.context() as outage:

        def fail(path: str) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        outage.setattr(anywhere.place, "read", fail)
        with pytest.raises(StoreError, match=r"^cannot read '.*' \(input/output error\)"):
            anywhere.find("things", ref.key)
        with pytest.raises(StoreError):
            put(anywhere, frame=pl.DataFrame({"number": [4]}))
    assert anywhere.find("things", ref.key) == ref
    assert anywhere.place.folders(".quarantine") == []


def test_the_data_of_a_writer_in_a_bucket_waits_for_its_manifest() -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    other = f"things/{'a' * 32}/data-of-another.parquet"
    store.place._fs.pipe_file(store.place._at(other), b"uploaded")  # type: ignore[attr-defined]
    put(store)
    assert store.place.read(other) == b"uploaded"


def test_a_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    made, given = tmp_path / "made", tmp_path / "given"
    given.mkdir()
    for root in (made, given):
        with Store(str(root)).lock("things", "k"):
            assert root.is_dir()
    assert not made.exists()
    assert given.is_dir()


def test_large_files_of_a_bucket_are_read_in_parts(
    hasty: ObjectPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_reader, "SMALL", 100)
    monkeypatch.setattr(object_reader, "END", 64)
    content = bytes(range(250)) * 4
    hasty._fs.pipe_file(hasty._at("large"), content)
    hasty._fs.pipe_file(hasty._at("small"), b"abc")
    reader, asked = hasty.reader({"large": 1000, "small": 3}), []
    fetch = hasty._fs.cat_file

    def counted(path: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return bytes(fetch(path, start=start, end=end))

    monkeypatch.setattr(hasty._fs, "cat_file", counted)
    file = reader.open(hasty._at("large"))
    file.seek(-8, 2)
    assert file.read(8) == content[-8:]
    file.seek(10)
    assert file.read(5) == content[10:15]
    assert all(end - start <= 64 for start, end in asked)
    file.seek(0)
    assert file.read() == content
    monkeypatch.undo()
    assert reader.open(hasty._at("small")).read() == b"abc"


def overwrite(place: Place, path: str, content: bytes) -> None:
    if isinstance(place, LocalPlace):
        (place.root / path).write_bytes(content)
    else:
        place._fs.pipe_file(place._at(path), content)  # type: ignore[attr-defined]


def test_one_holder_at_a_time(location: str) -> None:
    inside, most, waits = [0], [0], []

    def work() -> None:
        with Store(location).lock("things", "k", lambda: waits.append(1)):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert waits


def test_other_names_are_not_locked(anywhere: Store) -> None:
    waits: list[int] = []
    with anywhere.lock("things", "a"), anywhere.lock("things", "b", lambda: waits.append(1)):
        assert not waits


def test_a_running_build_is_known_until_it_ends(anywhere: Store) -> None:
    ref = put(anywhere)
    with anywhere.building() as find:
        assert find("things", ref.key) == ref
        assert find("things", "b" * 32) is None
        assert set(anywhere.place.registered()) == {f"things/{ref.key}", f"things/{'b' * 32}"}
    assert anywhere.place.registered() == []


def test_deleting_removes_one_folder(anywhere: Store) -> None:
    gone, kept = put(anywhere), put(anywhere, "b" * 32)
    anywhere.delete(f"things/{gone.key}")
    assert list(anywhere.entries()) == [("things", kept.key)]
    assert anywhere.place.abandoned() == []


def test_sizes_are_of_every_file(anywhere: Store) -> None:
    ref = put(anywhere)
    manifest = anywhere.manifest("things", ref.key)
    sizes = anywhere.place.sizes("")
    assert sizes[f"things/{ref.key}/{manifest.data}"] == manifest.bytes
    assert set(sizes) == {f"things/{ref.key}/{name}" for name in (manifest.data, MANIFEST)}


def test_a_quota_is_kept_and_said(location: str) -> None:
    put(Store(location))
    small = Store(location, quota=len(parquet(FRAME)) + 10)
    assert put(small).made  # there already
    with pytest.raises(StoreError, match=r"quota .* is .* B, and .* TRIBUNAL_QUOTA"):
        put(small, "b" * 32)
    assert len(list(small.entries())) == 1
    exact = Store(location, quota=2 * len(parquet(FRAME)))
    with pytest.raises(StoreError, match="quota"):
        put(exact, "c" * 32, pl.DataFrame({"number": range(9999)}))
    assert put(exact, "c" * 32).made  # what was refused does not count
    assert put(Store(location, quota=10**6), "b" * 32).made


class Hasty(ObjectPlace):
    """Object storage whose leases run out in no time."""

    lease = 0.3
    renewal = 0.1


@pytest.fixture
def hasty() -> Hasty:
    return Hasty(f"memory://{uuid.uuid4().hex}")


def test_a_dead_holders_lease_runs_out(hasty: Hasty) -> None:
    hasty._fs.pipe_file(hasty._at(".locks/k"), b'{"owner": "gone", "beat": 7}')
    said: list[int] = []
    with hasty.lock("k", lambda: said.append(1)):
        assert said == [1]
    assert not hasty.exists(".locks/k")


def test_a_live_holders_lease_does_not(hasty: Hasty) -> None:
    order = []

    def hold() -> None:
        with hasty.lock("k", None):
            order.append("held")
            time.sleep(1.0)  # three leases long
            order.append("released")

    holder = threading.Thread(target=hold)
    holder.start()
    while not order:
        time.sleep(0.01)
    with hasty.lock("k", None):
        order.append("second")
    holder.join()
    assert order == ["held", "released", "second"]


def test_content_that_differs_has_another_name(hasty: Hasty) -> None:
    assert hasty.data_name("data.parquet", "ab" * 32) != hasty.data_name("data.parquet", "cd" * 32)


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("s3://user:secret@bucket/x", "credentials"),
        ("nowhere://bucket", "cannot be on 'nowhere://'"),
        ("s3://bucket/*", "none of"),
    ],
)
def test_a_place_that_cannot_be_is_one_clear_line(location: str, told: str) -> None:
    with pytest.raises(StoreError, match=told) as caught:
        Store(location)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_sizes_are_told_in_decimal_units() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 2.5e9)] == ["0 B", "999 B", "1 kB", "2.5 GB"]
