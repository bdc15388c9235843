"""Container, compose and systemd files: each names what exists, and its commands run and stop."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import httpx
import prefect.settings
import pytest
import yaml
from prefect_stack import BIN, LOOPBACK, PATIENCE, ROOT, Stack, answers, free_port, stop, wait_until

from flows.settings import Settings
from flows.worker import OBEDIENCE

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SYSTEMD = ROOT / "deploy" / "systemd"
HOME = "/opt/tribunal"  # where the units expect the checkout
ENVIRONMENT_FILE = (SYSTEMD / "tribunal.env.example").read_text()


def unit(name: str) -> ConfigParser:
    """A systemd unit as sections of values; ours repeat no key."""
    parser = ConfigParser(interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string((SYSTEMD / name).read_text())
    return parser


def given(text: str) -> dict[str, str]:
    """What an environment file sets."""
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", text, flags=re.MULTILINE))


def instructions(name: str) -> list[str]:
    """Arguments of every instruction of one kind in the Dockerfile."""
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, flags=re.MULTILINE)


def test_the_image_copies_what_exists_and_the_build_context_holds() -> None:
    kept = {line[1:].rstrip("/") for line in ignored() if line.startswith("!")}
    copied = {part.rstrip("/") for line in instructions("COPY") for part in line.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    assert ignored()[0] == "*"  # so that nothing else, a secret say, can get into an image
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def ignored() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_image_is_pinned_and_drops_root() -> None:
    assert instructions("FROM") == ["docker.io/library/python:3.11-slim-bookworm"]
    assert instructions("USER") == ["10001:10001"]
    torch = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"][0]
    assert f'"{torch}"' in DOCKERFILE
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in re.findall(r"EXTRAS[:=] ?([a-z0-9,]+)", DOCKERFILE):
        assert set(line.split(",")) <= set(extras["optional-dependencies"])


def test_what_is_published_is_published_on_loopback_and_nothing_holds_a_secret() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published == {"server": ["127.0.0.1:4200:4200"]}
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH|TOKEN", name):
                assert re.fullmatch(r"\$\{[A-Z_]+(:-|:\?.*)\}", str(value)), name
    secrets = given((ROOT / ".env.example").read_text())
    assert set(secrets.values()) == {""}
    asked = set(re.findall(r"\$\{([A-Z_]+):\?", (ROOT / "compose.yaml").read_text()))
    assert asked <= set(secrets)


def test_ports_hosts_and_health_checks_agree() -> None:
    server, worker = SERVICES["server"], SERVICES["worker"]
    port = server["environment"]["PREFECT_SERVER_API_PORT"]
    assert instructions("EXPOSE") == [str(port)]
    assert f"http://127.0.0.1:{port}/api/health" in server["healthcheck"]["test"][-1]
    web = worker["environment"]["PREFECT_WORKER_WEBSERVER_PORT"]
    assert f"http://127.0.0.1:{web}/health" in worker["healthcheck"]["test"][-1]
    assert worker["environment"]["PREFECT_API_URL"] == f"http://server:{port}/api"
    assert server["environment"]["PREFECT_SERVER_DATABASE_HOST"] in SERVICES
    assert set(SERVICES["postgres"]["networks"]) < set(server["networks"])
    for service in SERVICES.values():
        for other, condition in service.get("depends_on", {}).items():
            has = "healthcheck" in SERVICES[other]
            assert has == (condition["condition"] == "service_healthy"), other
    told = given(ENVIRONMENT_FILE)
    host, port = told["PREFECT_SERVER_API_HOST"], told["PREFECT_SERVER_API_PORT"]
    assert told["PREFECT_API_URL"] == f"http://{host}:{port}/api"
    assert host == told["PREFECT_WORKER_WEBSERVER_HOST"] == LOOPBACK


def test_the_health_commands_tell_up_from_down() -> None:
    for name in ("server", "worker"):
        kind, program, *arguments = SERVICES[name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python")
        nowhere = arguments[-1].replace(":4200", f":{free_port()}").replace(":8080", ":1")
        done = subprocess.run([BIN / program, arguments[0], nowhere], capture_output=True)
        assert done.returncode == 1
        assert b"Connection refused" in done.stderr


def test_every_setting_is_one() -> None:
    ours = {f"TRIBUNAL_{name.upper()}" for name in Settings.model_fields} | {"TRIBUNAL_ROOT"}
    set_by_us = {name for s in SERVICES.values() for name in s.get("environment", {})}
    set_by_us |= set(given(ENVIRONMENT_FILE.replace("#PREFECT", "PREFECT")))
    set_by_us |= set(re.findall(r"\b((?:PREFECT|TRIBUNAL)_[A-Z_]+)=", DOCKERFILE))
    assert len(set_by_us) > 20
    for name in set_by_us:
        if name.startswith(("PREFECT_", "TRIBUNAL_")):
            assert name in ours or hasattr(prefect.settings, name), name
    assert not hasattr(prefect.settings, "PREFECT_WORKER_WEB_PORT")


def test_a_stop_leaves_a_worker_the_time_that_it_takes() -> None:
    for command, patience in (
        (SERVICES["worker"]["command"], SERVICES["worker"]["stop_grace_period"]),
        (
            shlex.split(unit("tribunal-worker.service")["Service"]["ExecStart"]),
            unit("tribunal-worker.service")["Service"]["TimeoutStopSec"],
        ),
    ):
        finish = float(command[command.index("--finish-within") + 1])
        assert finish + 2 * OBEDIENCE < float(str(patience).rstrip("s"))
    for name in ("tribunal-server.service", "tribunal-worker.service"):
        assert unit(name)["Service"]["KillMode"] == "mixed"  # children are their parent's to stop


@pytest.mark.parametrize("name", ["tribunal-server.service", "tribunal-worker.service"])
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd is not installed")
    for original in SYSTEMD.glob("*.service"):
        text = original.read_text().replace(f"{HOME}/.venv/bin", str(BIN))
        (tmp_path / original.name).write_text(text)
    done = verify(tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert name not in done.stderr
    (tmp_path / name).write_text((tmp_path / name).read_text().replace("KillMode=", "KillMod="))
    assert "KillMod" in verify(tmp_path / name).stderr


def verify(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def installed(tmp_path: Path) -> Stack:
    """The environment file, its folders and ports ours, and Prefect's password set."""
    port, web = free_port(), free_port()
    text = ENVIRONMENT_FILE.replace("#PREFECT", "PREFECT").replace(HOME, str(ROOT))
    text = text.replace("/var/lib/tribunal", str(tmp_path)).replace(":4200", f":{port}")
    told = given(text.replace("_PORT=4200", f"_PORT={port}").replace("_PORT=8080", f"_PORT={web}"))
    told.pop("PREFECT_SERVER_DATABASE_CONNECTION_URL")  # tests/test_postgres.py is about that
    return Stack(tmp_path, told, port)


