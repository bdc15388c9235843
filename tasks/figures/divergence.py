"""Entropy against Jensen-Shannon divergence of answers: measured, judged, compared.

Measuring needs the model and knows no gold answer; judging needs neither model nor torch, so
another matching rule or another line computes no answer again. Lines and the combined score are
set on the calibration split and scored on the test split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from artifacts.columns import Column
from artifacts.errors import PromptError
from artifacts.figure_schemas import (
    DIVERGENCE_ANSWERS,
    DIVERGENCE_KINDS,
    DIVERGENCE_LINES,
    DIVERGENCE_MEASURES,
    DIVERGENCE_QUADRANTS,
    DIVERGENCE_RISK,
    DIVERGENCE_SCORES,
)
from artifacts.schemas import polars_schema
from artifacts.specs import ModelSpec
from artifacts.store import Ref
from tasks.numerics.answers import UNPARSED, is_correct, predicted
from tasks.numerics.intervals import clopper_pearson
from tasks.probe import encode_prompts, open_model, read_card
from tasks.stage import Made, current, stage

if TYPE_CHECKING:
    from tasks.models.decoding import Response
    from tasks.models.lens import Divergences

CALIBRATION, TEST = "calibration", "test"
LINES = ("lowest-entropy", "youden")
MODES = {"late-vs-final": "js_late", "adjacent": "js_adjacent", "all-vs-final": "js_all"}
MEASURED = ("entropy_sum", "entropy_mean", *MODES.values(), "tokens")
SCORES = (*MEASURED, "combined")
BASELINE = "tokens"


@stage(
    "divergence_measures",
    version=1,
    ignore=("spec",),
    label=lambda split, **_: f"answers of the {split} split",
    work=lambda **_: 1,
)
def measure_answers(
    *, split: str, spec: ModelSpec, model: Ref, questions: Ref, max_new_tokens: int, late: float
) -> Made:
    """Greedy answers, and per answer its entropy and divergences between layers.

    Raises:
        ModelError: the model cannot answer or does not fit the logit lens; a question is too long.
    """
    from tasks.models.decoding import Response, decode
    from tasks.models.lens import late_layers
    from tasks.models.lens import measure_answers as measure

    runtime, card = current(), read_card(model)
    loaded = open_model(spec, [card.dtype])
    asked = runtime.store.read(questions)
    layers = late_layers(len(loaded.anatomy.layers), late)
    prompts = encode_prompts(loaded, card, asked, max_new_tokens)
    decoded = decode(loaded, prompts, max_new_tokens=max_new_tokens, rows=runtime.rows)[0]
    answers = [Response(*pair) for pair in zip(decoded.tokens, decoded.ended, strict=True)]
    found = measure(
        loaded,
        prompts,
        answers,
        rows=runtime.rows,
        first_late=layers.start,
        on_progress=runtime.reporter.advanced,
    )
    texts = loaded.tokenizer.batch_decode(decoded.tokens, skip_special_tokens=True)
    rows = [
        {"split": split, "prompt_id": name, "answer": text, **_row(answer, each, layers)}
        for name, text, answer, each in zip(asked["prompt_id"], texts, answers, found, strict=True)
    ]
    frame = pl.DataFrame(rows, schema=polars_schema(DIVERGENCE_MEASURES))
    total, agreed = int(frame["tokens"].sum()), int(frame["agreed"].sum())
    facts = {"late_layers": [layers.start, layers.stop], "tokens": total, "agreed": agreed}
    return Made(frame, facts)


def _row(answer: Response, found: Divergences, late: range) -> dict[str, Any]:
    """What is stored of one answer; all layers of a token count alike."""
    return {
        "ended": answer.ended,
        "tokens": len(found.entropy),
        "entropy_sum": float(found.entropy.sum()),
        "entropy_mean": float(found.entropy.mean()),
        "js_late": float(found.final[late.start :].mean()),
        "js_adjacent": float(found.following[late.start :].mean()),
        "js_all": float(found.final.mean()),
        "js_layers": found.final.mean(axis=1).tolist(),
        "agreed": int(found.agreed.sum()),
    }


@stage("divergence_answers", version=1, label=lambda **_: "answers judged")
def judge_answers(
    *, questions: Mapping[str, Ref], measures: Mapping[str, Ref], occurrence: str, seed: int
) -> Made:
    """Every answer with what it says, whether that is right, and the combined score.

    Raises:
        PromptError: a topic (a theory, or a question) is in both splits.
    """
    from tasks.numerics.selective import combine

    store = current().store
    asked = {split: store.read(questions[split]) for split in (CALIBRATION, TEST)}
    _refuse_shared(asked)
    calibration, test = (
        _judged(asked[split], store.read(measures[split]), occurrence)
        for split in (CALIBRATION, TEST)
    )
    known, new = (part.select(MEASURED).to_numpy() for part in (calibration, test))
    combined = combine(known, ~calibration["correct"].to_numpy(), new, seed=seed)
    both = pl.concat([calibration, test])
    scores = [None] * both.height if combined is None else np.concatenate(combined)
    frame = both.with_columns(pl.Series("combined", scores, dtype=pl.Float64))
    return Made(
        frame.select(*polars_schema(DIVERGENCE_ANSWERS)), {"combined": combined is not None}
    )


def _judged(asked: pl.DataFrame, measured: pl.DataFrame, occurrence: str) -> pl.DataFrame:
    """Answers beside their questions, with prediction and verdict, in the questions' order."""
    known = {kind: set(part["gold"]) for (kind,), part in asked.group_by("kind")}
    both = asked.join(measured, on=["split", "prompt_id"], maintain_order="left")
    said = [
        predicted(answer, gold, known[kind], last=occurrence == "last")
        for answer, gold, kind in both.select("answer", "gold", "kind").iter_rows()
    ]
    right = [is_correct(one, gold) for one, gold in zip(said, both["gold"], strict=True)]
    return both.rename({"text": "question"}).with_columns(
        pl.Series("prediction", said, dtype=pl.String),
        pl.Series("parsed", [one != UNPARSED for one in said], dtype=pl.Boolean),
        pl.Series("correct", right, dtype=pl.Boolean),
    )


