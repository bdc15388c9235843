"""Object storage: the study on a real S3 protocol gives what a folder gives, whoever writes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from s3_server import BUCKET, s3_server
from small_study import command, digests, trial_table, tribunal, write_config

from artifacts.catalog import user_query
from artifacts.errors import QueryError
from artifacts.store import MANIFEST, Manifest, Store, parquet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """A server, reachable by this process and by commands."""
    with s3_server() as environment:
        before = dict(os.environ)
        os.environ.update(environment)
        yield environment
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, config_path: Path) -> Store:
    store = Store(tmp_path_factory.mktemp("disk") / "store")
    done = tribunal(store, "run", str(config_path))
    assert done.returncode == 0, done.stderr
    return store


@pytest.fixture(scope="module")
def in_bucket(server: dict[str, str], config_path: Path) -> Store:
    store = Store(f"s3://{BUCKET}/one/store")
    done = tribunal(store, "run", str(config_path))
    assert done.returncode == 0, done.stderr
    return store


def test_the_study_in_a_bucket_is_the_study_on_disk(on_disk: Store, in_bucket: Store) -> None:
    assert digests(in_bucket) == digests(on_disk)
    assert trial_table(in_bucket).equals(trial_table(on_disk), null_equal=True)


def test_a_second_run_makes_nothing(in_bucket: Store, config_path: Path) -> None:
    before = in_bucket.place.sizes("")
    done = tribunal(in_bucket, "run", str(config_path))
    assert done.returncode == 0, done.stderr
    assert "made in" not in done.stderr
    assert in_bucket.place.sizes("") == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("rank",),
        ("show", "0"),
        ("plan", "CONFIG"),
        ("relabel", "--labeller", "prefix-strict"),
        ("sql", "SELECT count(*) FROM responses"),
        ("store", "ls"),
        ("store", "verify"),
        ("store", "gc"),
    ],
)
def test_every_reading_command_works(
    in_bucket: Store, config_path: Path, arguments: tuple[str, ...]
) -> None:
    given = [str(config_path) if a == "CONFIG" else a for a in arguments]
    done = tribunal(in_bucket, *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_sql_stays_in_the_store(server: dict[str, str], in_bucket: Store) -> None:
    in_bucket.place._fs.pipe_file(f"{BUCKET}/secret.csv", b"a,b")  # type: ignore[attr-defined]
    for sql in (
        f"SELECT * FROM read_csv('s3://{BUCKET}/secret.csv')",
        f"SELECT * FROM read_csv('s3://{BUCKET}/one/store/../../secret.csv')",
        f"SELECT * FROM 's3://{BUCKET}/secret.csv'",
        f"COPY (SELECT 1) TO 's3://{BUCKET}/one/store/x.parquet'",
    ):
        with pytest.raises(QueryError):
            user_query(in_bucket, sql)
    assert "x.parquet" not in "".join(in_bucket.place.sizes(""))


def test_two_writers_make_each_artifact_once_or_waste_a_computation(
    server: dict[str, str], on_disk: Store, config_path: Path
) -> None:
    store = Store(f"s3://{BUCKET}/two/store")
    environment = {**os.environ, "TRIBUNAL_STORE": store.location, "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(
            command("run", str(config_path)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    assert digests(store) == digests(on_disk)
    made = [line for text in errors for line in text.splitlines() if ": made in" in line]
    assert len(made) >= len(list(store.entries()))
    assert store.place.folders(".quarantine") == []
    left = {path.split("/")[0] for path in store.place.sizes("")}
    assert not {name for name in left if name.startswith(".")}


def test_a_killed_writer_leaves_nothing_half_made(
    server: dict[str, str], on_disk: Store, config_path: Path
) -> None:
    store = Store(f"s3://{BUCKET}/killed/store")
    environment = {**os.environ, "TRIBUNAL_STORE": store.location, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(
        command("run", str(config_path)), env=environment, stderr=subprocess.PIPE, text=True
    )
    assert victim.stderr is not None
    for line in victim.stderr:
        if "trials 0-1: made" in line:
            break
    victim.kill()
    victim.wait()
    victim.stderr.close()
    whole = digests(store)
    assert whole
    assert whole.items() <= digests(on_disk).items()
    done = tribunal(store, "run", str(config_path))
    assert done.returncode == 0, done.stderr
    assert digests(store) == digests(on_disk)


def test_what_is_torn_in_the_bucket_is_noticed_and_rebuilt(
    in_bucket: Store, on_disk: Store, config_path: Path
) -> None:
    refs = [m.ref for m in in_bucket.manifests()]
    data, manifest = refs[0], refs[-1]
    fs = in_bucket.place._fs  # type: ignore[attr-defined]
    fs.pipe_file(in_bucket.data_url(data), b"torn")
    fs.pipe_file(in_bucket.place.url(f"{manifest.kind}/{manifest.key}/{MANIFEST}"), b"{")
    done = tribunal(in_bucket, "store", "verify")
    assert done.returncode == 1
    assert done.stdout.count("'") == 4, done.stdout
    assert tribunal(in_bucket, "run", str(config_path)).returncode == 0
    assert digests(on_disk).items() <= digests(in_bucket).items()
    assert tribunal(in_bucket, "store", "verify").returncode == 0


def test_only_one_of_two_different_contents_becomes_the_artifact(server: dict[str, str]) -> None:
    first, second = (Store(f"s3://{BUCKET}/race/store") for _ in range(2))
    draft = Manifest("things", "a" * 32, version=1, rows=1)
    one, other = (parquet(pl.DataFrame({"n": [n]})) for n in (1, 2))
    assert first.put(draft, one) == second.put(draft, other)
    assert not second.place.publish(f"things/{'a' * 32}", {"data-x": other, MANIFEST: b"late"})
    assert second.read_bytes(first.put(draft, other)) == one


def test_a_bucket_that_is_not_there_is_one_clear_line(
    server: dict[str, str], config_path: Path
) -> None:
    store = Store("s3://no-such-bucket/store")
    done = tribunal(store, "run", str(config_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot write to the store 's3://no-such-bucket/store'" in done.stderr