def command(name: str, key: str, settings: dict[str, str]) -> list[str]:
    """A command of a unit with its paths and variables replaced."""
    line = unit(name)["Service"][key].replace(f"{HOME}/.venv/bin", str(BIN))
    line = re.sub(r"\$\{([A-Z_]+)\}", lambda found: settings[found[1]], line)
    return shlex.split(line.replace("%H", "this-host"))


def ask(stack: Stack, path: str, auth: tuple[str, str] | None) -> int:
    with httpx.Client(trust_env=False, auth=auth) as client:
        return client.get(stack.api + path).status_code


@pytest.mark.slow
def test_the_units_start_are_healthy_want_the_password_and_stop(installed: Stack) -> None:
    told = dict(installed.settings)
    server_unit, worker_unit = "tribunal-server.service", "tribunal-worker.service"
    web = f"http://{LOOPBACK}:{told['PREFECT_WORKER_WEBSERVER_PORT']}/health"
    worker = installed.start("worker", *command(worker_unit, "ExecStart", told))
    wait_until("a worker that waits for its server", lambda: answers(web))
    server = installed.start("server", *command(server_unit, "ExecStart", told))
    try:
        post = command(server_unit, "ExecStartPost", told)
        assert subprocess.run(post, env=os.environ | {"no_proxy": "*"}).returncode == 0
        assert ask(installed, "/health", None) == 200
        assert ask(installed, "/version", None) == 401
        assert ask(installed, "/version", ("user", "wrong")) == 401
        assert ask(installed, "/version", ("user", "password")) == 200
        wait_until("the worker to be known", lambda: known_workers(installed) == ["this-host"])
        installed.set_up()
    finally:
        how = signal.Signals[unit(worker_unit)["Service"]["KillSignal"]]
        codes = stop(worker, how, PATIENCE), stop(server, how, PATIENCE)
    assert codes[0] == 0
    assert codes[1] in (0, -signal.SIGTERM)  # which systemd takes for a clean end
    assert not answers(web)


def known_workers(stack: Stack) -> list[str]:
    pools = [pool["name"] for pool in stack.ask("POST", "/work_pools/filter", {})]
    if "tribunal" not in pools:
        return []
    found = stack.ask("POST", "/work_pools/tribunal/workers/filter", {})
    return [worker["name"] for worker in found if worker["status"] == "ONLINE"]
