"""HERETIC 1.4.0 as a user runs it: installed apart, told by a config file, read from its console.

It has no batch mode. With COLAB_GPU set its menus are numbered and read from standard input, so a
pipe can answer them: after a search it waits at its menu, where more trials can be asked for. That
lets two tools take turns without either starting anew. Every console line is stamped on arrival.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

VERSION = "1.4.0"

_TRIAL = re.compile(r"Running trial (\d+) of \d+")
_KL = re.compile(r"KL divergence: (\S+)$")
_REFUSALS = re.compile(r"\* Refusals: (\d+)/(\d+)")
_CHOICE = re.compile(r"\[(\d+)\] (.*)")
_END = "Optimization finished!"
_ASKS = ("Enter number: ", "How many additional trials do you want to run?: ")


class HereticError(RuntimeError):
    """HERETIC cannot be installed, or did not do what its documentation says."""


@dataclass(frozen=True)
class Line:
    """A console line and when it came, seconds on a clock that never goes back."""

    at: float
    text: str


@dataclass(frozen=True)
class Seen:
    """A trial, or an evaluation, as the console tells it. `kl` has four decimals there."""

    number: int
    seconds: float
    refusals: int
    kl: float


@dataclass(frozen=True)
class Job:
    """What both tools are told. Prompt files hold one prompt a line."""

    model: Path
    prompts: Path  # holds {harmful,harmless}-{direction,search,selection,test}.txt
    dtype: str
    new_tokens: int
    system_prompt: str
    batch: int = 128
    seed: int = 0
    split: str = "search"  # that HERETIC judges


def trials_of(lines: Sequence[Line]) -> list[Seen]:
    """Every finished trial; each lasts until the next one starts or the search is over."""
    starts = [(i, m) for i, line in enumerate(lines) if (m := _TRIAL.search(line.text))]
    ends = [i for i, line in enumerate(lines) if _END in line.text]
    found = []
    for i, match in starts:
        after = [j for j, _ in starts if j > i] + [j for j in ends if j > i]
        if after:
            seconds = lines[min(after)].at - lines[i].at
            found.append(_seen(int(match[1]), seconds, lines[i : min(after)]))
    return found


def evaluation_of(lines: Sequence[Line]) -> Seen:
    """What evaluating a finished model says; the last numbers on the console are the model's."""
    return _seen(0, lines[-1].at - lines[0].at, lines)


def _seen(number: int, seconds: float, lines: Sequence[Line]) -> Seen:
    texts = [line.text for line in lines]
    kl = [match[1] for text in texts if (match := _KL.search(text))]
    refusals = [match[1] for text in texts if (match := _REFUSALS.search(text))]
    if not kl or not refusals:
        raise HereticError(f"no numbers in HERETIC's console:\n{_tail(texts)}")
    return Seen(number, seconds, int(refusals[-1]), float(kl[-1]))


def choice(lines: Sequence[Line], wanted: str) -> str:
    """The number of the newest menu's entry whose title begins with `wanted`."""
    for line in reversed(lines):
        match = _CHOICE.match(line.text)
        if match and match[2].startswith(wanted):
            return match[1]
    raise HereticError(f"no '{wanted}' in HERETIC's menu:\n{_tail([x.text for x in lines])}")


