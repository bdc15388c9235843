"""A Prefect server and its workers as real processes: started, asked, stopped by process id."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PATIENCE = 300.0  # seconds; only a broken stack, or a very busy machine, waits that long
LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def clean_environment() -> dict[str, str]:
    """The environment of this process without what would configure Prefect or Tribunal."""
    ours = ("PREFECT_", "TRIBUNAL_", "COVERAGE_", "NOTIFY_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def wait_until(what: str, happened: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """What `happened` returns once it is true.

    Raises:
        TimeoutError: it never was.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = happened()
        if found:
            return found
        time.sleep(0.2)
    raise TimeoutError(f"waited {patience:.0f} s for {what}")


def answers(url: str) -> bool:
    """Whether a health page says 200."""
    try:
        with httpx.Client(trust_env=False) as client:
            return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Stack:
    """One Prefect home, its server on a port of loopback, and the store its workers fill."""

    home: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    _server: subprocess.Popen[bytes] = field(init=False, repr=False)

    @property
    def api(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/api"

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def environment(self) -> dict[str, str]:
        return clean_environment() | {
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "TRIBUNAL_ROOT": str(ROOT),
            "TRIBUNAL_STORE": str(self.store),
            "TRIBUNAL_LOG": str(self.home / "events.jsonl"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **self.settings,
        }

    def log(self, name: str) -> Path:
        """Where a process of this stack writes what it says."""
        return self.home / f"{name}.log"

    def start(self, name: str, *command: str | Path, **more: str) -> subprocess.Popen[bytes]:
        """Start a process that writes to its log, in a session of its own; `more` environment."""
        with self.log(name).open("ab") as output:
            return subprocess.Popen(
                command,
                env=self.environment | more,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @contextmanager
    def server(self) -> Iterator[None]:
        """The server, healthy; stopped at the end."""
        self._start_server()
        try:
            yield
        finally:
            stop(self._server)

    def restart_server(self) -> None:
        """Stop the server as systemd and containers do, and start it again."""
        assert stop(self._server) in (0, -signal.SIGTERM)
        self._start_server()

    def _start_server(self) -> None:
        place = ("--host", LOOPBACK, "--port", str(self.port))
        self._server = self.start("server", BIN / "prefect", "server", "start", *place)
        self.wait_healthy(self._server)

    def wait_healthy(self, server: subprocess.Popen[bytes]) -> None:
        """Wait for the server's health page."""

        def healthy() -> bool:
            assert server.poll() is None, self.log("server").read_text()
            return answers(f"{self.api}/health")

        wait_until("the server", healthy)

    @contextmanager
    def worker(self, name: str, *options: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker of pool tribunal; stopped at the end if it still runs."""
        web = {
            "PREFECT_WORKER_WEBSERVER_HOST": LOOPBACK,
            "PREFECT_WORKER_WEBSERVER_PORT": str(free_port()),
        }
        command = (BIN / "tribunal", "worker", "--name", name, *options)
        process = self.start(name, *command, **(web | more))
        try:
            yield process
        finally:
            stop(process)

    def prefect(self, *arguments: str) -> str:
        """Run Prefect's command line in the checkout; what it printed."""
        done = subprocess.run(
            [BIN / "prefect", "--no-prompt", *arguments],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def set_up(self) -> None:
        """Make the work pool, the deployments and the automation, as an operator does."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", ROOT / "deploy" / "setup.sh"],
            env=self.environment | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def submit(self, deployment: str, **parameters: Any) -> str:
        """Ask for a run of a deployment; its id."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        body = {"parameters": parameters}
        run = self.ask("POST", f"/deployments/{found['id']}/create_flow_run", body)
        return str(run["id"])

    def state(self, run: str) -> str:
        """Type of a flow run's state: RUNNING, COMPLETED, CRASHED, ..."""
        return str(self.ask("GET", f"/flow_runs/{run}")["state_type"])

    def wait_state(self, run: str, *states: str) -> str:
        """Wait until a flow run is in one of the states."""

        def reached() -> str | None:
            state = self.state(run)
            return state if state in states else None

        return str(wait_until(f"run {run} to be {states}", reached))

    def workers(self) -> list[str]:
        """Names of the workers that the pool tribunal has online."""
        pools = [pool["name"] for pool in self.ask("POST", "/work_pools/filter", {})]
        if "tribunal" not in pools:
            return []
        found = self.ask("POST", "/work_pools/tribunal/workers/filter", {})
        return sorted(worker["name"] for worker in found if worker["status"] == "ONLINE")

    def events(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind in the log of artifacts: made, cached or said."""
        lines = map(json.loads, (self.home / "events.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request to the server's API."""
        user, _, password = self.settings.get("PREFECT_API_AUTH_STRING", "").partition(":")
        auth = (user, password) if user else None
        with httpx.Client(trust_env=False, timeout=30, auth=auth) as client:
            content = None if body is None else json.dumps(body)
            answer = client.request(method, self.api + path, content=content)
            for _ in range(30):
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    break
                time.sleep(1)  # SQLite is busy; Prefect's own client asks again too
                answer = client.request(method, self.api + path, content=content)
            answer.raise_for_status()
            return answer.json() if answer.content else None


def stop(
    process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM, patience: float = 60
) -> int:
    """Stop a process by its id and wait; whatever it left behind is killed. Its exit code."""
    family = descendants(process.pid)
    if process.poll() is None:
        process.send_signal(how)
    try:
        return process.wait(patience)
    finally:
        for member in [*family, *descendants(process.pid)]:
            if member.is_running():
                member.kill()
        if process.poll() is None:
            process.kill()
            process.wait()


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that a process started, and theirs."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
