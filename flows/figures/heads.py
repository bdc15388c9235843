"""The figure `heads`: its artifacts in order, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from artifacts.errors import ConfigError
from artifacts.figure_specs import FigureConfig, HeadsSpec
from artifacts.store import Ref, Store
from flows.figures.figure import Figure, FigureRun, Section
from tasks.figures.heads import (
    ABLATIONS,
    CONTROL,
    answer_without_heads,
    compare_heads,
    count_refusals,
    grow_group,
    measure_heads,
    rank_heads,
)
from tasks.figures.heads_pictures import draw_heads, draw_refusals
from tasks.probe import probe_model
from tasks.prompts import compare_splits, load_prompts

SCORED = ("heads.png", "heads.svg", "heads-map.png", "heads-map.svg", "heads-map.html")
COUNTED = ("heads-refusals.png", "heads-refusals.svg")


def run(config: FigureConfig) -> FigureRun:
    """Ask for every artifact of the figure."""
    spec = _spec(config)
    sets = {
        name: load_prompts(prompt_class="harmful", split=name, source=source)
        for name, source in spec.prompts.items()
    }
    control = load_prompts(prompt_class="harmless", split="control", source=spec.harmless)
    heldout = load_prompts(prompt_class="harmful", split="heldout", source=spec.heldout)
    named = {f"harmful/{name}": ref for name, ref in sets.items()}
    compare_splits(prompts={**named, "harmful/held out": heldout, "harmless/control": control})
    model = probe_model(spec=config.model, harmful=heldout, harmless=control)
    scored = {**sets, CONTROL: control}
    effects = _measure(config, spec, model, scored)
    drawn = {"resamples": spec.resamples, "seed": config.seed}
    scores = rank_heads(effects=effects, top=spec.top, **drawn)
    agreement = compare_heads(scores=scores, top=spec.top, **drawn)
    groups = _grow(config, spec, model, scored, effects)
    answers: dict[str, Ref] = {
        ablation: answer_without_heads(
            spec=config.model,
            model=model,
            prompts=heldout,
            groups={name: groups[f"{name}-{ablation}"] for name in scored},
            ablation=ablation,
            epsilon=spec.epsilon,
            size=spec.group,
            draws=spec.draws,
            max_new_tokens=spec.max_new_tokens,
            seed=config.seed,
        )
        for ablation in spec.ablations
    }
    refusals = count_refusals(answers=answers, groups=groups, labeller=spec.labeller, **drawn)
    pictures = {file: draw_heads(scores=scores, top=spec.top, file=file) for file in SCORED}
    pictures |= {file: draw_refusals(refusals=refusals, file=file) for file in COUNTED}
    tables = {"scores": scores, "agreement": agreement, "refusals": refusals}
    tables |= {f"effects-{name}": ref for name, ref in effects.items()}
    tables |= {f"group-{name}": ref for name, ref in groups.items()}
    tables |= {f"answers-{name}": ref for name, ref in answers.items()}
    return FigureRun(tables, pictures)


def _spec(config: FigureConfig) -> HeadsSpec:
    if config.heads is None:
        raise ConfigError("the config has no table [heads]")
    return config.heads


def _measure(
    config: FigureConfig, spec: HeadsSpec, model: Ref, prompts: dict[str, Ref]
) -> dict[str, Ref]:
    """Every head on its own, by set and ablation."""
    return {
        f"{name}-{ablation}": measure_heads(
            name=name,
            spec=config.model,
            model=model,
            prompts=ref,
            ablation=ablation,
            epsilon=spec.epsilon,
            rank=spec.rank,
            top=spec.top,
            resamples=spec.resamples,
            seed=config.seed,
        )
        for ablation in spec.ablations
        for name, ref in prompts.items()
    }


def _grow(
    config: FigureConfig,
    spec: HeadsSpec,
    model: Ref,
    prompts: dict[str, Ref],
    effects: dict[str, Ref],
) -> dict[str, Ref]:
    """Greedy groups, by set and ablation."""
    return {
        f"{name}-{ablation}": grow_group(
            name=name,
            spec=config.model,
            model=model,
            prompts=ref,
            effects=effects[f"{name}-{ablation}"],
            ablation=ablation,
            epsilon=spec.epsilon,
            rank=spec.rank,
            score=spec.score,
            size=spec.group,
        )
        for ablation in spec.ablations
        for name, ref in prompts.items()
    }


def sections(store: Store, found: FigureRun) -> Sequence[Section]:
    """What a finished run says."""
    scores = store.read(found.tables["scores"])
    refusals = store.read(found.tables["refusals"])
    answer = [
        Section(
            f"{name}: heads of highest Generalized Ships, {ABLATIONS[ablation]}",
            _best(scores, name, ablation),
        )
        for name, ablation in scores.select("set", "ablation").unique(maintain_order=True).rows()
        if name != CONTROL
    ]
    answer[-1] = Section(answer[-1].title, answer[-1].rows, BEST)
    agreement = store.read(found.tables["agreement"])
    answer.append(Section("do sets and ablations agree?", _agreement(agreement), AGREE))
    title = f"greedy groups and refusals of {refusals['n'][0]} held-out prompts"
    note = f"{GROUPS} Random: {refusals['draws'][0]} groups of each size; the intact model refuses "
    base = refusals["base_rate"][0]
    return [*answer, Section(title, _groups(refusals), f"{note}{base:.3f}.")]


BEST = (
    "deg: angle between leading left singular vectors of last states, intact and silenced, with a "
    "95 % bootstrap interval; nats: Ships, mean KL of the next token (arXiv 2410.13708). top: "
    "chance to stay in the top when prompts are resampled; other: rank under the other ablation; "
    "then ranks on the other sets, the harmless control last (ours)."
)
AGREE = (
    "rho: Spearman correlation of the angles over heads, 95 % bootstrap interval; shared: heads in "
    "both top lists, and how many chance would share. A head as high on harmless prompts is "
    "important, not about safety (ours)."
)
GROUPS = (
    "Sahara: each step adds the head whose union with the group moves the intact model most; the "
    "groups chosen on harmless prompts are the control. beyond: refusal rate less that of random "
    "groups, with a 95 % interval; p: share of random groups that refuse as little."
)


def _best(scores: pl.DataFrame, name: str, ablation: str) -> list[dict[str, Any]]:
    """The top of one set and ablation, with the ranks of the same head elsewhere."""
    ranks = {
        (row["set"], row["ablation"], row["layer"], row["head"]): row["angle_rank"]
        for row in scores.iter_rows(named=True)
    }
    sets = [other for other in scores["set"].unique(maintain_order=True) if other != name]
    twin = next((a for a in ABLATIONS if a != ablation and a in set(scores["ablation"])), None)
    here = scores.filter((pl.col("set") == name) & (pl.col("ablation") == ablation))
    rows = []
    for row in here.sort("angle_rank").head(10).iter_rows(named=True):
        place = (row["layer"], row["head"])
        rows.append(
            {
                "rank": row["angle_rank"],
                "head": f"L{row['layer']} H{row['head']}",
                "deg": f"{row['angle']:.2f}",
                "95 %": f"{row['angle_low']:.2f}-{row['angle_high']:.2f}",
                "nats": f"{row['ships']:.3g}",
                "top": f"{row['angle_top']:.2f}",
                **({} if twin is None else {"other": ranks[name, twin, *place]}),
                **{other[:10]: ranks[other, ablation, *place] for other in sets},
            }
        )
    return rows


def _agreement(table: pl.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "one": f"{row['set_a']} {row['ablation_a']}",
            "other": f"{row['set_b']} {row['ablation_b']}",
            "rho": _fixed(row["spearman"]),
            "95 %": _span(row["low"], row["high"]),
            "shared": f"{row['shared']}/{row['top']}",
            "chance": f"{row['expected']:.1f}",
        }
        for row in table.iter_rows(named=True)
    ]


def _groups(table: pl.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "set": row["set"],
            "abl": row["ablation"],
            "+head": row["heads"].split(" ")[-1],
            "param": f"{row['fraction']:.2%}",
            "refused": f"{row['refusals']} {_span(row['rate_low'], row['rate_high'])}",
            "random": _fixed(row["random_rate"]),
            "beyond": f"{row['beyond']:+.2f} {_span(row['beyond_low'], row['beyond_high'])}",
            "p": _fixed(row["as_low"]),
        }
        for row in table.iter_rows(named=True)
    ]


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.2f}..{high:.2f}"


FIGURE = Figure("heads", run, sections)