class Session:
    """One HERETIC process: a search that can be lengthened, or an evaluation.

    Between two calls it waits at its menu and uses no processor.
    """

    def __init__(self, environment: Path, folder: Path, job: Job, *, offload: bool = True) -> None:
        self._program = environment / "bin" / "heretic"
        self._folder, self._job, self._offload = folder, job, offload
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: list[Line] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def trials(self, count: int) -> list[Seen]:
        """Run `count` more trials of the same search."""
        if self._process is None:
            self._start(config(self._job, count, self._offload), _ASKS[0])
        else:
            self._answer(choice(self._lines, "Run additional trials"))
            self._answer(str(count), until=_ASKS[0])
        found = trials_of(self._lines)[-count:]
        if len(found) < count:
            raise HereticError(f"HERETIC ran {len(found)} of {count} trials:\n{self._said()}")
        return found

    def finals(self) -> float:
        """HERETIC's trials leave nothing open."""
        return 0.0

    def evaluate(self, model: Path) -> Seen:
        """Refusals and KL of a finished model against the job's."""
        self._start(config(self._job, 1, self._offload, evaluate=model))
        if self._process is None or self._process.wait() != 0:
            raise HereticError(f"HERETIC failed:\n{self._said()}")
        return evaluation_of(self._lines)

    def _start(self, told: str, question: str = "") -> None:
        """Start it with a config file and listen as far as `question`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "config.toml").write_text(told)
        self._process = subprocess.Popen(
            [str(self._program)],
            cwd=self._folder,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self._folder / "stderr.txt").open("wb"),
        )
        self._listen(question)

    def _answer(self, text: str, until: str = "") -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())
        self._process.stdin.flush()
        self._listen(until or _ASKS[1])

    def _listen(self, question: str) -> None:
        """Read until it asks `question` (empty: until it ends)."""
        assert self._process is not None
        assert self._process.stdout is not None
        for line in read_lines(self._process.stdout):
            self._lines.append(line)
            if question and line.text.endswith(question):
                return
        if question:
            raise HereticError(f"HERETIC ended early:\n{self._said()}")

    def _said(self) -> str:
        errors = (self._folder / "stderr.txt").read_text(errors="replace").splitlines()
        return _tail([line.text for line in self._lines] + errors)


def read_lines(stream: IO[bytes]) -> Iterator[Line]:
    """Lines as they come; what ends in a question without a line end is one too."""
    rest = b""
    while True:
        chunk = os.read(stream.fileno(), 65536)
        now = time.perf_counter()
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield Line(now, line.decode(errors="replace").rstrip())
        text = rest.decode(errors="replace")
        if text.endswith(_ASKS):
            rest = b""
            yield Line(now, text)
        if not chunk:
            return


def _tail(texts: Sequence[str]) -> str:
    return "\n".join(text for text in texts if text.strip())[-2000:]


def config(job: Job, trials: int, offload: bool, *, evaluate: Path | None = None) -> str:
    """Its config file: a search, or the evaluation of a finished model. The rest is as released."""
    plain: dict[str, str | int | bool | list[str]] = {
        "model": str(job.model),
        "dtypes": [job.dtype],
        "batch_size": job.batch,
        "max_response_length": job.new_tokens,
        "response_prefix": "",
        "system_prompt": job.system_prompt,
        "n_trials": trials,
        "seed": job.seed,
        "offload_outputs_to_cpu": offload,
    }
    if evaluate:
        plain["evaluate_model"] = str(evaluate)
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    tables = {
        "bad_prompts": "harmful-direction",
        "good_prompts": "harmless-direction",
        "bad_evaluation_prompts": f"harmful-{job.split}",
        "good_evaluation_prompts": f"harmless-{job.split}",
    }
    for table, name in tables.items():
        lines += [f"[{table}]", f"dataset = {json.dumps(str(job.prompts / name) + '.txt')}"]
    return "\n".join(lines) + "\n"


def _environment() -> dict[str, str]:
    """The caller's environment without ours, offline, with wide lines and menus that are read."""
    ours = ("TRIBUNAL_", "PREFECT_", "HERETIC_", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    told = {"COLAB_GPU": "1", "COLUMNS": "500", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return kept | told | {"HF_DATASETS_OFFLINE": "1", "NO_COLOR": "1"}


def installed(environment: Path) -> bool:
    """Whether HERETIC of this version is in a virtual environment."""
    asked = "import importlib.metadata as m; print(m.version('heretic-llm'))"
    python = environment / "bin" / "python"
    if not python.exists() or not (environment / "bin" / "heretic").exists():
        return False
    answer = subprocess.run([python, "-c", asked], capture_output=True, text=True)
    return answer.stdout.strip() == VERSION


def install(environment: Path) -> None:
    """Install HERETIC into an environment of its own, with the torch that runs here.

    Raises:
        HereticError: pip could not.
    """
    if installed(environment):
        return
    import torch

    print(f"installing HERETIC {VERSION} into {environment} (minutes)", file=sys.stderr)
    venv.create(environment, with_pip=True)
    same = f"torch=={torch.__version__.partition('+')[0]}"
    wanted = [f"heretic-llm=={VERSION}", same]
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted]
    if subprocess.run(pip).returncode or not installed(environment):
        raise HereticError(f"pip could not install {' '.join(wanted)} into {environment}")
