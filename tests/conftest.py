"""Fixtures that more than one file uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from artifacts.store import Store

settings.register_profile("tribunal", deadline=None)  # a slow machine fails no test
settings.load_profile("tribunal")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a hub
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.pop("PREFECT_API_URL", None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")
