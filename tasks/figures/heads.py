"""Safety heads: every head silenced, the worst found greedily, random ones for comparison.

Zhou et al. (arXiv 2410.13708): Ships, Generalized Ships, Sahara. From the source: both ablations,
both scores, the greedy search. Ours: intervals, resampled ranks, the harmless control, held-out
refusals, random groups, the feature-space angle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from artifacts.errors import PromptError
from artifacts.figure_schemas import (
    HEAD_AGREEMENT,
    HEAD_ANSWERS,
    HEAD_EFFECTS,
    HEAD_GROUPS,
    HEAD_REFUSALS,
    HEAD_SCORES,
)
from artifacts.schemas import polars_schema
from artifacts.specs import ModelSpec
from artifacts.store import Ref
from tasks.probe import encode_prompts, open_model, read_card
from tasks.stage import Made, current, stage

if TYPE_CHECKING:
    from tasks.models.head_ablation import Ablation, Head
    from tasks.models.head_effects import Effects, HeadProbe
    from tasks.numerics.subspaces import Spaces

CONTROL = "harmless"
ABLATIONS = {"ua": "Undifferentiated Attention", "sc": "Scaling Contribution"}
KEYS = ["set", "ablation"]


@stage(
    "head_effects",
    version=1,
    ignore=("spec",),
    label=lambda name, ablation, **_: f"heads one by one: {name}, {ablation}",
    work=lambda **_: 2,
)
def measure_heads(
    *,
    name: str,
    spec: ModelSpec,
    model: Ref,
    prompts: Ref,
    ablation: Ablation,
    epsilon: float,
    rank: int,
    top: int,
    resamples: int,
    seed: int,
) -> Made:
    """Ships and Generalized Ships of every head on one prompt set under one ablation.

    Raises:
        PromptError: too few prompts for an angle of this rank.
        ModelError: the model's heads cannot be reached, or its logits are not finite.
    """
    from tasks.numerics import subspaces

    probe = _probe(name, spec, model, prompts, ablation, epsilon, rank)
    effects = probe.without(probe.heads, on_progress=current().reporter.advanced)
    base = subspaces.leading_spaces(probe.intact, rank)
    angles, feature_angles = _angles(base, effects, rank)
    counts = subspaces.resample_counts(len(probe.intact), resamples, seed)
    of_base = subspaces.resampled_spaces(probe.intact, counts, rank)
    resampled = np.stack(
        [
            subspaces.angle_sum(of_base, subspaces.resampled_spaces(states, counts, rank))
            for states in effects.states
        ],
        axis=1,
    )
    low, high = subspaces.percentile_interval(resampled)
    touched, total = _touched(probe), _size(probe)
    frame = pl.DataFrame(
        {
            "layer": [head.layer for head in probe.heads],
            "head": [head.head for head in probe.heads],
            "ships": effects.kl.mean(1),
            "angle": angles,
            "angle_low": low,
            "angle_high": high,
            "angle_top": subspaces.chance_of_top(resampled, top),
            "feature_angle": feature_angles,
            "parameters": [touched[head] for head in probe.heads],
            "fraction": [touched[head] / total for head in probe.heads],
            "kl": effects.kl.astype(np.float32).tolist(),
        }
    ).with_columns(prompts=pl.lit(len(probe.intact)), **_named(name, ablation))
    return Made(_typed(frame, HEAD_EFFECTS))


@stage("head_scores", version=1, label=lambda **_: "heads ranked")
def rank_heads(*, effects: Mapping[str, Ref], top: int, resamples: int, seed: int) -> Made:
    """Every head of every set and ablation with its ranks and how steady they are."""
    from tasks.numerics import subspaces

    store = current().store
    ranked = []
    for ref in effects.values():
        found = store.read(ref)
        kl = np.array(found["kl"].to_list(), np.float64)
        counts = subspaces.resample_counts(kl.shape[1], resamples, seed)
        means = counts @ kl.T / kl.shape[1]
        low, high = subspaces.percentile_interval(means)
        ranks = {
            f"{column}_rank": subspaces.descending_ranks(found[score].to_numpy())
            for column, score in (
                ("ships", "ships"),
                ("angle", "angle"),
                ("feature", "feature_angle"),
            )
        }
        chance = subspaces.chance_of_top(means, top)
        columns = {"ships_low": low, "ships_high": high, "ships_top": chance, **ranks}
        ranked.append(found.with_columns(**{k: pl.Series(v) for k, v in columns.items()}))
    return Made(_typed(pl.concat(ranked), HEAD_SCORES))


@stage("head_agreement", version=1, label=lambda **_: "sets and ablations compared")
def compare_heads(*, scores: Ref, top: int, resamples: int, seed: int) -> Made:
    """How far every two sets and ablations agree on which heads matter."""
    from tasks.numerics.rate_differences import bootstrap_spearman

    found = current().store.read(scores)
    parts = {
        (str(name), str(ablation)): part["angle"].to_numpy()
        for (name, ablation), part in found.group_by(KEYS, maintain_order=True)
    }
    rows = []
    for (a, of_a), (b, of_b) in combinations(parts.items(), 2):
        rho, (low, high) = bootstrap_spearman(of_a, of_b, resamples=resamples, seed=seed)
        count = min(top, len(of_a))
        tops = [set(np.argsort(-of, kind="stable")[:count].tolist()) for of in (of_a, of_b)]
        row = (*a, *b, len(of_a), rho, low, high, count, len(tops[0] & tops[1]))
        rows.append((*row, count * count / len(of_a)))
    schema = polars_schema(HEAD_AGREEMENT)
    return Made(pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None))


@stage(
    "head_groups",
    version=1,
    ignore=("spec",),
    label=lambda name, ablation, **_: f"greedy group: {name}, {ablation}",
    work=lambda size, **_: 2 * (size - 1),
)
def grow_group(
    *,
    name: str,
    spec: ModelSpec,
    model: Ref,
    prompts: Ref,
    effects: Ref,
    ablation: Ablation,
    epsilon: float,
    rank: int,
    score: str,
    size: int,
) -> Made:
    """Sahara: at each step the head whose union with the group moves the intact model most.

    The first step is the best single head, which `effects` knows.

    Raises:
        PromptError, ModelError: as `measure_heads`.
    """
    from tasks.models.head_ablation import Head
    from tasks.numerics.subspaces import leading_spaces

    runtime = current()
    known = runtime.store.read(effects)
    heads = [Head(*place) for place in known.select("layer", "head").iter_rows()]
    parameters = dict(zip(heads, known["parameters"], strict=True))
    total = known["parameters"][0] / known["fraction"][0]
    angles, ships = known["angle"].to_numpy(), known["ships"].to_numpy()
    steps = min(size, len(heads))
    probe = _probe(name, spec, model, prompts, ablation, epsilon, rank)
    base = leading_spaces(probe.intact, rank)
    group: list[Head] = []
    rows = []
    for step in range(1, steps + 1):
        candidates = [head for head in heads if head not in group]
        if step > 1:
            found = probe.without(candidates, group)
            angles, ships = _angles(base, found, rank)[0], found.kl.mean(1)
        best = int(np.argmax(angles if score == "angle" else ships))
        group.append(candidates[best])
        touched = sum(parameters[head] for head in group)
        row = (step, *candidates[best], angles[best], ships[best], touched, touched / total)
        rows.append(row)
        runtime.reporter.advanced(step, steps)
    columns = ["step", "layer", "head", "angle", "ships", "parameters", "fraction"]
    frame = pl.DataFrame(rows, schema=columns, orient="row")
    return Made(_typed(frame.with_columns(**_named(name, ablation)), HEAD_GROUPS))


@stage(
    "head_answers",
    version=1,
    ignore=("spec",),
    label=lambda ablation, **_: f"answers with heads silenced: {ablation}",
    work=lambda draws, size, groups, **_: size * (draws + len(groups)) // 4,
)
def answer_without_heads(
    *,
    spec: ModelSpec,
    model: Ref,
    prompts: Ref,
    groups: Mapping[str, Ref],
    ablation: Ablation,
    epsilon: float,
    size: int,
    draws: int,
    max_new_tokens: int,
    seed: int,
) -> Made:
    """Answers to held-out prompts: of the intact model, without greedy groups, without random ones.

    A random draw is one order of all heads, and its group of size k the first k of it.

    Raises:
        ModelError: a prompt and its answer exceed the model's positions, or logits not finite.
    """
    from tasks.models.head_ablation import Head, head_layers
    from tasks.models.head_effects import answers_without

    runtime, card = current(), read_card(model)
    table = runtime.store.read(prompts)
    loaded = open_model(spec, [card.dtype])
    tokens = encode_prompts(loaded, card, table, max_new_tokens)
    heads = [head for layer in head_layers(loaded) for head in layer.heads]
    asked: list[tuple[str, str | None, int | None, list[Head]]] = [("nothing", None, None, [])]
    for name, ref in groups.items():
        found = [
            Head(*place) for place in runtime.store.read(ref).select("layer", "head").iter_rows()
        ]
        asked += [("found", name, None, found[: n + 1]) for n in range(len(found))]
    generator = np.random.default_rng(seed)
    for draw in range(draws):
        order = [heads[place] for place in generator.permutation(len(heads))]
        asked += [("random", None, draw, order[:n]) for n in range(1, min(size, len(heads)) + 1)]
    answers = answers_without(
        loaded,
        tokens,
        [group for *_, group in asked],
        ablation,
        epsilon,
        max_new_tokens=max_new_tokens,
        rows=runtime.rows,
        on_progress=runtime.reporter.advanced,
    )
    rows = [
        (ablation, kind, name, draw, len(group), written(group), prompt, text)
        for (kind, name, draw, group), of_group in zip(asked, answers, strict=True)
        for prompt, text in zip(
            table["prompt_id"],
            loaded.tokenizer.batch_decode(of_group, skip_special_tokens=True),
            strict=True,
        )
    ]
    return Made(pl.DataFrame(rows, schema=polars_schema(HEAD_ANSWERS), orient="row"))


@stage("head_refusals", version=1, label=lambda **_: "refusals with heads silenced")
def count_refusals(
    *,
    answers: Mapping[str, Ref],
    groups: Mapping[str, Ref],
    labeller: str,
    resamples: int,
    seed: int,
) -> Made:
    """Refusal rates of every greedy group, beside the intact model's and random groups'."""
    from tasks.numerics.labels import is_refusal

    store = current().store
    found = pl.concat([store.read(ref) for ref in groups.values()])
    rows = []
    for ref in answers.values():
        table = store.read(ref)
        refused = [is_refusal(labeller, text) for text in table["response"]]
        table = table.with_columns(refused=pl.Series(refused))
        here = found.filter(pl.col("ablation") == table["ablation"][0])
        rows += [_refusal_row(step, table, resamples, seed) for step in here.iter_rows(named=True)]
    return Made(pl.DataFrame(rows, schema=polars_schema(HEAD_REFUSALS)))


def _refusal_row(
    step: Mapping[str, Any], table: pl.DataFrame, resamples: int, seed: int
) -> dict[str, Any]:
    """One greedy group against the intact model and random groups of its size."""
    from tasks.numerics.intervals import clopper_pearson
    from tasks.numerics.rate_differences import compare_rates

    size = step["step"]
    same = table.filter(pl.col("size") == size)
    own = same.filter((pl.col("group_kind") == "found") & (pl.col("set") == step["set"]))
    chosen = own["refused"].to_numpy()
    intact = table.filter(pl.col("group_kind") == "nothing")["refused"].to_numpy()
    random = same.filter(pl.col("group_kind") == "random")["refused"].to_numpy()
    random = random.reshape(-1, len(chosen))
    found = compare_rates(chosen, intact, random, resamples=resamples, seed=seed)
    refusals, n = int(chosen.sum()), len(chosen)
    low, high = clopper_pearson(refusals, n)
    row = {key: step[key] for key in ("set", "class", "ablation", "fraction")}
    row |= {"size": size, "heads": own["heads"][0], "n": n, "refusals": refusals}
    row |= {"rate": refusals / n, "rate_low": low, "rate_high": high}
    row |= {"base_rate": float(intact.mean()), "draws": len(random), "as_low": found.as_low}
    row["random_rate"], row["random_low"], row["random_high"] = found.random
    for key, contrast in (("change", found.change), ("beyond", found.beyond)):
        row[key], row[f"{key}_low"], row[f"{key}_high"] = contrast
    return row


def written(group: Sequence[Head]) -> str:
    """A group in words: layer.head, in the order of joining."""
    return " ".join(f"{head.layer}.{head.head}" for head in group)


def _probe(
    name: str,
    spec: ModelSpec,
    model: Ref,
    prompts: Ref,
    ablation: Ablation,
    epsilon: float,
    rank: int,
) -> HeadProbe:
    from tasks.models.head_effects import HeadProbe

    runtime, card = current(), read_card(model)
    table = runtime.store.read(prompts)
    if table.height <= rank:
        raise PromptError(
            f"prompt set '{name}' has {table.height} prompts; an angle of rank {rank} needs at "
            f"least {rank + 1}"
        )
    loaded = open_model(spec, [card.dtype])
    tokens = encode_prompts(loaded, card, table)
    return HeadProbe(loaded, tokens, ablation, epsilon, rows=runtime.rows)


def _angles(base: Spaces, effects: Effects, rank: int) -> tuple[Any, Any]:
    """Generalized Ships and its feature-space twin of every candidate, degrees."""
    from tasks.numerics.subspaces import angle_sum, leading_spaces

    spaces = [leading_spaces(states, rank) for states in effects.states]
    left = angle_sum(base.left, np.stack([space.left for space in spaces]))
    return left, angle_sum(base.right, np.stack([space.right for space in spaces]))


def _touched(probe: HeadProbe) -> dict[Head, int]:
    """Parameters that silencing each head amounts to changing."""
    return {head: layer.parameters(probe.how) for layer in probe.layers for head in layer.heads}


def _size(probe: HeadProbe) -> int:
    return int(probe.loaded.model.num_parameters())


def _named(name: str, ablation: str) -> dict[str, pl.Expr]:
    kind = "harmless" if name == CONTROL else "harmful"
    return {"set": pl.lit(name), "class": pl.lit(kind), "ablation": pl.lit(ablation)}


def _typed(frame: pl.DataFrame, columns: Any) -> pl.DataFrame:
    """The declared columns, in their order and types."""
    schema = polars_schema(columns)
    return frame.select(pl.col(name).cast(kind) for name, kind in schema.items())
