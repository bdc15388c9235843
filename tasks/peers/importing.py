"""Other tools' trials as artifacts. The same file is one artifact, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from artifacts.schemas import PEERS, polars_schema
from tasks.peers.files import file_digest, read_peer_file
from tasks.stage import Made, stage


def _content(path: Path) -> str:
    return file_digest(path)


@stage(
    "imports",
    version=1,
    identify={"path": _content},
    ignore=("drop_torn",),  # a torn file and its whole lines have digests of their own
    label=lambda path, **_: f"import of {path.name}",
)
def import_trials(*, path: Path, drop_torn: bool = False) -> Made:
    """Every trial of a file of HERETIC or ICONOCLAST.

    Raises:
        PeerError: it cannot be read, is torn, or is no such file.
    """
    found = read_peer_file(path, drop_torn=drop_torn)
    of_file = {"source": found.name, "format": found.form, "digest": found.digest}
    rows = [{**of_file, **row} for study in found.studies for row in study.rows()]
    table = pl.DataFrame(rows, schema=polars_schema(PEERS["imports"]))
    return Made(table, {"source": found.name, "studies": len(found.studies)})
