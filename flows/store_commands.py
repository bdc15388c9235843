"""`tribunal store`: where the artifacts are, whether they are whole, and what can go."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from artifacts.errors import ConfigError, CorruptArtifact, MissingArtifact
from artifacts.places import size_text
from artifacts.store import Store
from flows import display
from flows.options import Format, FormatOption, open_store

store_app = typer.Typer(help="Look after the artifact store.", no_args_is_help=True)


@store_app.command("path")
def store_path() -> None:
    """Print where the store is."""
    typer.echo(open_store().location)


@store_app.command("ls")
def store_ls(
    lineage: Annotated[
        str | None, typer.Option("--lineage", metavar="KEY", help="what a key was made from")
    ] = None,
    form: FormatOption = Format.table,
) -> None:
    """List the artifacts, or one and all that it was made from."""
    from artifacts.catalog import Table

    store = open_store()
    if lineage is not None:
        kind, key = _find_key(store, lineage)
        manifests = store.lineage(kind, key)
    else:
        manifests = list(store.manifests())
    columns = ("kind", "key", "rows", "bytes", "created", "sha256")
    rows = tuple(
        (m.kind, m.key, m.rows, m.bytes, m.provenance["created"], m.sha256) for m in manifests
    )
    if form is not Format.table:
        typer.echo(display.as_text(Table(columns, rows), form))
        return
    out = display.console()
    shown = [[k, key[:12], str(n), size_text(b), made] for k, key, n, b, made, _ in rows]
    display.print_rows(out, columns[:5], shown)
    out.print(f"{len(rows)} artifacts, {size_text(sum(row[3] for row in rows))}")


def _find_key(store: Store, start: str) -> tuple[str, str]:
    """The artifact whose key begins with `start`."""
    found = [(kind, key) for kind, key in store.entries() if start and key.startswith(start)]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found) or 'no'} keys begin with '{start}'; see: tribunal store ls --format csv"
        )
    return found[0]


@store_app.command("verify", epilog="Example: tribunal store verify --set-aside")
def store_verify(
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="move what is corrupt into quarantine")
    ] = False,
) -> None:
    """Read every artifact and hold it against its manifest; exit code 1 if any is corrupt."""
    from flows.housekeeping import check_all

    store = open_store()
    started = time.monotonic()
    with display.counting("verifying") as advanced:
        count, bad = check_all(store, advanced)
    for node, fault in bad.items():
        typer.echo(fault)
        if set_aside and isinstance(fault, (CorruptArtifact, MissingArtifact)):
            store.set_aside(*node)
    seconds = time.monotonic() - started
    typer.echo(f"{count - len(bad)} of {count} artifacts are whole ({seconds:.1f} s)")
    if bad:
        typer.echo("corrupt artifacts are set aside and rebuilt by the next run that needs them")
        raise typer.Exit(1)


@store_app.command("gc", epilog="Examples: tribunal store gc; tribunal store gc --yes")
def store_gc(
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it, only list")] = False,
) -> None:
    """Free what nothing reaches: leftovers, quarantine, corrupt artifacts, orphans.

    Kept is what any study, winner, figure or measurement was made from, what a running build uses,
    and what is younger than an hour (a day in object storage).
    """
    from flows.housekeeping import collect, unreachable

    store = open_store()
    doomed = unreachable(store)
    for place in doomed:
        typer.echo(f"{place.why:<20} {size_text(place.bytes):>8}  {place.path[-44:]}")
    if yes:
        doomed = list(collect(store, doomed))
    verb = "freed" if yes else "to free with --yes"
    typer.echo(f"{len(doomed)} places, {size_text(sum(p.bytes for p in doomed))} {verb}")
