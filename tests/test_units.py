"""Container, compose and systemd files: each names what exists, and its commands run and stop."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tomllib
from configparser import ConfigParser
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import prefect.settings
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.settings import PREFECT_WORKER_WEBSERVER_PORT, temporary_settings
from prefect_stack import BIN, LOOPBACK, PATIENCE, ROOT, Stack, free_port, stop, wait_until

from artifacts.errors import ConfigError
from flows.settings import Settings
from flows.worker import OBEDIENCE, health_address

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SYSTEMD = ROOT / "deploy" / "systemd"
HOME = "/opt/tribunal"  # where the units expect the checkout
SERVER_FILE = (SYSTEMD / "server.env.example").read_text()
WORKER_FILE = (SYSTEMD / "worker.env.example").read_text()
DOT_ENV = (ROOT / ".env.example").read_text()
CONSTRAINTS = (ROOT / "deploy" / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {f"TRIBUNAL_{name.upper()}" for name in Settings.model_fields}


def unit(name: str) -> ConfigParser:
    """A systemd unit as sections of values; ours repeat no key."""
    parser = ConfigParser(interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string((SYSTEMD / name).read_text())
    return parser


def given(text: str) -> dict[str, str]:
    """What an environment file sets."""
    return dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", text, flags=re.MULTILINE))


def offered(text: str) -> dict[str, str]:
    """The same with what is commented out."""
    return given(re.sub("^#(?=[A-Z0-9_]+=)", "", text, flags=re.MULTILINE))


def instructions(name: str) -> list[str]:
    """Arguments of every instruction of one kind in the Dockerfile."""
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, flags=re.MULTILINE)


def test_the_image_copies_what_exists_and_the_build_context_holds() -> None:
    kept = {line[1:].rstrip("/") for line in ignored() if line.startswith("!")}
    copied = {part.rstrip("/") for line in instructions("COPY") for part in line.split()[:-1]}
    assert copied - {"deploy/constraints.txt"} == kept  # that one comes early, for its layer
    assert all((ROOT / name).exists() for name in copied)
    assert ignored()[0] == "*"  # so that nothing else, a secret say, can get into an image
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def ignored() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_image_is_pinned_and_drops_root() -> None:
    assert instructions("FROM") == ["docker.io/library/python:3.11-slim-bookworm"]
    assert instructions("USER") == ["10001:10001"]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, flags=re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert f'"torch=={pins["torch"]}"' in DOCKERFILE
    extras = PROJECT["optional-dependencies"]
    for text in (DOCKERFILE, *(ROOT.glob("compose*.yaml"))):
        told = text if isinstance(text, str) else text.read_text()
        used = re.findall(r"EXTRAS(?:=|: |:-)([a-z0-9,]+)", told)
        assert used
        assert all(set(line.split(",")) <= set(extras) for line in used)
    shipped = [line for name in ("s3", "dask", "export", "gpu") for line in extras[name]]
    for line in [*PROJECT["dependencies"], *shipped]:
        wanted = Requirement(line)
        assert pins[canonicalize_name(wanted.name)] in wanted.specifier, line


def test_what_is_published_is_published_on_loopback_and_nothing_holds_a_secret() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published == {"server": ["${PUBLISH:-127.0.0.1:4200}:4200"]}
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH|TOKEN|SECRET|ACCESS_KEY", name):
                assert value is None or re.fullmatch(r"\$\{[A-Z_]+:\?.*\}", str(value)), name
    assert set(given(DOT_ENV).values()) == {""}
    for name, value in (offered(SERVER_FILE) | offered(WORKER_FILE)).items():
        if re.search("PASSWORD|AUTH|TOKEN|SECRET|ACCESS_KEY", name):
            assert value in ("", "user:password"), name
    secrets = {name for name in offered(SERVER_FILE) if re.search("DATABASE|SERVER_API_AUTH", name)}
    assert secrets
    assert not secrets & (set(offered(WORKER_FILE)) | set(SERVICES["worker"]["environment"]))


def test_the_example_files_name_all_that_can_be_set() -> None:
    text = "".join(path.read_text() for path in ROOT.glob("compose*.yaml"))
    asked = set(re.findall(r"\$\{([A-Z_]+):[?]", text))
    optional = set(re.findall(r"\$\{([A-Z_]+):-", text))
    passed = {n for n, value in SERVICES["worker"]["environment"].items() if value is None}
    assert set(given(DOT_ENV)) == asked
    assert set(offered(DOT_ENV)) == asked | optional | passed
    assert passed >= OURS
    assert set(offered(WORKER_FILE)) >= passed


def test_ports_hosts_and_health_checks_agree() -> None:
    server, worker = SERVICES["server"], SERVICES["worker"]
    port = server["environment"]["PREFECT_SERVER_API_PORT"]
    assert instructions("EXPOSE") == [str(port)]
    assert f"http://127.0.0.1:{port}/api/health" in server["healthcheck"]["test"][-1]
    web = worker["environment"]["PREFECT_WORKER_WEBSERVER_PORT"]
    assert f"http://127.0.0.1:{web}/health" in worker["healthcheck"]["test"][-1]
    api = f"${{WORKERS_API_URL:-http://server:{port}/api}}"
    assert worker["environment"]["PREFECT_API_URL"] == api
    assert server["environment"]["PREFECT_SERVER_DATABASE_HOST"] in SERVICES
    assert set(SERVICES["postgres"]["networks"]) < set(server["networks"])
    for service in SERVICES.values():
        for other, condition in service.get("depends_on", {}).items():
            has = "healthcheck" in SERVICES[other]
            assert has == (condition["condition"] == "service_healthy"), other
    served, told = given(SERVER_FILE), given(WORKER_FILE)
    host, port = served["PREFECT_SERVER_API_HOST"], served["PREFECT_SERVER_API_PORT"]
    assert told["PREFECT_API_URL"] == f"http://{host}:{port}/api"
    assert host == told["PREFECT_WORKER_WEBSERVER_HOST"] == LOOPBACK


def health(service: str, port: str | int) -> subprocess.CompletedProcess[bytes]:
    """Run the health check of a service of compose.yaml here, against another port."""
    kind, program, *arguments = SERVICES[service]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    arguments[-1] = re.sub(r":(4200|8080)", f":{port}", arguments[-1])
    environment = os.environ | {"no_proxy": "*"}
    return subprocess.run([BIN / program, *arguments], capture_output=True, env=environment)


@pytest.mark.parametrize("service", ["server", "worker"])
def test_a_health_check_fails_where_nothing_listens(service: str) -> None:
    done = health(service, free_port())
    assert done.returncode == 1
    assert b"Connection refused" in done.stderr


def test_every_setting_is_one() -> None:
    set_by_us = {name for s in SERVICES.values() for name in s.get("environment", {})}
    set_by_us |= set(offered(SERVER_FILE)) | set(offered(WORKER_FILE))
    set_by_us |= set(re.findall(r"\b((?:PREFECT|TRIBUNAL)_[A-Z_]+)=", DOCKERFILE))
    assert len(set_by_us) > 20
    for name in set_by_us:
        if name.startswith(("PREFECT_", "TRIBUNAL_")):
            assert name in OURS | {"TRIBUNAL_ROOT"} or hasattr(prefect.settings, name), name
    assert not hasattr(prefect.settings, "PREFECT_WORKER_WEB_PORT")


def test_the_automation_knows_every_end_of_a_run() -> None:
    (shipped,) = yaml.safe_load((ROOT / "deploy" / "automations.yaml").read_text())["automations"]
    automation = AutomationCore.model_validate(shipped)
    assert isinstance(automation.trigger, EventTrigger)
    known = {event.removeprefix("prefect.flow-run.") for event in automation.trigger.expect}
    text = "".join(path.read_text() for path in (ROOT / "flows").glob("*.py"))
    ours = set(
        re.findall(r"\b(?:Completed|Failed|Cancelled|AwaitingRetry)\(\s*name=\"(\w+)\"", text)
    )
    assert ours == {"Unchanged", "Drifted", "Unmeasured"}
    assert known == ours | {"heartbeat", "Completed", "Failed", "Cancelled", "Crashed"} | {
        *("AwaitingRetry", "Paused", "Suspended"),
    }


def test_a_workers_health_is_on_loopback_and_a_second_worker_finds_a_port() -> None:
    with socket.create_server((LOOPBACK, 0)) as first:
        taken = first.getsockname()[1]
        with (
            temporary_settings({PREFECT_WORKER_WEBSERVER_PORT: taken}),
            pytest.raises(ConfigError, match=rf"'{LOOPBACK}:{taken}' \(Address already in use\)"),
        ):
            health_address()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # another process has the port
            other.bind((LOOPBACK, 8080))
            other.listen()
        host, port = health_address()
    assert host == LOOPBACK
    assert port != 8080


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


def moved(text: str, folder: Path, server: int, web: int) -> dict[str, str]:
    """An environment file with everything that it offers set, its folders and ports ours."""
    text = text.replace(HOME, str(ROOT)).replace("/var/lib/tribunal", str(folder))
    text = text.replace(":4200", f":{server}").replace("_PORT=4200", f"_PORT={server}")
    told = offered(text.replace("_PORT=8080", f"_PORT={web}"))
    told.pop("PREFECT_SERVER_DATABASE_CONNECTION_URL", None)  # tests/test_postgres.py has one
    return {name: value for name, value in told.items() if value}


def command(name: str, key: str, settings: dict[str, str]) -> list[str]:
    """A command of a unit with its paths and variables replaced."""
    line = unit(name)["Service"][key].replace(f"{HOME}/.venv/bin", str(BIN))
    line = re.sub(r"\$\{([A-Z_]+)\}", lambda found: settings[found[1]], line)
    return shlex.split(line.replace("%H", "this-host"))


def test_the_scripts_are_programs() -> None:
    for name in ("as-worker", "setup.sh"):
        assert os.access(ROOT / "deploy" / name, os.X_OK), name


def test_as_worker_sets_what_systemd_would_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "worker.env"
    file.write_text("# A=no\n#B=no\nC=user:pa$$ w`id`\n\nD=x=y\n")
    program = 'import os, sys; print([os.environ.get(n) for n in "ABCD"], *sys.argv[1:])'
    asked = [ROOT / "deploy" / "as-worker", "python3", "-c", program, "one argument"]
    environment = {"PATH": os.environ["PATH"], "TRIBUNAL_ENVIRONMENT": str(file)}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert done.stdout == "[None, None, 'user:pa$$ w`id`', 'x=y'] one argument\n"
    file.unlink()
    assert subprocess.run(asked, env=environment, capture_output=True).returncode != 0


def ask(stack: Stack, path: str, auth: tuple[str, str] | None) -> int:
    with httpx.Client(trust_env=False, auth=auth) as client:
        return client.get(stack.api + path).status_code


@pytest.mark.slow
def test_the_units_start_are_healthy_want_the_password_and_stop(tmp_path: Path) -> None:
    port, web = free_port(), free_port()
    served, told = (moved(text, tmp_path, port, web) for text in (SERVER_FILE, WORKER_FILE))
    stack = Stack(tmp_path, told, port)
    server_unit, worker_unit = "tribunal-server.service", "tribunal-worker.service"
    worker = stack.start("worker", *command(worker_unit, "ExecStart", told))
    wait_until("a worker that waits for its server", lambda: health("worker", web).returncode == 0)
    server = stack.start("server", *command(server_unit, "ExecStart", served), **served)
    try:
        post = command(server_unit, "ExecStartPost", served)
        assert subprocess.run(post, env=os.environ | {"no_proxy": "*"}).returncode == 0
        assert ask(stack, "/health", None) == 200
        assert ask(stack, "/version", None) == 401
        assert ask(stack, "/version", ("user", "wrong")) == 401
        assert ask(stack, "/version", ("user", "password")) == 200
        wait_until("the worker to be known", lambda: stack.workers() == ["this-host"])
        assert [health("server", port).returncode, health("worker", web).returncode] == [0, 0]
    finally:
        how = signal.Signals[unit(worker_unit)["Service"]["KillSignal"]]
        codes = stop(worker, how, PATIENCE), stop(server, how, PATIENCE)
    assert codes[0] == 0
    assert codes[1] in (0, -signal.SIGTERM)  # which systemd takes for a clean end
    assert [health("server", port).returncode, health("worker", web).returncode] == [1, 1]
