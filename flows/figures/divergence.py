"""The figure `divergence`: its artifacts in order, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from artifacts.errors import ConfigError
from artifacts.figure_specs import DivergenceSpec, FigureConfig
from artifacts.store import Store
from flows.figures.figure import Figure, FigureRun, Section
from tasks.figures.divergence import (
    CALIBRATION,
    TEST,
    compare_scores,
    count_kinds,
    count_quadrants,
    draw_risk,
    judge_answers,
    measure_answers,
    set_lines,
)
from tasks.figures.divergence_pictures import RISK, SCATTER, draw_risk_curves, draw_scatter
from tasks.figures.divergence_questions import read_questions
from tasks.probe import probe_model


def run(config: FigureConfig) -> FigureRun:
    """Ask for every artifact of the figure."""
    spec = config.divergence
    if spec is None:
        raise ConfigError(f"config '{config.name}' has no table [divergence]")
    questions = {
        split: read_questions(
            split=split, source=source, form=spec.form, gold=spec.gold, kind=spec.kind
        )
        for split, source in ((CALIBRATION, spec.calibration), (TEST, spec.test))
    }
    model = probe_model(spec=config.model, harmful=questions[CALIBRATION], harmless=questions[TEST])
    measures = {
        split: measure_answers(
            split=split,
            spec=config.model,
            model=model,
            questions=ref,
            max_new_tokens=spec.max_new_tokens,
            late=spec.late,
        )
        for split, ref in questions.items()
    }
    answers = judge_answers(
        questions=questions, measures=measures, occurrence=spec.occurrence, seed=config.seed
    )
    kinds = count_kinds(answers=answers)
    lines = set_lines(answers=answers, mode=spec.mode)
    quadrants = count_quadrants(answers=answers, lines=lines)
    scores = compare_scores(answers=answers, resamples=spec.resamples, seed=config.seed)
    risk = draw_risk(answers=answers)
    dataset, name = _dataset(spec), PurePosixPath(config.model.id).name
    pictures = {
        file: draw_scatter(
            file=file,
            answers=answers,
            lines=lines,
            quadrants=quadrants,
            dataset=dataset,
            model=name,
            line=spec.line,
        )
        for file in SCATTER
    }
    pictures |= {
        file: draw_risk_curves(
            file=file, risk=risk, scores=scores, kinds=kinds, dataset=dataset, model=name
        )
        for file in RISK
    }
    tables = {
        "answers": answers,
        "kinds": kinds,
        "lines": lines,
        "quadrants": quadrants,
        "scores": scores,
        "risk": risk,
    }
    return FigureRun(tables, pictures)


def _dataset(spec: DivergenceSpec) -> str:
    """What a title calls the questions."""
    return spec.dataset or PurePosixPath(spec.test.source).stem


def sections(store: Store, found: FigureRun) -> Sequence[Section]:
    """What a finished run says."""
    told = ("kinds", "lines", "quadrants", "scores")
    rows = {name: store.read(found.tables[name]).to_dicts() for name in told}
    return [_kinds(rows["kinds"]), _quadrants(rows), *_scores(rows["scores"])]


Rows = Sequence[Mapping[str, Any]]


def _kinds(rows: Rows) -> Section:
    told = [
        {
            "kind": row["kind"] or "-",
            "n": row["n"],
            "correct": row["correct"],
            "accuracy": _share(row["accuracy"]),
            "95 %": _range(row["low"], row["high"]),
            "unparsed": row["unparsed"],
            "tokens": f"{row['tokens']:.1f}",
        }
        for row in rows
        if row["split"] == TEST
    ]
    note = (
        "Test split. An answer is correct if what it says is the gold answer; one that says "
        "nothing that can be told is unparsed, and incorrect. Interval: Clopper-Pearson."
    )
    return Section("Accuracy by kind of question", told, note)


def _quadrants(rows: Mapping[str, Rows]) -> Section:
    told = [
        {
            "line": row["line"],
            "entropy": row["entropy"],
            "JS": row["js"],
            "n": row["n"],
            "correct": row["correct"],
            "accuracy": _share(row["accuracy"]),
            "95 %": _range(row["low"], row["high"]) if row["n"] else "-",
        }
        for row in rows["quadrants"]
        if row["split"] == TEST
    ]
    first = rows["lines"][0]
    if first["entropy"] is None:
        return Section("Quadrants", told, "No calibration answer is incorrect: no line is set.")
    levels = [
        f"{'not set' if row['js'] is None else format(row['js'], '.4f')} ({row['line']})"
        for row in rows["lines"]
    ]
    note = (
        f"Test split. Set on {first['n']} calibration answers, {first['incorrect']} incorrect: "
        f"vertical at {first['entropy']:.3f} nats, the lowest entropy of an incorrect one; "
        f"horizontal at {' or '.join(levels)} nats, {first['mode']}. Definition ours."
    )
    return Section("Quadrants", told, note)


def _scores(rows: Rows) -> Sequence[Section]:
    """The scores, and what is left of them without differences of kind and format."""
    here = [row for row in rows if row["split"] == TEST]
    told = [
        {
            "score": row["score"],
            "AUROC": _share(row["auroc"]),
            "95 %": _range(row["auroc_low"], row["auroc_high"]),
            "over length": _range(row["gain_low"], row["gain_high"]),
            "AURC": _share(row["aurc"]),
            "AURC 95 %": _range(row["aurc_low"], row["aurc_high"]),
        }
        for row in here
    ]
    controls = [
        {
            "score": row["score"],
            "in kind": _share(row["within"]),
            "95 %": _range(row["within_low"], row["within_high"]),
            "parsed": _share(row["parsed"]),
            "parsed 95 %": _range(row["parsed_low"], row["parsed_high"]),
        }
        for row in here
    ]
    n, wrong = here[0]["n"], here[0]["incorrect"]
    note = (
        f"Test split, n = {n}, {wrong} incorrect. AUROC: an incorrect answer scores higher than a "
        "correct one; 'over length': the 95 % interval of AUROC less that of the length in tokens. "
        f"AURC: mean risk over coverage, {_share(wrong / n)} if a score knows nothing. 'combined' "
        "was fitted on the calibration split. Intervals: bootstrap over questions (theories)."
    )
    why = (
        "AUROC again: over pairs of answers to one kind of question alone, and without unparsed "
        "answers. A score that only tells kinds or formats apart falls to 0.5."
    )
    return [
        Section("Scores that predict incorrect answers", told, note),
        Section("The same without differences of kind, and of format", controls, why),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.2f}..{high:.2f}"


FIGURE = Figure("divergence", run, sections)
