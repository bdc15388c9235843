"""The figures as Prefect flows: tasks mirrored, the picture and the tables in the UI."""

from __future__ import annotations

import base64

from prefect import Flow, flow, get_run_logger
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.runtime import flow_run

from artifacts.catalog import write_database
from artifacts.figure_specs import FigureConfig
from artifacts.store import Store
from flows import display
from flows.figures.config import load_figure_config
from flows.figures.figure import ABOUT, Figure, FigureRun, figure_named
from flows.flow_reports import FlowLog
from flows.logs import Tally, with_log
from flows.settings import Settings

FigureFlow = Flow[..., FigureRun]


def run_name() -> str:
    """What is drawn, for the list of runs."""
    config = flow_run.parameters["config"]
    return config if isinstance(config, str) else str(config.name)


def _flow(name: str) -> FigureFlow:
    @flow(name=name, description=ABOUT[name], flow_run_name=run_name, persist_result=False)
    def draw(
        config: str | FigureConfig = "organism", overrides: list[str] | None = None
    ) -> FigureRun:
        chosen = (
            load_figure_config(config, name, overrides or ()) if isinstance(config, str) else config
        )
        settings = Settings.from_environment()
        store, figure = settings.open_store(), figure_named(name)
        known = {"config": chosen.name, "flow_run": str(flow_run.id)}
        tally = Tally(store)
        reporter = with_log(settings.log, store, FlowLog(store), tally, **known)
        with settings.running(store, reporter):
            found = figure.run(chosen)
        write_database(store)
        publish(store, figure, found, chosen)
        get_run_logger().info(tally.line())
        return found

    return draw


FLOWS = {name: _flow(name) for name in ABOUT}
heads, norms, activity, divergence = FLOWS.values()


def publish(store: Store, figure: Figure, found: FigureRun, config: FigureConfig) -> None:
    """Show the picture and what it says in Prefect's UI."""
    key = f"{config.name.replace('.', '-')}-{figure.name}"
    for file, ref in found.pictures.items():
        if file.endswith(".png"):
            picture = base64.b64encode(store.read_bytes(ref)).decode()
            create_image_artifact(
                image_url=f"data:image/png;base64,{picture}",
                key=f"{key}-{file.removesuffix('.png')}",
                description=f"{figure.name} of {config.name}",
            )
    for number, section in enumerate(figure.sections(store, found)):
        create_table_artifact(
            table=[dict(display.plain(row)) for row in section.rows],
            key=f"{key}-{number}",
            description=f"# {section.title}\n\n{section.note}",
        )
