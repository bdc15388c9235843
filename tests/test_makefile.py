"""The set-up command: an install that was cut short is taken up again, a whole one is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what make reads, and a `.venv` that has just been begun."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    return tmp_path


def said(checkout: Path) -> str:
    """What `make demo` would run."""
    command = ["make", "--dry-run", "demo"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout


def test_an_install_that_was_cut_short_is_taken_up_again(checkout: Path) -> None:
    assert "pip install" in said(checkout)


def test_a_whole_install_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv" / "installed").touch()
    assert "pip install" not in said(checkout)
    assert "tribunal run organism" in said(checkout)