def _refuse_shared(asked: Mapping[str, pl.DataFrame]) -> None:
    """Lines must not be set on what they are scored on."""
    shared = set(asked[CALIBRATION]["topic"]) & set(asked[TEST]["topic"])
    if shared:
        raise PromptError(
            f"{len(shared)} theories or questions are in both calibration and test; choose slices "
            "or files that share none"
        )


@stage("divergence_kinds", version=1, label=lambda **_: "accuracy by kind of question")
def count_kinds(*, answers: Ref) -> Made:
    """Accuracy of every kind of question in both splits, and of all."""
    table = current().store.read(answers)
    rows = []
    for split in (CALIBRATION, TEST):
        part = table.filter(pl.col("split") == split)
        kinds = sorted(set(part["kind"]))
        groups = {kind: part.filter(pl.col("kind") == kind) for kind in kinds}
        for kind, group in {**groups, "all": part}.items():
            unparsed, tokens = (
                int((~group["parsed"]).sum()),
                float(np.mean(group["tokens"].to_numpy())),
            )
            counts = _rate(group)
            rows.append(
                {"split": split, "kind": kind, **counts, "unparsed": unparsed, "tokens": tokens}
            )
    return _made(rows, DIVERGENCE_KINDS)


def _rate(group: pl.DataFrame) -> dict[str, Any]:
    """Answers, correct ones, and the accuracy with its interval; None where there is no answer."""
    n, correct = group.height, int(group["correct"].sum())
    low, high = clopper_pearson(correct, n)
    accuracy = correct / n if n else None
    return {"n": n, "correct": correct, "accuracy": accuracy, "low": low, "high": high}


@stage("divergence_lines", version=1, label=lambda **_: "lines from the calibration split")
def set_lines(*, answers: Ref, mode: str) -> Made:
    """Vertical and horizontal lines, both kinds of the latter, from calibration answers alone."""
    from tasks.numerics.selective import lowest_wrong, youden

    table = current().store.read(answers).filter(pl.col("split") == CALIBRATION)
    wrong, divergence = ~table["correct"].to_numpy(), table[MODES[mode]].to_numpy()
    first = lowest_wrong(table["entropy_sum"].to_numpy(), wrong)
    common = {"mode": mode, "n": table.height, "incorrect": int(wrong.sum())}
    if first is None:
        return _made([{"line": line, **common} for line in LINES], DIVERGENCE_LINES)
    common |= {"entropy": table["entropy_sum"][first], "prompt_id": table["prompt_id"][first]}
    levels = (float(divergence[first]), youden(divergence, wrong))
    rows = [{"line": line, "js": js, **common} for line, js in zip(LINES, levels, strict=True)]
    return _made(rows, DIVERGENCE_LINES)


