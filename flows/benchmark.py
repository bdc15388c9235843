"""The benchmark as a Prefect flow: the pipeline, its tasks mirrored, its results in the UI."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import polars as pl
from prefect import flow, get_run_logger
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.runtime import flow_run
from pydantic import BeforeValidator

from artifacts.catalog import write_database
from artifacts.errors import ConfigError
from artifacts.specs import Config
from artifacts.store import Store
from flows.flow_reports import FlowLog, SearchBar
from flows.logs import Tally, with_log
from flows.pipeline import Benchmark, check_prompts, generation_labels, run_pipeline, title
from flows.settings import Settings, load_config, validate


def _complete(given: Any) -> Any:
    """A config that a form or a request gives, with its preset merged under it."""
    return validate(_without_nulls(given)) if isinstance(given, dict) else given


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    """What was filled in; TOML has no null either, so a null is a field that was left out."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in given.items()
        if value is not None
    }


AnyConfig = str | Annotated[Config, BeforeValidator(_complete)]


def run_name() -> str:
    """What is run, for the list of runs."""
    config = flow_run.parameters["config"]
    return config if isinstance(config, str) else title(config)


@flow(name="benchmark", flow_run_name=run_name, persist_result=False)
def benchmark(config: AnyConfig = "organism", overrides: list[str] | None = None) -> Benchmark:
    """Put edits of a model's refusal direction on trial.

    Args:
        config: a shipped name, the path of a TOML file, or a whole config.
        overrides: fields to change, as in "search.trials=96"; for a name or a path.

    Returns:
        References to every artifact of the run.

    Raises:
        ConfigError: the config is not one, or overrides are given with a whole config.
    """
    resolved = _resolved(config, overrides or [])
    settings = Settings.from_environment()
    store = settings.open_store()
    key, tally = resolved.name.replace(".", "-"), Tally(store)
    reporter = with_log(
        settings.log,
        store,
        FlowLog(store),
        SearchBar(f"{key}-progress", generation_labels(resolved)),
        tally,
        config=resolved.name,
        arm=resolved.arm,
        flow_run=str(flow_run.id),
    )
    check_prompts(resolved, store)
    with settings.running(store, reporter):
        found = run_pipeline(resolved)
    write_database(store)
    publish(store, found, resolved)
    get_run_logger().info(tally.line())
    return found


def _resolved(config: Config | str, overrides: list[str]) -> Config:
    if isinstance(config, str):
        return load_config(config, overrides)
    if overrides:
        raise ConfigError(
            f"'{overrides[0]}' can change a named config; change the given one itself"
        )
    return config


def publish(store: Store, found: Benchmark, config: Config) -> None:
    """Show the leaderboard and the figure in Prefect's UI."""
    key = config.name.replace(".", "-")
    name = f"{config.name}, arm {config.arm}"
    ranked = store.read(found.leaderboard).drop("protocol", "prompts")
    rows: list[dict[str, Any]] = ranked.with_columns(pl.col("kl").round(6)).to_dicts()
    create_table_artifact(
        table=rows, key=f"{key}-leaderboard", description=f"# Leaderboard of {name}"
    )
    picture = base64.b64encode(store.read_bytes(found.figure)).decode()
    create_image_artifact(
        image_url=f"data:image/png;base64,{picture}",
        key=f"{key}-figure",
        description=f"Refusals against KL of every trial of {name}",
    )
