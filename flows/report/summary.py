"""The summary of a report: what was found, in plain words, and what the report does not show."""

from __future__ import annotations

from dataclasses import dataclass

from flows.display import number
from flows.report import sheets
from flows.report.contents import Contents, Row, is_open, n_other, state_of
from flows.report.sheets import Cell

METRICS = {
    "refusals": ("Refusals", "harmful prompts", "n_harmful"),
    "overrefusals": ("Overrefusals", "harmless and borderline-safe prompts", ""),
}


@dataclass(frozen=True)
class Figure:
    """A number that the page shows large: what it is, of what, and the unedited model's."""

    title: str
    of: str
    cell: Cell
    unedited: str


def headline(contents: Contents) -> list[str]:
    """The study's result in a few sentences."""
    row, search = contents.focus, contents.rankings["search"]
    if row is None:
        return [f"None of the {len(search)} trials of this study has a rank yet."]
    model = contents.study["model"]
    tested = row["split"] == "test"
    if tested:
        candidates = len(contents.rankings["selection"])
        first = (
            f"Of {len(search)} edits of {model}'s refusal direction that arm {row['arm']} tried, "
            f"the best {candidates} met new prompts, and trial {row['trial']} was frozen. "
            f"On the test split, which was opened for it alone, it refuses "
        )
    else:
        first = (
            f"No trial is frozen yet. Of {len(search)} edits of {model}'s refusal direction that "
            f"arm {row['arm']} tried, trial {row['trial']} is first. On the search split, on the "
            "prompts that chose it, it refuses "
        )
    least = "at least " if is_open(row) else ""
    first += f"{least}{_told(row['refusals'])} of {_told(row['n_harmful'])} harmful prompts"
    first += f"{_between(row['refusals_interval'])}{_unedited(contents, 'refusals')}."
    least = "at least " if row["stopped"] else ""
    second = (
        f"It refuses {least}{_told(row['overrefusals'])} of {n_other(row)} harmless and "
        f"borderline-safe prompts{_between(row['overrefusals_interval'])}"
        f"{_unedited(contents, 'overrefusals')}, and its first tokens lie "
        f"{number(row['kl'])} nats from the unedited model's."
    )
    return [first, second, _gates(contents, row)]


def _told(count: int | None) -> str:
    return "an unknown number" if count is None else str(count)


def _between(interval: tuple[float, float]) -> str:
    low, high = interval
    if low != low:
        return ""
    return f" (95\u00a0% interval {sheets.percent(low)} to {sheets.percent(high)}\u00a0%)"


def _unedited(contents: Contents, name: str) -> str:
    base = contents.tested.get("unedited")
    if base is None or (contents.focus or {}).get("split") != "test":
        return ""
    n = base["n_harmful"] if name == "refusals" else n_other(base)
    return f"; the unedited model refuses {base[name]} of {n}"


def _gates(contents: Contents, row: Row) -> str:
    gates = contents.study["config"].get("gates", {})
    limits = []
    if "max_kl" in gates:
        limits.append(f"KL at most {gates['max_kl']:g} nats")
    if "max_degenerate" in gates:
        limits.append(f"at most {100 * gates['max_degenerate']:g} % degenerate responses")
    if "max_length_ratio" in gates:
        limits.append(f"length within a factor of {gates['max_length_ratio']:g}")
    told = f" ({'; '.join(limits)})" if limits else ""
    state = state_of(row)
    if state == "passed":
        return f"It passed the gates{told}."
    if state == "stopped":
        return f"It was stopped early, so its gates{told} are open."
    return f"It failed a gate: {row['gate_reason'] or 'it was not scored'}{told}."


def figures(contents: Contents) -> list[Figure]:
    """The three numbers that rank, large."""
    row = contents.focus
    if row is None:
        return []
    base = contents.tested.get("unedited") if row["split"] == "test" else None
    found = []
    for name, (title, of, _) in METRICS.items():
        n = row["n_harmful"] if name == "refusals" else n_other(row)
        at_least = is_open(row) if name == "refusals" else bool(row["stopped"])
        cell = sheets.rate(row[name], n, row[f"{name}_interval"], at_least)
        told = ""
        if base is not None:
            told = f"{base[name]}/{base['n_harmful'] if name == 'refusals' else n_other(base)}"
        found.append(Figure(title, of, cell, told))
    kl = sheets.mean(row["kl"], row["kl_interval"])
    found.append(Figure("KL", "nats, first token, harmless prompts", kl, "0" if base else ""))
    return found


def unseen(contents: Contents, shown: int) -> list[str]:
    """What this page leaves out, and what its numbers cannot say."""
    search, study = contents.rankings["search"], contents.study
    found = []
    stopped = sum(bool(row["stopped"]) for row in search)
    if stopped:
        found.append(
            f"{stopped} of {len(search)} trials were stopped early: the race left prompts of "
            "theirs unanswered that could not change the first places."
        )
    gated = sum(state_of(row) == "gated" for row in search)
    if gated:
        found.append(f"{gated} trials failed a gate and rank after all others.")
    if contents.opened > 1:
        found.append(
            f"The test prompts have been opened for {contents.opened} protocols of this store; "
            "each opening spends a little of them."
        )
    total = sum({row["class"]: row["of_class"] for row in contents.pairs}.values())
    if total > shown:
        found.append(f"{shown} of {total} responses are shown; changed labels come first.")
    found.append(
        f"Labels are the keyword labeller {study['labeller']}'s, on at most "
        f"{study['max_new_tokens']} tokens; nobody read the responses."
        if study["max_new_tokens"]
        else f"Labels are the keyword labeller {study['labeller']}'s; nobody read the responses."
    )
    found.append("KL is that of the first response token; capabilities were not measured here.")
    return found
