"""What an edit costs on tasks of lm-eval: the same documents, with the edit and without it.

lm-eval is an optional extra. It drives the model that is loaded already, with the edit on it as
hooks, so nothing is exported. The answers of both sides are kept per document, because only pairs
tell a small loss from noise.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from artifacts.errors import ConfigError, ModelError, did_you_mean
from artifacts.keys import Json
from artifacts.schemas import CAPABILITIES, polars_schema
from artifacts.specs import Config
from artifacts.store import Ref
from tasks.probe import open_model, read_card
from tasks.prompt_sources import content_digest
from tasks.stage import Made, current, stage
from tasks.stored_trials import StoredTrial
from tasks.trials import open_court

if TYPE_CHECKING:
    from tasks.models.editing import Edit
    from tasks.models.loading import LoadedModel

INSTALL = "pip install -e '.[lm-eval]'"
ROWS = 32  # of a batch, at most
RESAMPLES = 1000  # of lm-eval's bootstrap, for metrics that are no means
SAME = 1e-6  # relative: scores are kept where their mean is the metric
REPORTED = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)


@dataclass(frozen=True)
class Asked:
    """Which tasks, on how many documents, in which form.

    Attributes:
        limit: documents per task; None: all.
        shots: examples in each prompt; None: as the task says.
        chat: whether documents go through the chat template.
        include: a folder of task files; its content counts, not its name.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    include: str | None = None


def require_lm_eval() -> None:
    """Refuse to begin without lm-eval.

    Raises:
        ModelError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ModelError(f"'lm-eval' is not installed; install it with: {INSTALL}")


def require_tasks(asked: Asked) -> None:
    """Refuse tasks that lm-eval does not know, before a model is loaded.

    Raises:
        ConfigError: no task is named, or one is unknown, or there is no such folder.
    """
    if not asked.tasks:
        raise ConfigError("--tasks '' names no task; give lm-eval's names, as in --tasks arc_easy")
    if asked.include is not None and not Path(asked.include).is_dir():
        raise ConfigError(f"no folder '{asked.include}' of task files; give another --include")
    known = set(_manager(asked).all_tasks)
    for name in asked.tasks:
        if name not in known:
            near = did_you_mean(name, known) if len(known) < 50 else _nearest(name, known)
            raise ConfigError(f"lm-eval has no task '{name}'{near}")


def _nearest(name: str, known: set[str]) -> str:
    """The hint of `did_you_mean` where all names would be thousands."""
    hint = did_you_mean(name, known)
    return hint if hint.startswith("; did you mean") else "; list them with: lm-eval ls tasks"


def measure_capability(stored: StoredTrial, asked: Asked, *, edited: bool) -> Ref:
    """A stored trial, or its study's unedited model, on tasks of lm-eval, as an artifact."""
    config, trial = stored.config.model_copy(update={"model": stored.spec}), stored.trial
    told = {"arm": trial.arm, "number": trial.number, "parameters": dict(trial.parameters)}
    return evaluate(
        config=config,
        asked=asked,
        trial=told if edited else None,
        protocol=stored.protocol if edited else None,
        materials=stored.materials if edited else {"model": stored.materials["model"]},
        prompts=stored.prompts if edited else {},
    )


def _identity(asked: Asked) -> Json:
    """What of a wish counts, with the version of lm-eval and the content of the task files."""
    include = content_digest(Path(asked.include)) if asked.include else None
    counts: dict[str, Any] = {**asdict(asked), "tasks": list(asked.tasks), "include": include}
    return counts | {"lm_eval": version("lm_eval")}


@stage(
    "capabilities",
    version=1,
    ignore=("config",),  # the protocol, or the model's description, holds what of it counts
    identify={"asked": _identity},
    label=lambda trial, **_: (
        f"trial {trial['number']} on lm-eval" if trial else "unedited model on lm-eval"
    ),
    work=lambda **_: 1,
)
def evaluate(
    *,
    config: Config,
    asked: Asked,
    trial: Mapping[str, Any] | None,
    protocol: Ref | None,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> Made:
    """Every metric of the tasks, with its value per document where it is a mean of such.

    Raises:
        ModelError: lm-eval cannot run a task (its data set is out of reach, say).
    """
    edit: Edit | None = None
    if trial is not None and protocol is not None:
        court, _ = open_court("search", config, protocol, materials, prompts)
        loaded, edit = court.bench.loaded, court.edit_of(trial["parameters"])
    else:
        loaded = open_model(config.model, [read_card(materials["model"]).dtype])
    found = _run(loaded, edit, asked, read_card(materials["model"]).system_prompt)
    shared = {
        "protocol": protocol.key if protocol else None,
        "arm": trial["arm"] if trial else "unedited",
        "trial": trial["number"] if trial else None,
        "model": materials["model"].key,
    }
    rows = [{**shared, **row} for row in metric_rows(found)]
    notes = {"lm_eval": version("lm_eval"), "versions": dict(found["versions"])}
    return Made(pl.DataFrame(rows, schema=polars_schema(CAPABILITIES)), notes)


def _run(
    loaded: LoadedModel, edit: Edit | None, asked: Asked, system: str | None
) -> Mapping[str, Any]:
    """lm-eval's own answer."""
    from tasks.models.editing import applied

    editing = applied(loaded.anatomy, [edit]) if edit else nullcontext()
    with _quiet(), _reported(asked):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=loaded.model,
            tokenizer=copy.deepcopy(loaded.tokenizer),  # lm-eval sets its padding
            batch_size=min(ROWS, current().rows),
            backend="causal",
        )
        with editing:
            found: Mapping[str, Any] = simple_evaluate(
                model=model,
                tasks=list(asked.tasks),
                num_fewshot=asked.shots,
                limit=asked.limit,
                apply_chat_template=asked.chat,
                system_instruction=system if asked.chat else None,
                task_manager=_manager(asked),
                bootstrap_iters=RESAMPLES,
                log_samples=True,
            )
    return found


@lru_cache(maxsize=1)
def _manager(asked: Asked) -> Any:
    """lm-eval's index of its tasks, thousands of files: made once."""
    with _quiet(), _reported(asked):
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=asked.include)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of what is meant here: a model that is loaded already."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _reported(asked: Asked) -> Iterator[None]:
    """What lm-eval cannot do, as one line."""
    import yaml  # type: ignore[import-untyped]

    try:
        yield
    except (*REPORTED, yaml.YAMLError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"lm-eval cannot run '{','.join(asked.tasks)}': {said}") from error


def metric_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics in lm-eval's answer, a row for each task, metric and filter."""
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            samples = found.get("samples", {}).get(task, [])
            error = values.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "higher_is_better": found.get("higher_is_better", {}).get(task, {}).get(metric),
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, (int, float)) else None,
                    "n": found.get("n-samples", {}).get(task, {}).get("effective"),
                    "scores": _scores(samples, metric, filtered, float(value)),
                }
            )
    return rows


def _scores(
    samples: Sequence[Mapping[str, Any]], metric: str, filtered: str, value: float
) -> list[float] | None:
    """The metric per document; None where the metric is not the mean of such numbers."""
    own = sorted((s for s in samples if s.get("filter", "none") == filtered), key=_number)
    scores = [s.get(metric) for s in own]
    numbers = [float(s) for s in scores if isinstance(s, (int, float)) and math.isfinite(s)]
    if not numbers or len(numbers) < len(scores):
        return None
    mean = math.fsum(numbers) / len(numbers)
    return numbers if math.isclose(mean, value, rel_tol=SAME, abs_tol=SAME) else None


def _number(sample: Mapping[str, Any]) -> int:
    return int(sample["doc_id"])
