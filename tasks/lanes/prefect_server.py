"""The Prefect server that task runs ask whether it speaks their version: the run's, or its own one.

A process of the run's own is on a free port of loopback, keeps its database in memory, and is gone
with the run however that ends.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import Context
from urllib.parse import urlsplit

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from artifacts.errors import ConfigError

QUIET = {"PREFECT_LOGGING_LEVEL": "CRITICAL", "PREFECT_LOGGING_TO_API_ENABLED": "false"}
IN_MEMORY = "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true&check_same_thread=false"
SERVE = """
import os, sys, threading, uvicorn
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
app = "prefect.server.api.server:create_app"
uvicorn.run(app, factory=True, fd=int(sys.argv[1]), log_level="critical")
"""


@contextmanager
def server_for(context: Context, dask: str | None) -> Iterator[bool]:
    """Tell workers where the Prefect server is; start one if there is none.

    Args:
        context: where tasks are submitted from.
        dask: address of the running Dask cluster, if the workers are its.

    Returns:
        Whether what workers tell Prefect must be dropped: it is sent on by a thread that knows only
        the server of the whole process, and would start one of its own.

    Raises:
        ConfigError: workers of other machines cannot reach a server on loopback.
    """
    url = context.run(_server_in_use)
    settings = {}
    with ExitStack() as stack:
        if url is None:
            if dask and urlsplit(dask).hostname not in ("127.0.0.1", "localhost", "::1"):
                raise ConfigError(
                    f"TRIBUNAL_DASK is '{dask}': its workers need a Prefect server that they "
                    "can reach; set PREFECT_API_URL"
                )
            url = stack.enter_context(TemporaryServer()).url
            stack.enter_context(_environment(QUIET))
            stack.enter_context(_silenced())
            settings = {PREFECT_LOGGING_TO_API_ENABLED: False}
        stack.enter_context(_environment({"PREFECT_API_URL": url}))
        ours = temporary_settings({PREFECT_API_URL: url} | settings)
        context.run(ours.__enter__)
        stack.callback(context.run, ours.__exit__, None, None, None)
        in_flow = context.run(FlowRunContext.get) is not None
        yield not in_flow and Context().run(PREFECT_API_URL.value) != url


def _server_in_use() -> str | None:
    """The Prefect server that this process talks to: a flow run's own, or the configured one."""
    if FlowRunContext.get() is None:
        configured: str | None = PREFECT_API_URL.value()
        return configured
    with get_client(sync_client=True) as client:
        return str(client.api_url)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; processes that start meanwhile inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _silenced() -> Iterator[None]:
    """Without a server to keep them, Prefect's events and log lines are noise on stderr."""
    logger = logging.getLogger("prefect")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    EventsWorker.set_client_override(NullEventsClient)
    try:
        yield
    finally:
        EventsWorker.set_client_override(None)
        logger.setLevel(level)


class TemporaryServer:
    """A Prefect server for one run.

    It takes requests at once and answers them when it is up. It ends when its standard input does,
    so also with this process, however that ends.
    """

    def __enter__(self) -> TemporaryServer:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(listening.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listening.fileno()],
                start_new_session=True,  # Ctrl-C is not for it
                env=os.environ
                | {
                    "PREFECT_API_DATABASE_CONNECTION_URL": IN_MEMORY,
                    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                    "PREFECT_SERVER_UI_ENABLED": "false",
                },
            )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
