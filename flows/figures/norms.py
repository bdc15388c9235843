"""The figure `norms`: its artifacts in order, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import polars as pl

from artifacts.figure_specs import FigureConfig, NormsSpec
from artifacts.store import Store
from flows.figures.figure import Figure, FigureRun, Section
from tasks.figures.norms import compare_states, map_norms, measure_norms
from tasks.figures.norms_detection import (
    answer_bypassed,
    detect_jailbreaks,
    rate_bypass,
    score_detectors,
)
from tasks.figures.norms_pictures import draw_layers, draw_norms
from tasks.probe import probe_model
from tasks.prompts import load_prompts

FORMS = ("png", "svg", "html")


def run(config: FigureConfig) -> FigureRun:
    """Ask for every artifact of the figure."""
    spec, seed = _spec(config), config.seed
    given = {"benign": spec.benign, "jailbreak": spec.jailbreak, "control": spec.control}
    prompts = {
        name: load_prompts(prompt_class=name, split="test", source=source)
        for name, source in given.items()
        if source is not None
    }
    given = {
        "benign": spec.fit_benign,
        "jailbreak": spec.fit_jailbreak,
        "control": spec.fit_control,
    }
    fit = {
        name: load_prompts(prompt_class=name, split="fit", source=source)
        for name, source in given.items()
        if source is not None
    }
    model = probe_model(spec=config.model, harmful=prompts["jailbreak"], harmless=prompts["benign"])
    measured = {
        name: measure_norms(
            name=name, spec=config.model, model=model, prompts=ref, tokens=spec.tokens
        )
        for name, ref in prompts.items()
    }
    how: Mapping[str, Any] = {
        "tokens": spec.tokens,
        "least": spec.least,
        "length_bin": spec.length_bin,
        "seed": seed,
    }
    maps = map_norms(measured=measured, **how)
    states = compare_states(measured=measured, **how)
    probabilities = detect_jailbreaks(
        spec=config.model,
        model=model,
        fit=fit,
        scored=prompts,
        sources=(spec.jailbreak, spec.fit_jailbreak),
        template_column=spec.template_column,
        positions=spec.positions,
        rank=spec.rank,
        iterations=spec.iterations,
        seed=seed,
    )
    detection = score_detectors(probabilities=probabilities, threshold=spec.threshold, seed=seed)
    answers = answer_bypassed(
        spec=config.model,
        model=model,
        prompts=prompts,
        probabilities=probabilities,
        detector=spec.bypass_by,
        threshold=spec.threshold,
        at_most=spec.at_most,
        judging=spec.judging,
        seed=seed,
    )
    bypass = rate_bypass(answers=answers, seed=seed)
    title = f"Norms of hidden states: {config.model.id}"
    pictures = {
        f"norms.{form}": draw_norms(maps=maps, name=title, least=spec.least, file=f"norms.{form}")
        for form in FORMS
    }
    pictures |= {
        f"norms-layers.{form}": draw_layers(
            detection=detection,
            bypass=bypass,
            name=f"Jailbreaks by layer: {config.model.id}",
            file=f"norms-layers.{form}",
        )
        for form in FORMS[:2]
    }
    tables = {
        "maps": maps,
        "states": states,
        "probabilities": probabilities,
        "detection": detection,
        "answers": answers,
        "bypass": bypass,
    }
    tables |= {f"prompts-{name}": ref for name, ref in measured.items()}
    return FigureRun(tables, pictures)


def _spec(config: FigureConfig) -> NormsSpec:
    if config.norms is None:
        raise ValueError("the config has no table [norms]")
    return config.norms


def sections(store: Store, found: FigureRun) -> Sequence[Section]:
    """What a finished run says."""
    tables = {name: store.read(ref) for name, ref in found.tables.items()}
    return [
        _success(tables["answers"]),
        _states(tables["states"]),
        _layers(tables["detection"]),
        _others(tables["detection"]),
        _bypass(tables["bypass"]),
    ]


def _success(answers: pl.DataFrame) -> Section:
    unedited = answers.filter(pl.col("arm") == "unedited")
    rows = [
        {
            "prompts": name,
            "n": group.height,
            "refused": int(group["refused"].sum()),
            "broken": int(group["degenerate"].is_not_null().sum()),
            "answered": int((~group["refused"] & group["degenerate"].is_null()).sum()),
        }
        for (name,), group in unedited.group_by("class", maintain_order=True)
    ]
    note = (
        "A jailbreak that is answered has succeeded. Control: benign requests in the jailbreaks' "
        "own templates."
    )
    return Section("Answers of the unedited model", rows, note)


def _states(states: pl.DataFrame) -> Section:
    wide: dict[int, dict[str, Any]] = {}
    for row in states.iter_rows(named=True):
        cell = "-"
        if row["difference"] is not None:
            cell = f"{row['difference']:+.3f} ({row['low']:+.3f} {row['high']:+.3f})"
        wide.setdefault(row["state"], {"state": row["state"]})[row["comparison"]] = cell
    sizes = states.group_by("comparison", maintain_order=True).agg(
        pl.first("n_jailbreak", "n_other"), pl.max("positions")
    )
    told = "; ".join(f"{c} {a} + {b} prompts, {p} positions" for c, a, b, p in sizes.iter_rows())
    note = (
        "Mean of jailbreak - benign of ln ||h||, nats, over drawn positions from 1 on; in "
        "brackets 95 % bootstrap intervals over prompts. Templates: jailbreaks minus benign "
        f"requests in the same templates. {told}. Map: arXiv 2602.11495; this mean is ours."
    )
    return Section("Norms: jailbreak minus benign, by state", list(wide.values()), note)


def _layers(detection: pl.DataFrame) -> Section:
    every = detection.filter((pl.col("jailbreaks") == "all") & pl.col("layer").is_not_null())
    rows: dict[int, dict[str, Any]] = {}
    columns = {
        ("factors", "benign", "auroc"): "AUROC",
        ("factors", "benign", "f1"): "F1",
        ("factors", "benign", "fpr_at_95_tpr"): "FPR@95",
        ("factors", "control", "auroc"): "vs control",
        ("factors with control", "control", "auroc"): "fitted on it",
    }
    for row in every.iter_rows(named=True):
        column = columns.get((row["detector"], row["against"], row["metric"]))
        if column is not None:
            rows.setdefault(row["layer"], {"layer": row["layer"]})[column] = _interval(row)
    chance = every.filter(
        (pl.col("detector") == "shuffled labels")
        & (pl.col("against") == "benign")
        & (pl.col("metric") == "auroc")
    )
    note = (
        "CP prompt factors and logistic regression, fitted on other prompts (arXiv 2602.11495); "
        "with 95 % bootstrap intervals. vs control: AUROC against benign requests in the same "
        "templates; fitted on it: of a detector that was fitted on such requests too (ours). "
        f"Shuffled labels: AUROC {fmean(chance['value'].to_list()):.2f} on average over layers, "
        f"of permutations {min(chance['low']):.2f} to {max(chance['high']):.2f}."
    )
    ordered = [
        {c: row[c] for c in ("layer", *columns.values()) if c in row} for row in rows.values()
    ]
    return Section("Jailbreaks told from benign prompts, by layer", ordered, note)


def _others(detection: pl.DataFrame) -> Section:
    """The length-only baseline, and the best layer on templates it was not fitted on."""
    rows = []
    aurocs = detection.filter(pl.col("metric") == "auroc")
    for against in ("benign", "control"):
        for jailbreaks in ("all", "new templates"):
            of = aurocs.filter(
                (pl.col("against") == against) & (pl.col("jailbreaks") == jailbreaks)
            )
            length = of.filter(pl.col("detector") == "length")
            if not length.height:
                continue
            row = length.row(0, named=True)
            known = {
                "jailbreaks": jailbreaks,
                "against": against,
                "n": f"{row['n_jailbreak']} + {row['n_other']}",
                "length alone": _interval(row),
            }
            for detector, column in (("factors", "best"), ("factors with control", "with control")):
                factors = of.filter(pl.col("detector") == detector).sort("value", descending=True)
                if factors.height:
                    best = factors.row(0, named=True)
                    known[column] = f"{best['layer']}: {_interval(best)}"
            rows.append(known)
    note = (
        "AUROC. Length alone: logistic regression on the number of tokens. Best: the best layer, "
        "picked on these very prompts, so it flatters; with control: of the detector fitted on the "
        "control too. New templates: jailbreaks of templates that were not fitted on."
    )
    return Section("Against length alone", rows, note)


def _bypass(bypass: pl.DataFrame) -> Section:
    wanted = {
        ("jailbreak", "refused"): "blocked",
        ("jailbreak", "broken"): "broken",
        ("benign", "answered"): "benign kept",
        ("control", "answered"): "control kept",
    }
    rows = []
    for most in bypass["at_most"].unique().sort():
        for (name, outcome), word in wanted.items():
            of = bypass.filter(
                (pl.col("at_most") == most)
                & (pl.col("class") == name)
                & (pl.col("outcome") == outcome)
            )
            by_arm = {row["arm"]: row for row in of.iter_rows(named=True)}
            if not by_arm:
                continue
            chosen, more = by_arm["susceptible"], by_arm.get("susceptible - random")
            layers = chosen["mean_layers"]
            rows.append(
                {
                    "cap": most,
                    "outcome": word,
                    "layers": "-" if layers is None else f"{layers:.1f}",
                    "susceptible": _counted(chosen),
                    "random": _counted(by_arm["random"]),
                    "difference": "-" if more is None else _signed(more),
                }
            )
    note = (
        "Of prompts that the unedited model answers. Cap: layers bypassed per prompt at most, the "
        "most probable first; layers: their mean. Blocked: jailbreaks now refused; broken: their "
        "answer is broken text now. 95 % Clopper-Pearson intervals; difference: paired bootstrap. "
        "Bypass: arXiv 2602.11495 (there 78 % blocked, 94 % kept on an abliterated LLaMA-3.1-8B); "
        "cap and random layers are ours."
    )
    return Section("Bypassing susceptible layers", rows, note)


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.2f} {_range(row)}"


def _counted(row: Mapping[str, Any]) -> str:
    return f"{row['k']}/{row['n']} {_range(row)}"


def _signed(row: Mapping[str, Any]) -> str:
    return f"{row['rate']:+.2f} {_short(row['low'], '+.2f')} {_short(row['high'], '+.2f')}"


def _range(row: Mapping[str, Any]) -> str:
    """Two fractions in as few characters as can be: .76-.88"""
    return f"{_short(row['low'])}-{_short(row['high'])}"


def _short(value: float, form: str = ".2f") -> str:
    """Without the zero before the point: .76, -.06, 1"""
    return f"{value:{form}}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"


FIGURE = Figure("norms", run, sections)
