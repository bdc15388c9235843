"""The report of a study plan as an HTML file."""

from __future__ import annotations

from collections.abc import Callable

from flows.report.html_file import drawn, fill
from flows.report.plan_contents import PlanContents, hidden, told
from flows.report.plan_plots import plan_plots

SECTIONS = (
    ("leaderboard", "Leaderboard"),
    ("plane-section", "Refusals and KL"),
    ("matched-section", "Matched"),
    ("models-section", "Over models"),
    ("budget-section", "Budget"),
    ("provenance", "Provenance"),
)


def plan_page(contents: PlanContents, advance: Callable[[int, int], None]) -> str:
    """The whole file. `advance`: progress over the plots."""
    plots = plan_plots(contents)
    members = contents.members.values()
    configs, arms = {m.config.name for m in members}, {m.config.arm for m in members}
    return fill(
        "plan.html.jinja",
        plots,
        drawn(plots, advance),
        c=contents,
        title=contents.result.name,
        facts=[
            f"{len(configs)} {'model' if len(configs) == 1 else 'models'}",
            f"{len(arms)} {'arm' if len(arms) == 1 else 'arms'}: {', '.join(sorted(arms))}",
            f"{len(members)} members",
        ],
        sections=SECTIONS,
        headline=told(contents),
        unseen=hidden(contents),
        searches=[name.removeprefix("front-") for name in plots if name.startswith("front-")],
    )
