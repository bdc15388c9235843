"""Prefect on PostgreSQL, set as compose.yaml sets it: two workers run two deployments at once."""

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
import yaml
from prefect_stack import LOOPBACK, ROOT, Stack, free_port, stop, wait_until
from small_study import digests, write_config

from artifacts.store import Store

pytestmark = pytest.mark.slow

SERVERS = Path("/usr/lib/postgresql")  # where Debian puts each major version
PASSWORD = "p4ss/of:this@test#%25"  # all that a URL would take for its own
AUTH = "user:password-of-this-test"


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


def settings(cluster: Cluster) -> dict[str, str]:
    """What compose.yaml sets for the server, with the places and passwords of this test."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    told = {name: str(value) for name, value in services["server"]["environment"].items()}
    ours = {
        "PREFECT_SERVER_API_AUTH_STRING": AUTH,
        "PREFECT_SERVER_DATABASE_HOST": LOOPBACK,
        "PREFECT_SERVER_DATABASE_PORT": str(cluster.port),
        "PREFECT_SERVER_DATABASE_PASSWORD": PASSWORD,
    }
    assert ours.keys() <= told.keys()
    for own in ("API_HOST", "API_PORT", "UI_API_URL"):  # the stack's to choose
        told.pop(f"PREFECT_SERVER_{own}")
    assert not [name for name, value in (told | ours).items() if "$" in value]
    return told | ours | {"PREFECT_API_AUTH_STRING": AUTH}


def test_two_workers_run_two_deployments_at_once_on_postgres(
    cluster: Cluster, tmp_path: Path
) -> None:
    stack = Stack(tmp_path, settings(cluster))
    config = str(write_config(tmp_path))
    names = ["w1", "w2"]
    with stack.server():
        stack.set_up()
        with stack.worker("w1", "--limit", "1"), stack.worker("w2", "--limit", "1"):
            wait_until("both workers", lambda: stack.workers() == names)
            runs = [
                stack.submit("benchmark/organism", config=config),
                stack.submit("benchmark/adhoc", config=config, overrides=["seed=1"]),
            ]
            for run in runs:
                assert stack.wait_state(run, "COMPLETED", "FAILED", "CRASHED") == "COMPLETED"
        assert "succeeded" in stack.prefect("server", "database", "upgrade", "--yes")
    assert all("Finished in state Completed" in stack.log(name).read_text() for name in names)
    each_made_once(stack)
    assert not list(tmp_path.rglob("prefect.db"))
    assert not [name for name in ("server", *names) if PASSWORD in stack.log(name).read_text()]
    kept = sorted(f"{run}|COMPLETED" for run in runs)
    assert flow_runs(cluster, "prefect") == kept
    at_once = "SELECT max(start_time) < min(end_time) FROM flow_run"
    assert query(cluster, "prefect", at_once) == ["t"]
    restore(cluster, "prefect", "restored")
    assert flow_runs(cluster, "restored") == kept


def each_made_once(stack: Stack) -> None:
    """Two runs of two studies made every artifact of the store, and none of them twice."""
    store = Store(stack.store)
    made = Counter(f"{line['kind']}/{line['key']}" for line in stack.events("made"))
    assert made == Counter(digests(store).keys())
    assert sum(kind == "studies" for kind, _ in store.entries()) == 2
    assert not (stack.store / ".quarantine").exists()
    for kind, key in store.entries():
        store.check(kind, key)


def query(cluster: Cluster, database: str, sql: str) -> list[str]:
    """The rows of a query, past Prefect."""
    return cluster.run("psql", "--no-align", "--tuples-only", "-c", sql, database).split()


def flow_runs(cluster: Cluster, database: str) -> list[str]:
    """Every flow run that has begun, and its state."""
    began = "SELECT id, state_type FROM flow_run WHERE start_time IS NOT NULL"
    return sorted(query(cluster, database, began))


def restore(cluster: Cluster, database: str, other: str) -> None:
    """Dump one database into another, as docs/running.md does."""
    dump = str(cluster.folder / "prefect.dump")
    cluster.run("pg_dump", "--format=custom", f"--file={dump}", database)
    cluster.run("createdb", other)
    cluster.run("pg_restore", "--exit-on-error", f"--dbname={other}", dump)
