"""Prefect: deployments load, a server and a worker run the small study, the UI shows it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from small_study import write_config

from artifacts.store import Store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server on a free port of loopback, and the environment to reach it."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "TRIBUNAL_"))}
    environment = kept | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "TRIBUNAL_ROOT": str(ROOT),
        "TRIBUNAL_STORE": str(home / "store"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/api/health")
        yield environment
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 90
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                if client.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.3)
    raise TimeoutError(url)


def prefect(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "prefect", "--no-prompt", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def api(environment: dict[str, str], path: str) -> Any:
    with httpx.Client(trust_env=False, base_url=environment["PREFECT_API_URL"]) as client:
        answer = client.post(path, json={"limit": 200})
        answer.raise_for_status()
        return answer.json()


def test_a_deployment_runs_the_study_and_shows_its_results(
    server: dict[str, str], tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    made = prefect(server, "work-pool", "create", "tribunal", "--type", "process")
    assert made.returncode == 0, made.stderr
    deployed = prefect(server, "deploy", "--all")
    assert deployed.returncode == 0, deployed.stderr + deployed.stdout
    worker = subprocess.Popen(
        [BIN / "prefect", "worker", "start", "--pool", "tribunal", "--type", "process"],
        env=server,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(2):
            ran = prefect(
                server,
                *("deployment", "run", "benchmark/adhoc", "--watch"),
                *("--params", json.dumps({"config": str(config)})),
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
        wrong = prefect(
            server, "deployment", "run", "benchmark/adhoc", "--watch", "--param", "config=organsim"
        )
        assert wrong.returncode == 1
    finally:
        worker.terminate()
        worker.wait(60)
    store = Store(server["TRIBUNAL_STORE"])
    assert {kind for kind, _ in store.entries()} >= {"generations", "tests", "leaderboards"}
    shown = {(a["key"], a["type"]) for a in api(server, "/artifacts/filter")}
    assert {("small-leaderboard", "table"), ("small-figure", "image")} <= shown
    states = [run["state_name"] for run in api(server, "/task_runs/filter")]
    artifacts = len(list(store.entries()))
    assert states.count("Completed") == artifacts
    assert states.count("Cached") == artifacts


def test_a_run_through_python_returns_references(server: dict[str, str], tmp_path: Path) -> None:
    config = write_config(tmp_path)
    code = (
        "from flows.benchmark import benchmark\n"
        "from flows.settings import load_config\n"
        f"found = benchmark(load_config({str(config)!r}))\n"
        "print(type(found).__name__, type(found.test).__name__, found.test.kind)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=server, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "Benchmark Ref tests", done.stderr


def test_the_command_line_goes_through_a_configured_server(
    server: dict[str, str], tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    arguments = ["run", str(config), "--set", "search.trials=2", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        env=server,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["leaderboard"]) == 2  # though the study holds 4 by now


def test_a_figure_is_a_flow_run_with_its_picture_and_tables_in_the_ui(
    server: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "few.toml"
    place = 'source = "organism/{}.jsonl", column = "text", split = "train[:4]"'.format
    config.write_text(
        'name = "few"\n[model]\nid = "organism"\ndtype = ["float32"]\nresponse_prefix = ""\n'
        "[heads]\ngroup = 1\ndraws = 2\nresamples = 100\nmax_new_tokens = 2\n"
        f"harmless = {{ {place('harmless-test')} }}\nheldout = {{ {place('harmful-search')} }}\n"
        f"[heads.prompts]\ntest = {{ {place('harmful-test')} }}\n"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "flows", "heads", str(config), "--format", "json"],
            env=server,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["config"] == "few"
    shown = {(a["key"], a["type"]) for a in api(server, "/artifacts/filter")}
    assert {("few-heads-heads", "image"), ("few-heads-0", "table")} <= shown
    runs = [run for run in api(server, "/flow_runs/filter") if run["name"] == "few"]
    assert [run["state_type"] for run in runs] == ["COMPLETED"], "the second time all was stored"
