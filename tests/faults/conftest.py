"""Fixtures of the fault tests: one undisturbed study, one launcher, and the figures at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_tools import Launcher, Whole, read_whole, unmount_leftovers
from small_study import write_config

from artifacts.store import Store


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Record what a fault test measured; printed when all tests are done."""
    return lambda fault, measured: record_property("measured", f"{fault}: {measured}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every figure."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    told = [p for report in reports for p in getattr(report, "user_properties", ())]
    lines = dict.fromkeys(value for name, value in told if name == "measured")
    if lines:
        terminalreporter.section("faults, measured")
        for line in lines:
            terminalreporter.line(str(line))


@pytest.fixture(scope="session", autouse=True)
def _tidy() -> None:
    """Begin without the mounts of an earlier session that was killed."""
    unmount_leftovers()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study."""
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Iterator[Launcher]:
    """Runs commands without the seconds that their imports take."""
    folder = tmp_path_factory.mktemp("launcher")
    found = Launcher(folder, (Store(folder / "store"), ["run", str(config)]))
    yield found
    found.close()


@pytest.fixture(scope="session")
def whole(launcher: Launcher, config: Path) -> Whole:
    """The small study as it ends when nothing disturbs it."""
    return read_whole(Store(launcher.folder / "store"), config, launcher)
