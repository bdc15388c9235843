"""`tribunal worker`: run what a Prefect work pool asks for."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer


def worker(
    pool: Annotated[str, typer.Option("--pool", help="work pool; made if missing")] = "tribunal",
    name: Annotated[str | None, typer.Option("--name", help="default: a random one")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="flow runs at once")] = None,
    finish_within: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="what a stop leaves flow runs to finish")
    ] = 20.0,
) -> None:
    """Be a Prefect worker that can be stopped: its flow runs finish or go back to the queue.

    Health is answered at http://PREFECT_WORKER_WEBSERVER_HOST:PREFECT_WORKER_WEBSERVER_PORT/health,
    by default on 127.0.0.1 and port 8080, or a free one; the worker says where.
    """
    from flows.worker import work

    asyncio.run(work(pool, name, limit, finish_within))
