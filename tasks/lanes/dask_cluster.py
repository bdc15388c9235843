"""Lanes of a Dask cluster, which share a task runner: Dask itself replaces a worker that dies."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, cast

from prefect.task_runners import TaskRunner

from artifacts.errors import ConfigError, WorkerError
from tasks.lanes.calls import Place, WorkerLog

if TYPE_CHECKING:
    from prefect_dask.task_runners import DaskTaskRunner

DEATHS = 3  # of workers that had a call, before the call is given up
PATIENCE = 30.0  # seconds for a scheduler to have a worker


class DaskLane:
    """One of the workers of a Dask cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.places, self.reporter, self._cluster = cluster.places, WorkerLog(), cluster

    def runner(self) -> TaskRunner[Any]:
        return self._cluster.runner()

    def close(self) -> None:
        self._cluster.close()

    drop = close


class Cluster:
    """A Dask cluster: of this machine, for the length of the run, or a running one."""

    def __init__(self, address: str | None, places: tuple[Place, ...], share: int) -> None:
        self.address, self.places, self._share = address, places, share
        self._runner: DaskTaskRunner | None = None

    def runner(self) -> DaskTaskRunner:
        """The task runner, connected.

        Raises:
            ConfigError: prefect-dask is not installed.
            WorkerError: no scheduler answers at the address.
        """
        if self._runner is None:
            self._runner = self._connected()
        return self._runner

    def _connected(self) -> DaskTaskRunner:
        try:
            from prefect_dask.task_runners import DaskTaskRunner
        except ImportError as error:
            raise ConfigError(
                "TRIBUNAL_RUNNER is 'dask', which needs: pip install 'tribunal[dask]'"
            ) from error
        import dask

        if self.address:
            runner = DaskTaskRunner(address=self.address)
        else:
            runner = DaskTaskRunner(cluster_kwargs=self._local())
        runner.logger.setLevel(logging.WARNING)
        logging.getLogger("distributed").setLevel(logging.ERROR)
        cast("TaskRunner[Any]", runner).__enter__()
        try:
            with dask.config.set({"distributed.scheduler.allowed-failures": DEATHS}):
                runner.client.wait_for_workers(1, timeout=PATIENCE)
        except OSError as error:  # TimeoutError is one
            raise WorkerError(
                f"no Dask scheduler with a worker answers at '{self.address or '127.0.0.1'}'; "
                "start them, or unset TRIBUNAL_DASK"
            ) from error
        return runner

    def _local(self) -> dict[str, Any]:
        threads = os.environ.get("OMP_NUM_THREADS", str(self._share))
        return {
            "n_workers": len(self.places),
            "threads_per_worker": 1,
            "host": "127.0.0.1",
            "dashboard_address": None,
            "memory_limit": 0,  # a model may take what there is
            "env": {"OMP_NUM_THREADS": threads},
        }

    def count(self) -> int:
        """Workers that the cluster has now."""
        return len(self.runner().client.scheduler_info(n_workers=-1)["workers"])

    def close(self) -> None:
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
            self._runner = None
