"""Prefect on PostgreSQL: a server, two workers, several runs at once, a restart, an upgrade."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect_stack import LOOPBACK, Stack, free_port, stop, wait_until
from small_study import digests, write_config

from artifacts.store import Store

pytestmark = pytest.mark.slow

SERVERS = Path("/usr/lib/postgresql")  # where Debian puts each major version
PASSWORD = "p4ss-of-this-test"


def programs() -> Path:
    """The folder of PostgreSQL's programs; without them CI fails and others skip."""
    found = shutil.which("initdb")
    versions = sorted(SERVERS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found or versions:
        return Path(found).resolve().parent if found else versions[-1].parent
    missing = "PostgreSQL is not installed (apt-get install postgresql)"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL server of this test alone."""

    programs: Path
    folder: Path
    port: int
    user: str | None  # the account it runs under; None is ours

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://prefect:{PASSWORD}@{LOOPBACK}:{self.port}/prefect"

    def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs against this cluster; what it printed."""
        reach = {"PGHOST": LOOPBACK, "PGPORT": str(self.port), "PGUSER": "prefect"}
        done = subprocess.run(
            [self.programs / program, *arguments],
            env=os.environ | reach | {"PGPASSWORD": PASSWORD},
            cwd=self.folder,
            user=self.user,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(
                [
                    *(self.programs / "postgres", "-D", self.folder / "data"),
                    *("-p", str(self.port), "-k", self.folder),
                    *("-c", f"listen_addresses={LOOPBACK}", "-c", "fsync=off"),
                ],
                cwd=self.folder,
                user=self.user,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ready(self) -> bool:
        asked = [self.programs / "pg_isready", "-q", "-h", LOOPBACK, "-p", str(self.port)]
        return subprocess.run(asked).returncode == 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster with a password, in a folder of its own, stopped by its process id."""
    where = programs()
    user = "postgres" if os.geteuid() == 0 else None  # initdb refuses root
    with tempfile.TemporaryDirectory(prefix="tribunal-pg-") as folder:
        found = Cluster(where, Path(folder), free_port(), user)
        if user:
            shutil.chown(folder, user)
        secret = found.folder / "password"
        secret.write_text(PASSWORD)
        found.run(
            "initdb",
            *("--pgdata", str(found.folder / "data"), "--username", "prefect"),
            *("--auth", "scram-sha-256", "--pwfile", str(secret), "--no-sync"),
        )
        process = found.start()
        try:
            wait_until("PostgreSQL", found.ready)
            found.run("createdb", "prefect")
            yield found
        finally:
            stop(process, signal.SIGINT)  # its fast shutdown


def test_two_workers_run_two_deployments_at_once_on_postgres(
    cluster: Cluster, tmp_path: Path
) -> None:
    stack = Stack(tmp_path, {"PREFECT_SERVER_DATABASE_CONNECTION_URL": cluster.url})
    one, other = write_config(tmp_path, "one"), write_config(tmp_path, "other")
    with stack.server():
        stack.set_up()
        with stack.worker("w1", "--limit", "2"), stack.worker("w2", "--limit", "2"):
            runs = [
                stack.submit("benchmark/organism", config=str(one)),
                stack.submit("benchmark/adhoc", config=str(one)),
                stack.submit("benchmark/adhoc", config=str(other), overrides=["seed=1"]),
            ]
            for run in runs:
                assert stack.wait_state(run, "COMPLETED", "FAILED", "CRASHED") == "COMPLETED"
        upgraded = stack.prefect("server", "database", "upgrade", "--yes")
        assert "succeeded" in upgraded
    assert all("Finished in state Completed" in stack.log(w).read_text() for w in ("w1", "w2"))
    each_made_once(stack)
    with stack.server():
        assert [stack.state(run) for run in runs] == ["COMPLETED"] * 3
    said = stack.log("server").read_text()
    for trouble in ("ERROR", "database is locked", "Traceback", PASSWORD):
        assert trouble not in said
    assert not (tmp_path / "prefect" / "prefect.db").exists()
    assert restored_runs(cluster) == "3"


def each_made_once(stack: Stack) -> None:
    """Three runs of two studies made every artifact of the store, and none of them twice."""
    store = Store(stack.store)
    made = Counter(f"{line['kind']}/{line['key']}" for line in stack.events("made"))
    assert made == Counter(digests(store).keys())
    assert sum(kind == "studies" for kind, _ in store.entries()) == 2
    assert not (stack.store / ".quarantine").exists()


def restored_runs(cluster: Cluster) -> str:
    """Flow runs in a second database, restored from a dump of the first: docs/running.md."""
    dump = str(cluster.folder / "prefect.dump")
    cluster.run("pg_dump", "--format=custom", f"--file={dump}", "prefect")
    cluster.run("createdb", "restored")
    cluster.run("pg_restore", "--exit-on-error", "--dbname=restored", dump)
    query = "SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'"
    return cluster.run("psql", "--no-align", "--tuples-only", "-c", query, "restored").strip()
