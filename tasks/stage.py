"""The only adapter between Prefect and the store.

A stage is a function from references to a table. Calling it answers with a reference: the stored
artifact if its key is there and whole, else a new one. Inside a Prefect flow the same call is a
Prefect task whose cache policy asks the store, so Prefect's "Cached" mirrors the store and is never
the truth; elsewhere no Prefect is loaded. Under `planning`, nothing runs and the calls are listed.
"""

from __future__ import annotations

import functools
import inspect
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol

from pydantic import BaseModel

from artifacts.keys import Json, artifact_key
from artifacts.store import Find, Manifest, Ref, Store, parquet
from tasks.models.engine_options import EngineOptions

if TYPE_CHECKING:
    import polars as pl

P = ParamSpec("P")


@dataclass(frozen=True)
class Made:
    """What a stage's function returns: a table (or the bytes of a file) and facts about it."""

    data: pl.DataFrame | bytes
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One artifact of a plan. `key` is empty while an input of it is missing."""

    kind: str
    label: str
    key: str
    cached: bool
    work: int
    identity: Json = None
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    version: int = 0


class Reporter(Protocol):
    """Where progress goes. `work` is counted in judged trials; `finished` is told of every
    artifact, made or cached, with the seconds that this call took."""

    def started(self, label: str, work: int) -> None: ...
    def advanced(self, done: int, total: int) -> None: ...
    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None: ...
    def said(self, line: str) -> None: ...


class Silent:
    """The reporter of library use."""

    def started(self, label: str, work: int) -> None: ...
    def advanced(self, done: int, total: int) -> None: ...
    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None: ...
    def said(self, line: str) -> None: ...


class Workers(Protocol):
    """Where calls of a stage run side by side. Each worker keeps its loaded model."""

    def count(self) -> int:
        """How many calls can run at the same time."""
        ...

    def obtain(
        self,
        stage: Stage[Any],
        calls: Sequence[Mapping[str, Any]],
        prepare: Callable[[], object],
    ) -> list[Ref]:
        """The artifacts of the calls, in their order; what is stored is not made again.

        `prepare` loads what calls need and what must not be loaded while others run.
        """
        ...

    def rest(self) -> None:
        """Free the devices until the next call."""
        ...


@dataclass
class Runtime:
    """Where and how stages run. Nothing in it can change a result.

    `slot` tells apart the models that share a device; `workers` is None where all runs in turn.
    """

    store: Store
    reporter: Reporter = field(default_factory=Silent)
    device: str | None = None
    device_map: str | None = None
    rows: int = 512
    engine: EngineOptions = field(default_factory=EngineOptions)
    slot: int = 0
    workers: Workers | None = None
    plan: list[Step] | None = None
    building: Find | None = None

    @property
    def find(self) -> Find:
        """Looks for an artifact; while stages run, what it looks for is not collected."""
        return self.building or self.store.find


_runtime: ContextVar[Runtime | None] = ContextVar("tribunal_runtime", default=None)


def current() -> Runtime:
    """The runtime of the running flow.

    Raises:
        RuntimeError: no flow is running.
    """
    runtime = _runtime.get()
    if runtime is None:
        raise RuntimeError("stages run inside `with running(Runtime(...))`")
    return runtime


@contextmanager
def running(runtime: Runtime) -> Iterator[Runtime]:
    """Make `runtime` the current one, known to the store as a running build unless it plans."""
    token, outer = _runtime.set(runtime), runtime.building
    try:
        if runtime.plan is not None or runtime.building is not None:
            yield runtime
            return
        with runtime.store.building() as runtime.building:
            yield runtime
    finally:
        runtime.building = outer
        _runtime.reset(token)


@contextmanager
def planning(store: Store) -> Iterator[list[Step]]:
    """Run nothing: collect what the stages called inside would make."""
    steps: list[Step] = []
    with running(Runtime(store, plan=steps)):
        yield steps


def stage(
    kind: str,
    version: int,
    *,
    data: str = "data.parquet",
    ignore: Sequence[str] = (),
    identify: Mapping[str, Callable[[Any], Json]] | None = None,
    label: Callable[..., str] | None = None,
    work: Callable[..., int] | None = None,
) -> Callable[[Callable[P, Made]], Stage[P]]:
    """Turn a function into a stage.

    Args:
        kind: kind of the artifact.
        version: raise it when the code changes what the same inputs give.
        data: name of the data file.
        ignore: arguments that cannot change the content (where a model lies, say).
        identify: for an argument, what of it counts (a file's content instead of its path).
        label: a person's words for one call; default: the kind.
        work: cost of one call in judged trials, for the time left.
    """

    def wrap(build: Callable[P, Made]) -> Stage[P]:
        return Stage(build, kind, version, data, tuple(ignore), identify or {}, label, work)

    return wrap


class Stage(Generic[P]):
    """A function whose results are artifacts. Call it by keyword or position; it answers a Ref."""

    def __init__(
        self,
        build: Callable[P, Made],
        kind: str,
        version: int,
        data: str,
        ignore: tuple[str, ...],
        identify: Mapping[str, Callable[[Any], Json]],
        label: Callable[..., str] | None,
        work: Callable[..., int] | None,
    ) -> None:
        functools.update_wrapper(self, build)
        self.build, self.kind, self.version, self.data = build, kind, version, data
        self._ignore, self._identify = ignore, identify
        self._label, self._work = label, work
        self._signature = inspect.signature(build)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Ref:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        runtime = current()
        if runtime.plan is not None:
            return self._planned(runtime, runtime.plan, bound.arguments)
        if _in_prefect_flow():
            from tasks.prefect_mirror import run_as_task

            return run_as_task(self, dict(bound.arguments))
        return self.obtain(bound.arguments)

    def __reduce__(self) -> str:
        return self.build.__qualname__  # travels to other processes by name

    def key(self, arguments: Mapping[str, Any]) -> str:
        """The key of a call; all its inputs must be made."""
        identity, inputs = self.describe(arguments)
        return artifact_key(
            self.kind,
            self.version,
            identity,
            {role: entry["digest"] for role, entry in inputs.items()},
        )

    def describe(
        self, arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Json], dict[str, dict[str, str]]]:
        """Parameters that count, and inputs by role."""
        identity: dict[str, Json] = {}
        inputs: dict[str, dict[str, str]] = {}
        for name, value in arguments.items():
            if name in self._ignore:
                continue
            refs = _refs(name, value)
            if refs is None:
                identity[name] = self._identify.get(name, _plain)(value)
            else:
                inputs |= {role: _entry(ref) for role, ref in refs.items()}
        return identity, inputs

    def label_of(self, arguments: Mapping[str, Any]) -> str:
        return self._label(**arguments) if self._label else self.kind

    def obtain(self, arguments: Mapping[str, Any]) -> Ref:
        """The artifact of a call: stored, or made now by exactly one process."""
        runtime = current()
        store, reporter = runtime.store, runtime.reporter
        key, label = self.key(arguments), self.label_of(arguments)
        started = time.monotonic()
        ref = runtime.find(self.kind, key, reporter.said)
        if ref is None:
            with store.lock(
                self.kind, key, lambda: reporter.said(f"waiting for {label} elsewhere")
            ):
                ref = store.find(self.kind, key)
                if ref is None:
                    reporter.started(label, self._work(**arguments) if self._work else 0)
                    ref = self._make(store, key, arguments)
                    reporter.finished(label, ref, time.monotonic() - started, cached=False)
                    return ref
        reporter.finished(label, ref, time.monotonic() - started, cached=True)
        return ref

    def _make(self, store: Store, key: str, arguments: Mapping[str, Any]) -> Ref:
        started = time.monotonic()
        _reset_peaks()
        made = self.build(**arguments)  # type: ignore[call-arg]
        seconds = time.monotonic() - started
        identity, inputs = self.describe(arguments)
        draft = Manifest(
            kind=self.kind,
            key=key,
            version=self.version,
            data=self.data,
            rows=1 if isinstance(made.data, bytes) else made.data.height,
            identity=identity,
            inputs=inputs,
            notes=dict(made.notes),
            provenance={"seconds": round(seconds, 3), **_provenance()},
        )
        return store.put(draft, made.data if isinstance(made.data, bytes) else parquet(made.data))

    def _planned(self, runtime: Runtime, plan: list[Step], arguments: Mapping[str, Any]) -> Ref:
        identity, inputs = self.describe(arguments)
        known = all(entry["digest"] for entry in inputs.values())
        key = self.key(arguments) if known else ""
        ref = runtime.store.find(self.kind, key, runtime.reporter.said) if known else None
        work = self._work(**arguments) if self._work else 0
        plan.append(
            Step(
                self.kind,
                self.label_of(arguments),
                key,
                ref is not None,
                work,
                identity,
                inputs,
                self.version,
            )
        )
        return ref or Ref(self.kind, key, "")


def _refs(name: str, value: Any) -> dict[str, Ref] | None:
    """The references in an argument, by role; None if the argument is a parameter."""
    if isinstance(value, Ref):
        return {name: value}
    if isinstance(value, Mapping) and any(isinstance(v, Ref) for v in value.values()):
        return {f"{name}.{role}": ref for role, ref in value.items()}
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Ref) for v in value):
        return {f"{name}.{number}": ref for number, ref in enumerate(value)}
    return None


def _entry(ref: Ref) -> dict[str, str]:
    return {"kind": ref.kind, "key": ref.key, "digest": ref.digest}


def _plain(value: Any) -> Json:
    """A parameter as JSON."""
    if isinstance(value, BaseModel):
        dumped: Json = value.model_dump(mode="json")
        return dumped
    plain: Json = value
    return plain


def _provenance() -> dict[str, Any]:
    """Versions of what was loaded, the device, memory and the time: told, never part of a key."""
    from importlib.metadata import version

    told = ("torch", "transformers", "tokenizers", "optuna", "polars")
    loaded = [name for name in told if name in sys.modules]
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "tribunal": version("tribunal"),
        "python": sys.version.split()[0],
        **{name: version(name) for name in loaded},
        "device": _device(),
        **_peaks(),
    }


def _device() -> str:
    """The device in use, with a GPU's name; "default" where torch, which chooses it, is not loaded.

    Models that are spread (`device_map`) name every GPU.
    """
    spread, asked = current().device_map, current().device
    torch, cuda = sys.modules.get("torch"), _cuda_in_use()
    if torch is None:
        return asked or "default"
    if cuda is None:
        return asked or "cpu"
    device = torch.device(asked or "cuda")
    if device.type != "cuda" and not spread:
        return str(device)
    first = cuda.current_device() if device.index is None else device.index
    used = range(cuda.device_count()) if spread else (first,)
    return ", ".join(f"cuda:{number} {cuda.get_device_name(number)}" for number in used)


def _peaks() -> dict[str, Any]:
    """High-water marks of memory: the process's since it began, a GPU's since `_reset_peaks`."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    cuda = _cuda_in_use()
    if cuda is None:
        return {"peak_memory_bytes": resident}
    marks = {f"cuda:{n}": cuda.max_memory_allocated(n) for n in range(cuda.device_count())}
    return {"peak_memory_bytes": resident, "peak_cuda_bytes": marks}


def _reset_peaks() -> None:
    """Let the GPUs' marks begin with this artifact."""
    cuda = _cuda_in_use()
    if cuda is not None:
        for number in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(number)


def _cuda_in_use() -> Any:
    """`torch.cuda` if this process has used a GPU, found without loading torch; else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _in_prefect_flow() -> bool:
    """Whether this call happens in a Prefect flow run, without loading Prefect to find out."""
    context = sys.modules.get("prefect.context")
    return context is not None and context.FlowRunContext.get() is not None
