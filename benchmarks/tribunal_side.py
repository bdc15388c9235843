"""Tribunal's half of a comparison: a search in a process of its own, lengthened when asked.

    python benchmarks/tribunal_side.py CONFIG.toml STORE [KEY=VALUE ...]

Then "12" on standard input means 12 more trials, and a line of JSON is the answer. Trials are timed
each from the end of the one before it: asking the sampler, editing, judging, labels, storing. The
pipeline is stopped after the last one. "finals" asks how many seconds it takes to judge to its end
what the race left open. Nothing that comes later is compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from heretic_side import Job

from artifacts.store import Ref, Store
from flows.pipeline import run_pipeline
from flows.settings import Settings, load_config
from tasks.models.engine_options import EngineOptions

CLASSES = ("harmful", "harmless")
ENGINE = "BENCHMARK_ENGINE"  # in the process's environment: switches of the engine, as JSON


@dataclass(frozen=True)
class Variant:
    """A way to run our search: a name, fields of the config, switches of the engine."""

    name: str
    overrides: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """A trial. `seconds` is None for the first of a request; tokens are those of its responses."""

    number: int
    seconds: float | None
    refusals: int
    kl: float
    harmful_tokens: int
    harmless_tokens: int


def config(job: Job) -> str:
    """The config file that asks of Tribunal what `heretic_side.config` asks of HERETIC.

    Selection and test have to be named; they are not reached.
    """
    lines = [
        'name = "benchmark"',
        f"seed = {job.seed}",
        "[model]",
        f"id = {json.dumps(str(job.model))}",
        f"dtype = [{json.dumps(job.dtype)}]",
        f"system_prompt = {json.dumps(job.system_prompt)}",
        'response_prefix = ""',
        '[search]\npreset = "heretic-1.4.0"',
        f"[judging]\nmax_new_tokens = {job.new_tokens}",
    ]
    for name in CLASSES:
        lines.append(f"[prompts.{name}]")
        for split in ("direction", "search", "selection", "test"):
            file = json.dumps(str(job.prompts / f"{name}-{split}.txt"))
            lines.append(f"{split} = {{ source = {file} }}")
    return "\n".join(lines) + "\n"


class Enough(Exception):
    """The last trial that was asked for is stored."""


class Stopwatch:
    """A reporter that stamps every new trial and stops the pipeline after the last artifact."""

    def __init__(self, last: str, count: int) -> None:
        self._last, self._left, self.ends = last, count, list[tuple[Ref, float]]()
        self.seconds = 0.0  # of the last one

    def started(self, label: str, work: int) -> None: ...
    def advanced(self, done: int, total: int) -> None: ...
    def said(self, line: str) -> None: ...

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        if ref.kind == "generations" and not cached:
            self.ends.append((ref, time.perf_counter()))
        self._left -= ref.kind == self._last
        if not self._left:
            self.seconds = seconds
            raise Enough


def serve(file: str, store: Store, overrides: Sequence[str]) -> None:
    """Answer requests until standard input ends."""
    settings, done = Settings(), 0
    engine = EngineOptions(**json.loads(os.environ.get(ENGINE, "{}")))
    for request in sys.stdin:
        finals = request.strip() == "finals"
        done += 0 if finals else int(request)
        watch = Stopwatch("finals", 1) if finals else Stopwatch("generations", done)
        told = load_config(file, [*overrides, f"search.trials={done}"])
        with contextlib.suppress(Enough), settings.running(store, watch) as runtime:
            runtime.engine = engine
            run_pipeline(told)
        found = [asdict(trial) for trial in judged(store, watch.ends)]
        print(json.dumps(watch.seconds if finals else found), flush=True)


def judged(store: Store, ends: Sequence[tuple[Ref, float]]) -> list[Judged]:
    """What the stored trials say, with the time that each took."""
    found = []
    for place, (ref, end) in enumerate(ends):
        (row,) = store.read(ref).to_dicts()
        tokens = {
            f"{name}_tokens": sum(
                answer["n_tokens"] + answer["ended"]
                for answer in row["responses"]
                if answer["class"] == name
            )
            for name in CLASSES
        }
        seconds = end - ends[place - 1][1] if place else None
        found.append(Judged(row["trial"], seconds, row["refusals"], row["kl"], **tokens))
    return found


class Session:
    """The process of one variant. Between two requests it waits and uses no processor."""

    def __init__(self, folder: Path, job: Job, variant: Variant) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "benchmark.toml"
        file.write_text(config(job))
        kept = {name: v for name, v in os.environ.items() if not name.startswith("TRIBUNAL_")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(file), str(folder / "store"), *variant.overrides],
            env=kept | {"HF_HUB_OFFLINE": "1", ENGINE: json.dumps(dict(variant.engine))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def trials(self, count: int) -> list[Judged]:
        """Run `count` more trials of the same search."""
        return [Judged(**trial) for trial in self._ask(str(count))]

    def finals(self) -> float:
        """Seconds to judge to their end the trials that may still be first or on the front."""
        return float(self._ask("finals"))

    def _ask(self, request: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("Tribunal's process ended; its words are above")
        return json.loads(answer)


if __name__ == "__main__":
    serve(sys.argv[1], Store(sys.argv[2]), sys.argv[3:])
