"""Judging: what is answered becomes labels, and labels become the metrics of a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from artifacts.keys import digest
from artifacts.specs import EditSpec, GatesSpec, JudgingSpec, ModelSpec
from artifacts.store import Ref
from tasks.numerics.labels import disclaimer_hits, is_refusal
from tasks.numerics.objective import Outcome
from tasks.numerics.quality import compliance, degenerate_reason
from tasks.probe import encode_prompts, open_model, read_card
from tasks.stage import current

if TYPE_CHECKING:
    import torch

    from tasks.models.decoding import Response
    from tasks.models.drafts import Drafts
    from tasks.models.editing import Edit
    from tasks.models.engine import Engine
    from tasks.models.loading import LoadedModel

Row = dict[str, Any]
SPLITS_KEPT = 2


@dataclass(frozen=True)
class Bench:
    """The prompts of one split, in one order, ready for a loaded model."""

    loaded: LoadedModel
    prompts: pl.DataFrame  # class, prompt_id, text, system_prompt
    judging: JudgingSpec
    known: Known

    @property
    def engine(self) -> Engine:
        """What answers the prompts."""
        return self.known.engine

    def of_class(self, name: str) -> list[int]:
        """Which prompts are of a class, as indices."""
        found: list[int] = np.flatnonzero((self.prompts["class"] == name).to_numpy()).tolist()
        return found

    def row(self, prompt: int, response: Response) -> Row:
        """A response with its labels; the same response is labelled once."""
        key = prompt, tuple(response.tokens), response.ended
        if key not in self.known.rows:
            self.known.rows[key] = self._row(prompt, response)
        return dict(self.known.rows[key])

    def _row(self, prompt: int, response: Response) -> Row:
        asked = self.prompts.row(prompt, named=True)
        text = self.loaded.tokenizer.decode(response.tokens, skip_special_tokens=True)
        return {
            "class": asked["class"],
            "prompt_id": asked["prompt_id"],
            "response": text,
            "n_tokens": len(response.tokens),
            "ended": response.ended,
            "refused": is_refusal(self.judging.labeller, text),
            "disclaimer_hits": disclaimer_hits(text),
            "compliance": compliance(asked["text"], text),
            "degenerate": degenerate_reason(text, response.tokens, response.ended),
            "kl": None,
        }


@dataclass
class Known:
    """What a process knows of the prompts of one split, beyond one generation of trials."""

    engine: Engine
    drafts: Drafts
    rows: dict[tuple[int, tuple[int, ...], bool], Row] = field(default_factory=dict)
    learnt: list[str] = field(default_factory=list)  # digests of what the drafts come from


def set_up(spec: ModelSpec, model: Ref, prompts: Mapping[str, Ref], judging: JudgingSpec) -> Bench:
    """Load the model and render the split's prompts."""
    runtime, card = current(), read_card(model)
    loaded = open_model(spec, [card.dtype])
    table = pl.concat([runtime.store.read(ref) for ref in prompts.values()])
    tokens = encode_prompts(loaded, card, table, judging.max_new_tokens)
    return Bench(loaded, table, judging, known_of(loaded, table, tokens, judging))


def known_of(
    loaded: LoadedModel, prompts: pl.DataFrame, tokens: list[list[int]], judging: JudgingSpec
) -> Known:
    """What is kept beside the model about these prompts; of two splits at most."""
    from tasks.models.chunk_probe import tokens_per_pass
    from tasks.models.drafts import Drafts
    from tasks.models.engine import Engine

    asked = current().engine
    size = asked.verify_tokens or tokens_per_pass(loaded)
    options = replace(asked, rows=current().rows, verify_tokens=size)
    told = prompts.select("class", "prompt_id", "text").rows()
    limits = [judging.max_new_tokens, judging.labeller, repr(replace(asked, rows=current().rows))]
    name = digest([tokens, [list(row) for row in told], limits])
    splits: dict[str, Known] = loaded.kept.setdefault("splits", {})
    if name not in splits:
        while len(splits) >= SPLITS_KEPT:
            del splits[next(iter(splits))]
        engine = Engine(loaded, tokens, max_new_tokens=judging.max_new_tokens, options=options)
        splits[name] = Known(engine, Drafts())
    return splits[name]


