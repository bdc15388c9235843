"""Paths that a person typed."""

from __future__ import annotations

from pathlib import Path


def exists(path: Path) -> bool:
    """Whether something is there; a name that no file system takes (too long, say) is not there."""
    try:
        return path.exists()
    except OSError:
        return False
