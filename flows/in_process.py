"""A benchmark in this process: no Prefect, progress on stderr."""

from __future__ import annotations

from artifacts.catalog import write_database
from artifacts.specs import Config
from artifacts.store import Store
from flows import display
from flows.logs import Tally, with_log
from flows.pipeline import Benchmark, run_pipeline
from flows.progress import Progressing
from flows.settings import Settings


def run_here(config: Config, store: Store, work: int) -> Benchmark:
    """Run what is missing of a benchmark.

    Args:
        config: the benchmark.
        store: where its artifacts are.
        work: what is missing, counted in judged trials.
    """
    settings = Settings.from_environment()
    console, tally = display.console(stderr=True), Tally(store)
    with Progressing(console, work) as bar:
        known = {"config": config.name, "arm": config.arm}
        reporter = with_log(settings.log, store, bar, tally, **known)
        with settings.running(store, reporter):
            found = run_pipeline(config)
    write_database(store)
    console.print(tally.line())
    return found