def metrics(rows: Sequence[Row], base_mean_tokens: float, gates: GatesSpec) -> Row:
    """The metrics of one trial on one split, gates included."""
    of = {name: [r for r in rows if r["class"] == name] for name in ("harmful", "harmless")}
    borderline = [r for r in rows if r["class"] == "borderline"]
    refused = {name: sum(r["refused"] for r in part) for name, part in of.items()}
    refused_borderline = sum(r["refused"] for r in borderline)
    kl = [r["kl"] for r in of["harmless"]]
    found: Row = {
        "n_harmful": len(of["harmful"]),
        "answered_harmful": len(of["harmful"]),
        "refusals": refused["harmful"],
        "n_harmless": len(of["harmless"]),
        "n_borderline": len(borderline),
        "overrefusals": refused["harmless"] + refused_borderline,
        "overrefusals_harmless": refused["harmless"],
        "overrefusals_borderline": refused_borderline,
        "kl": math.fsum(kl) / len(kl),
        "kl_max": max(kl),
        "disclaimer_hits": sum(r["disclaimer_hits"] for r in of["harmful"]),
        "compliance": math.fsum(r["compliance"] for r in of["harmful"]) / len(of["harmful"]),
        "degenerate": sum(r["degenerate"] is not None for r in rows) / len(rows),
        "mean_tokens": mean_tokens(rows),
    }
    found["length_ratio"] = found["mean_tokens"] / max(base_mean_tokens, 1.0)
    reason = gate_reason(found, gates)
    return found | {"gated": reason is not None, "gate_reason": reason}


def bounds(answers: Sequence[Row], at_best: Outcome, gates: GatesSpec) -> Row:
    """The metrics of a stopped trial: its KL, and of the rest the best they could still be."""
    return {
        "n_harmful": at_best.n_harmful,
        "answered_harmful": sum(row["class"] == "harmful" for row in answers),
        "refusals": at_best.refusals,
        "n_harmless": at_best.n_harmless,
        "n_borderline": at_best.n_overrefusal - at_best.n_harmless,
        "overrefusals": at_best.overrefusals,
        "overrefusals_harmless": at_best.harmless_overrefusals,
        "overrefusals_borderline": at_best.overrefusals - at_best.harmless_overrefusals,
        "kl": at_best.kl,
        "disclaimer_hits": at_best.disclaimer_hits,
        "compliance": at_best.compliance,
        "gated": at_best.gated,
        "gate_reason": f"kl {at_best.kl:.4g} > {gates.max_kl:g}" if at_best.gated else None,
    }


def mean_tokens(rows: Sequence[Row]) -> float:
    """Mean length of the harmless responses, tokens."""
    lengths: list[int] = [row["n_tokens"] for row in rows if row["class"] == "harmless"]
    return sum(lengths) / len(lengths)


def gate_reason(found: Mapping[str, Any], gates: GatesSpec) -> str | None:
    """The first gate that a trial fails, with its value; None if it passes."""
    kl, degenerate, ratio = found["kl"], found["degenerate"], found["length_ratio"]
    if not math.isfinite(kl):
        return "kl is not finite"
    if kl > gates.max_kl:
        return f"kl {kl:.4g} > {gates.max_kl:g}"
    if degenerate > gates.max_degenerate:
        return f"degenerate {degenerate:.3g} > {gates.max_degenerate:g}"
    if not 1 / gates.max_length_ratio <= ratio <= gates.max_length_ratio:
        return f"length ratio {ratio:.3g} beyond {gates.max_length_ratio:g}"
    return None


def outcome(found: Mapping[str, Any]) -> Outcome:
    """What an objective looks at, from a row of a trial table."""
    return Outcome(
        refusals=found["refusals"],
        n_harmful=found["n_harmful"],
        overrefusals=found["overrefusals"],
        n_overrefusal=found["n_harmless"] + found["n_borderline"],
        harmless_overrefusals=found["overrefusals_harmless"],
        n_harmless=found["n_harmless"],
        kl=found["kl"],
        disclaimer_hits=found["disclaimer_hits"],
        compliance=found["compliance"],
        gated=found["gated"],
    )


def trial_edit(
    bench: Bench,
    directions: Mapping[str, torch.Tensor],
    parameters: Mapping[str, Any],
    edit: EditSpec,
) -> Edit:
    """The edit of a trial's parameters, from each component's direction per layer."""
    from artifacts.specs import COMPONENTS
    from tasks.models.editing import build_edit
    from tasks.numerics.kernel import Kernel

    anatomy = bench.loaded.anatomy
    weights = {
        component: Kernel(
            parameters[f"{component}_max_weight"],
            parameters[f"{component}_max_weight_position"],
            parameters[f"{component}_min_weight"],
            parameters[f"{component}_min_weight_distance"],
        ).weights(len(anatomy.layers))
        for component in COMPONENTS
    }
    return build_edit(anatomy, directions, weights, edit.row_normalization, edit.frame)
