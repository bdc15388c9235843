"""Stages as Prefect tasks: the store answers, Prefect's record mirrors the answer.

The cache key names the artifact *and* its content, and exists only while the artifact verifies; so
Prefect can show "Cached" but can never serve what the store does not hold.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.results import get_result_store

from artifacts.store import Ref
from tasks.stage import Runtime, Stage, current, running


@dataclass
class StorePolicy(CachePolicy):
    """Answers from the artifact store."""

    stage: Stage[Any] | None = None

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        if self.stage is None:
            return None
        arguments, runtime = inputs["arguments"].value, inputs["runtime"].value
        started, key = time.monotonic(), self.stage.key(arguments)
        ref = runtime.find(self.stage.kind, key)
        if ref is None:
            return None
        results, name = get_result_store(), f"{ref.kind}-{ref.key}-{ref.digest[:12]}"
        if not results.exists(name):
            results.write(asdict(ref), key=name)
        label, seconds = self.stage.label_of(arguments), time.monotonic() - started
        runtime.reporter.finished(label, ref, seconds, cached=True)  # the task will not run
        return name


@dataclass
class Opaque:
    """Keeps Prefect from walking into an argument: it is small, but not Prefect's to inspect."""

    value: Any


def run_as_task(stage: Stage[Any], arguments: dict[str, Any]) -> Ref:
    """Run one call of a stage as a task of the current flow run."""

    @task(
        name=stage.kind,
        task_run_name=stage.label_of(arguments).replace("{", "(").replace("}", ")"),
        cache_policy=StorePolicy(stage=stage),
        persist_result=True,
        result_serializer="json",
    )
    def obtain(arguments: Opaque, runtime: Opaque) -> dict[str, Any]:
        held: Runtime = runtime.value
        with running(held):
            return asdict(stage.obtain(arguments.value))

    found = obtain(Opaque(arguments), Opaque(current()))
    return Ref(**found)
