"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from artifacts.errors import ExportError
from artifacts.paths import exists


def require_free(folder: Path) -> None:
    """Refuse a place where something is.

    Raises:
        ExportError: there is a file, or a folder that is not empty.
    """
    if exists(folder) and not folder.is_dir():
        raise ExportError(f"'{folder}' is a file; choose another folder")
    if exists(folder) and any(folder.iterdir()):
        raise ExportError(f"'{folder}' is not empty; choose another folder")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its name when the block ends well.

    Whatever else ends the block, an interrupt too, leaves nothing behind: neither the new folder
    nor folders that were made above it.

    Raises:
        ExportError: the place is taken, or cannot be written.
    """
    require_free(folder)
    final = Path(os.path.realpath(folder))
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    missing = [parent for parent in final.parents if not exists(parent)]
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            said = (error.strerror or str(error)).lower()
            raise ExportError(f"cannot write '{folder}' ({said}); nothing is left there") from error
        raise