@stage("divergence_quadrants", version=1, label=lambda **_: "quadrants")
def count_quadrants(*, answers: Ref, lines: Ref) -> Made:
    """Answers and accuracies on each side of both lines; nothing for lines that are not set."""
    table, rows = current().store.read(answers), []
    for line in current().store.read(lines).iter_rows(named=True):
        if line["entropy"] is None or line["js"] is None:
            continue
        sure = {"low": pl.col("entropy_sum") < line["entropy"]}
        near = {"low": pl.col(MODES[line["mode"]]) < line["js"]}
        sure["high"], near["high"] = ~sure["low"], ~near["low"]
        for split in (CALIBRATION, TEST):
            part = table.filter(pl.col("split") == split)
            for entropy, across in sure.items():
                for js, along in near.items():
                    where = {"line": line["line"], "split": split, "entropy": entropy, "js": js}
                    rows.append({**where, **_rate(part.filter(across & along))})
    return _made(rows, DIVERGENCE_QUADRANTS)


@stage("divergence_scores", version=1, label=lambda **_: "scores against mistakes")
def compare_scores(*, answers: Ref, resamples: int, seed: int) -> Made:
    """AUROC and AURC of every score in both splits, with bootstrap intervals over topics."""
    from tasks.numerics.selective import resample

    table, rows = current().store.read(answers), []
    for split in (CALIBRATION, TEST):
        part = table.filter(pl.col("split") == split)
        weights = resample(part["topic"].to_numpy(), resamples, seed)
        weights = np.concatenate([np.ones((1, part.height)), weights])  # the first: as measured
        rows += [{"split": split, **row} for row in _compared(part, weights)]
    return _made(rows, DIVERGENCE_SCORES)


def _compared(part: pl.DataFrame, weights: Any) -> list[dict[str, Any]]:
    from tasks.numerics.selective import aurc_resampled, auroc_resampled

    wrong, kinds = ~part["correct"].to_numpy(), part["kind"].to_numpy()
    said = part["parsed"].to_numpy()
    length = auroc_resampled(part[BASELINE].to_numpy(), wrong, weights)
    rows = []
    for score in _present(part):
        values = part[score].to_numpy()
        whole = auroc_resampled(values, wrong, weights)
        rows.append(
            {
                "score": score,
                "n": part.height,
                "incorrect": int(wrong.sum()),
                **_interval("auroc", whole),
                **_interval("within", auroc_resampled(values, wrong, weights, kinds)),
                **_interval("parsed", auroc_resampled(values, wrong, weights * said)),
                **_interval("gain", whole - length),
                **_interval("aurc", aurc_resampled(values, wrong, weights)),
            }
        )
    return rows


def _present(part: pl.DataFrame) -> list[str]:
    """The scores that there are: the combined one may not have been fitted."""
    return [score for score in SCORES if not part[score].null_count()]


def _interval(name: str, values: Any) -> dict[str, float]:
    """What was measured, which comes first, with the percentiles of the resamples after it."""
    from tasks.numerics.selective import percentiles

    low, high = percentiles(values[1:])
    return {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}


@stage("divergence_risk", version=1, label=lambda **_: "risk-coverage curves")
def draw_risk(*, answers: Ref) -> Made:
    """The risk-coverage curve of every score on the test split."""
    from tasks.numerics.selective import risk_coverage

    part = current().store.read(answers).filter(pl.col("split") == TEST)
    wrong, rows = ~part["correct"].to_numpy(), []
    for score in _present(part):
        curve = risk_coverage(part[score].to_numpy(), wrong)
        points = zip(curve.thresholds, curve.accepted, curve.wrong, strict=True)
        for threshold, accepted, bad in points:
            low, high = clopper_pearson(int(bad), int(accepted))
            rows.append(
                {
                    "score": score,
                    "threshold": float(threshold),
                    "accepted": int(accepted),
                    "coverage": accepted / part.height,
                    "risk": bad / accepted,
                    "low": low,
                    "high": high,
                }
            )
    return _made(rows, DIVERGENCE_RISK)


def _made(rows: list[dict[str, Any]], table: tuple[Column, ...]) -> Made:
    """Rows as a table; what is not a number is NULL."""
    return Made(pl.DataFrame(rows, schema=polars_schema(table)).fill_nan(None))
