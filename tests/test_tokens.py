"""Secrets of the environment leave no trace: not in store, log, output, figures or Prefect.

Every run has tokens and passwords set to random markers, and the failing ones fail in ways that
put one into an error: a hub that repeats the token it was sent, a store whose URL has a password.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import duckdb
import httpx
import polars as pl
import pytest
from prefect_stack import Stack, clean_environment, wait_until
from small_study import command, write_config

from artifacts.errors import one_line

pytestmark = pytest.mark.slow

PASSWORD = secrets.token_hex(16)
SECRETS = {
    "HF_TOKEN": f"hf_{secrets.token_hex(17)}",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{secrets.token_hex(17)}",
    "AWS_ACCESS_KEY_ID": "tribunal",
    "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
    "AWS_SESSION_TOKEN": secrets.token_hex(20),
    "TRIBUNAL_JUDGE_KEY": f"sk-{secrets.token_hex(20)}",
    "PREFECT_API_AUTH_STRING": f"admin:{secrets.token_hex(16)}",
    "PREFECT_SERVER_API_AUTH_STRING": "",  # the same, see below
}
SECRETS["PREFECT_SERVER_API_AUTH_STRING"] = SECRETS["PREFECT_API_AUTH_STRING"]
_URL = f"postgresql+asyncpg://tribunal:{PASSWORD}@127.0.0.1/prefect"
DATABASE = {
    "PREFECT_API_DATABASE_CONNECTION_URL": _URL,
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": _URL,
}
MARKERS = {PASSWORD} | {
    value.rpartition(":")[2] for value in SECRETS.values() if value != "tribunal"
}


def traces(folder: Path, markers: set[str] = MARKERS) -> dict[str, str]:
    """The marker that each file below a folder holds, however it is stored."""
    # All bytes first: a database that is opened takes its log of what is yet to be written with it.
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert contents
    return {
        str(file): marker
        for file, content in contents.items()
        for marker in markers
        if marker.encode() in content or holds(file, content, marker)
    }


def holds(file: Path, content: bytes, marker: str) -> bool:
    """Whether a file of a format that does not store text as it is holds a marker."""
    if content.startswith(b"PAR1"):
        return marker in pl.read_parquet(file).write_json()
    if content.startswith(b"SQLite format 3"):  # a long text may be split between two pages
        with closing(sqlite3.connect(file)) as connection:
            return any(marker in line for line in connection.iterdump())
    if content[8:12] == b"DUCK":
        with duckdb.connect(file, read_only=True) as connection:
            views = connection.execute("SELECT sql FROM duckdb_views()").fetchall()
        return any(marker in (text or "") for (text,) in views)
    return False


class Echo(BaseHTTPRequestHandler):
    """A hub that refuses everything and repeats the token in every way it can."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        said = f"refused {self.headers.get('Authorization')}"
        self.server.heard.append(said)  # type: ignore[attr-defined]
        self.send_response(401, said)
        for name in ("X-Error-Message", "X-Error-Code", "X-Request-Id"):
            self.send_header(name, said)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said.encode())

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def hub() -> Iterator[ThreadingHTTPServer]:
    """The hub on a port of loopback; `heard` has what it said."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.heard = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def environment(home: Path, hub: ThreadingHTTPServer) -> dict[str, str]:
    """Secrets, a hub that repeats them, and every place to write to inside `home`."""
    return {
        **SECRETS,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home / "hub"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # where nothing listens
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(home: Path, name: str, settings: Mapping[str, str], *arguments: str) -> int:
    """A command whose output is kept in `home`; its exit code."""
    with (home / f"{name}.log").open("w") as output:
        return subprocess.run(
            command(*arguments), env=settings, cwd=home, stdout=output, stderr=output
        ).returncode


@contextmanager
def heard_a_token(hub: ThreadingHTTPServer, name: str = "HF_TOKEN") -> Iterator[None]:
    """The twin of every silence: the token was sent, and repeated."""
    hub.heard.clear()  # type: ignore[attr-defined]
    yield
    assert any(SECRETS[name] in said for said in hub.heard)  # type: ignore[attr-defined]


def test_what_is_planted_is_found(tmp_path: Path) -> None:
    marker = secrets.token_hex(16)
    pl.DataFrame({"a": [[{"b": f"x{marker}y"}]]}).write_parquet(
        tmp_path / "a.parquet", compression="zstd"
    )
    with duckdb.connect(tmp_path / "b.duckdb") as views:
        views.execute(f"CREATE VIEW v AS SELECT '{marker}' AS a")
    with closing(sqlite3.connect(tmp_path / "c.db")) as table, table:
        table.execute("CREATE TABLE t (a)")
        for length in range(3000, 5000, 7):  # some lie across two pages
            table.execute("INSERT INTO t VALUES (?)", ("-" * length + marker,))
    (tmp_path / "d.log").write_text(f"Bearer {marker}\n")
    (tmp_path / "e.txt").write_text("nothing")
    assert {Path(name).suffix for name in traces(tmp_path, {marker})} == {
        *(".parquet", ".duckdb", ".db", ".log")
    }
    assert not traces(tmp_path, {secrets.token_hex(16)})


def test_an_error_hides_every_secret_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SECRETS | DATABASE).items():
        monkeypatch.setenv(name, value)
    for marker in MARKERS:
        assert marker not in one_line(f"'{marker}' and s3://user:{marker}@bucket/x")


def test_the_command_line_leaves_no_trace(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    config = str(write_config(tmp_path))
    settings = clean_environment() | environment(tmp_path, hub) | DATABASE
    settings |= {
        "TRIBUNAL_STORE": str(tmp_path / "store"),
        "TRIBUNAL_LOG": str(tmp_path / "events.jsonl"),
    }
    assert run(tmp_path, "run", settings, "run", config) == 0
    assert run(tmp_path, "sql", settings, "sql", "FROM artifacts") == 0
    with heard_a_token(hub):
        assert run(tmp_path, "model", settings, "run", config, "--set", "model.id=a/model") == 2
    with heard_a_token(hub):
        source = "prompts.harmful.test.source=a/dataset"
        assert run(tmp_path, "prompts", settings, "run", config, "--set", source) == 2
    judge = ("relabel", "--judge-model", "m", "--endpoint")
    with heard_a_token(hub, "TRIBUNAL_JUDGE_KEY"):
        address = f"http://127.0.0.1:{hub.server_port}/v1"
        assert run(tmp_path, "judge", settings, *judge, address) == 2
    address = f"http://user:{PASSWORD}@127.0.0.1:{hub.server_port}/v1"
    assert run(tmp_path, "address", settings, *judge, address) == 2
    source = f"prompts.harmful.test.source=https://user:{PASSWORD}@127.0.0.1/x.csv"
    assert run(tmp_path, "source", settings, "run", config, "--set", source) == 2
    inside = settings | {"TRIBUNAL_STORE": f"s3://tribunal:{PASSWORD}@bucket/store"}
    assert run(tmp_path, "password", inside, "run", config) == 2
    bucket = settings | {"TRIBUNAL_STORE": "s3://bucket/store"}
    assert run(tmp_path, "bucket", bucket, "run", config) == 2
    assert not traces(tmp_path)
    kinds = {path.suffix for path in tmp_path.rglob("*")}
    assert {".parquet", ".json", ".jsonl", ".png", ".duckdb", ".log"} <= kinds


def outcome(stack: Stack, config: str, *overrides: str) -> str:
    """The state in which a run of the deployment ends."""

    def submitted() -> str | None:
        try:
            return stack.submit("benchmark/adhoc", config=config, overrides=list(overrides))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:  # SQLite is busy
                raise
            return None

    run = str(wait_until("a run", submitted))
    return stack.wait_state(run, "COMPLETED", "FAILED", "CRASHED")


def test_prefect_is_left_no_trace(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    stack = Stack(tmp_path, environment(tmp_path, hub))
    config = str(write_config(tmp_path))
    with stack.server():
        stack.set_up()
        with stack.worker("worker", **DATABASE):
            assert outcome(stack, config) == "COMPLETED"
            with heard_a_token(hub):
                assert outcome(stack, config, "model.id=a/model") == "FAILED"
            settings = stack.environment | {"TRIBUNAL_STORE": str(tmp_path / "other")}
            with heard_a_token(hub):
                code = run(tmp_path, "cli", settings, "run", config, "--set", "model.id=a/model")
            assert code == 2
    assert not traces(tmp_path)
    assert os.path.getsize(tmp_path / "prefect" / "prefect.db") > 10_000
