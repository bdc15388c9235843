"""Seconds per trial of HERETIC 1.4.0 and of Tribunal, in one run and in turns.

    python benchmarks/trials.py [--models organism mid] [--dtype float32] [--rounds 3]
                                [--format table] [--out FILE] [--environment FOLDER]

Same model folder, system prompt, prompts (400 + 400 for directions, 128 + 128 judged), 64 new
tokens, batches of 128 in HERETIC, no response prefix, numbers of trials and threads. HERETIC runs
twice: as released, and with `offload_outputs_to_cpu = false`, which spares it two garbage
collections per batch; the ratio is against the faster of both, `ratio_as_released` against the
other. In a round every tool runs its trials while all others wait, the next round in the opposite
order; a round's first trial is not counted. Loading, directions and the unedited model are not
part of a trial. What a race left open and the ranking needs is judged after the last round, and its
time is shared among all trials. Tribunal also answers harmless prompts (for overrefusals) where
HERETIC only reads their first token: that is in its times.

HERETIC does not tell how long its responses are. Its tokens per second are estimated with the mean
length of Tribunal's harmful responses, and marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import heretic_side
import mid_model
import torch
import tribunal_side
from heretic_side import Job, Seen
from peak import DTYPES, matmul_peak, matmul_weights, trial_flops
from tribunal_side import Judged, Variant

from tasks.models.loading import load
from tasks.models.rendering import encode, render
from tasks.organism import MODEL_FOLDER, card

# The first one gives a model's `ratio`. Add ways to run the engine here, with what turns them on.
WHOLE = ("search.racing=false",)
VARIANTS = (
    Variant("racing"),
    Variant("no racing", WHOLE),
    Variant("no drafts", WHOLE, {"drafts": False}),
    Variant("no shared layers", WHOLE, {"share_layers": False}),
    Variant("no shared front", WHOLE, {"share_front": False}),
)
SETTINGS = {"heretic": False, "heretic, as released": True}  # offload_outputs_to_cpu
SYSTEM_PROMPT = "You answer questions about crafts."  # HERETIC always sends one
NEW_TOKENS = card.MAX_NEW_TOKENS
TRIALS = {"organism": 12, "mid": 4}  # of one round; the first is not counted
ENVIRONMENT = mid_model.CACHE / f"heretic-{heretic_side.VERSION}"
Json = dict[str, Any]


class Tool(Protocol):
    """What takes turns."""

    def trials(self, count: int) -> Sequence[Seen | Judged]: ...
    def finals(self) -> float: ...


@dataclass(frozen=True)
class Turn:
    """The counted trials of one tool in one round; `finals`: each one's share of those, seconds."""

    tool: str
    round: int
    trials: Sequence[Seen | Judged]
    finals: float = 0.0

    @property
    def seconds(self) -> float:
        """Mean seconds per trial, its share of the finals included."""
        return statistics.fmean(trial.seconds or 0.0 for trial in self.trials) + self.finals


def main() -> None:
    options = parse_options()
    heretic_side.install(options.environment)
    started, models = time.monotonic(), []
    peaks = {dtype: matmul_peak(dtype) for dtype in DTYPES}
    say(f"matrix products: {gigaflops(peaks)}")
    for name in options.models:
        folder = MODEL_FOLDER if name == "organism" else mid_model.obtain(options.mid_model)
        models.append(compare(name, folder, options, peaks[options.dtype]))
    found = {"machine": machine(peaks), "models": models}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if options.format == "json" else table(found))
    say(f"{time.monotonic() - started:.0f} s in all")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, help="of a round, for every model (at least 2)")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--format", choices=["table", "json"], default="table")
    parser.add_argument("--out", type=Path, help="save the JSON here")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="HERETIC's")
    parser.add_argument("--mid-model", type=Path, default=mid_model.DEFAULT)
    options = parser.parse_args()
    if options.trials is not None and options.trials < 2:
        parser.error("--trials must be at least 2, since the first of a round is not counted")
    return options


def compare(name: str, folder: Path, options: argparse.Namespace, peak: float) -> Json:
    """All rounds of one model, as a table row."""
    trials = options.trials or TRIALS[name]
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        job = Job(folder, Path(place) / "prompts", options.dtype, NEW_TOKENS, SYSTEM_PROMPT)
        write_prompts(job.prompts)
        tools: dict[str, Tool] = {
            tool: stack.enter_context(
                heretic_side.Session(
                    options.environment, Path(place) / tool, job, offload=SETTINGS[tool]
                )
            )
            for tool in options.settings
        }
        for number, variant in enumerate(v for v in VARIANTS if v.name in options.variants):
            tools[variant.name] = stack.enter_context(
                tribunal_side.Session(Path(place) / f"tribunal-{number}", job, variant)
            )
        turns = take_turns(name, tools, options.rounds, trials)
        return summary(name, job, turns, options, peak)


def take_turns(name: str, tools: dict[str, Tool], rounds: int, trials: int) -> list[Turn]:
    """Every tool once per round, in an order that reverses from round to round."""
    turns: list[Turn] = []
    started, done = time.monotonic(), 0
    for number in range(rounds):
        for tool in list(tools)[:: 1 if number % 2 == 0 else -1]:
            found = tools[tool].trials(trials)
            turns.append(Turn(tool, number, found[1:]))
            done += 1
            left = (time.monotonic() - started) / done * (rounds * len(tools) - done)
            say(
                f"{name}, round {number + 1}/{rounds}, {tool}: "
                f"{turns[-1].seconds:.2f} s per trial; about {left:.0f} s left for this model"
            )
    finals = {tool: tools[tool].finals() / (rounds * trials) for tool in tools}
    return [replace(turn, finals=finals[turn.tool]) for turn in turns]


def summary(
    name: str, job: Job, turns: Sequence[Turn], options: argparse.Namespace, peak: float
) -> Json:
    """What the turns of one model come to."""
    peers = {tool: told(turns, tool) for tool in options.settings}
    reference = min(peers, key=lambda tool: peers[tool]["s_per_trial"])
    weights, prompts = matmul_weights(job.model), prompt_tokens(job)
    variants = []
    for tool in options.variants:
        own = told(turns, tool)
        judged = [t for turn in turns if turn.tool == tool for t in turn.trials]
        tokens = {
            kind: statistics.fmean(getattr(trial, f"{kind}_tokens") for trial in judged)
            for kind in tribunal_side.CLASSES
        }
        produced, responses = sum(tokens.values()), sum(prompts["prompts"].values())
        flops = trial_flops(weights, sum(prompts["tokens"].values()), produced, responses)
        rounds = ratios(turns, reference, tool)
        variants.append(
            own
            | {
                "ratio": statistics.median(rounds),
                "ratio_least": min(rounds),
                "ratio_most": max(rounds),
                "ratio_as_released": statistics.median(ratios(turns, options.settings[-1], tool)),
                "tokens_per_s": produced / own["s_per_trial"],
                "mean_harmful_tokens": tokens["harmful"] / prompts["prompts"]["harmful"],
                "mean_harmless_tokens": tokens["harmless"] / prompts["prompts"]["harmless"],
                "share_of_peak": flops / own["s_per_trial"] / peak,
            }
        )
    first = variants[0]
    produced = first["mean_harmful_tokens"] * prompts["prompts"]["harmful"]
    read, responses = sum(prompts["tokens"].values()), sum(prompts["prompts"].values())
    chosen = produced + prompts["prompts"]["harmless"]  # one token of each harmless response
    flops = trial_flops(weights, read, chosen, responses)
    for peer in peers.values():
        peer["tokens_per_s_estimated"] = produced / peer["s_per_trial"]
        peer["share_of_peak_estimated"] = flops / peer["s_per_trial"] / peak
    return {
        "name": name,
        "dtype": job.dtype,
        "layer_weights": weights[0],
        "prompts": prompts,
        "ratio": first["ratio"],
        "ratio_least": first["ratio_least"],
        "ratio_most": first["ratio_most"],
        "ratio_as_released": first["ratio_as_released"],
        "heretic_s_per_trial": peers[reference]["s_per_trial"],
        "tribunal_s_per_trial": first["s_per_trial"],
        "heretic": list(peers.values()),
        "tribunal": variants,
    }


def told(turns: Sequence[Turn], tool: str) -> Json:
    """A tool's seconds, and what its trials were like."""
    own = [turn for turn in turns if turn.tool == tool]
    trials = [trial for turn in own for trial in turn.trials]
    return {
        "name": tool,
        "trials": len(trials),
        "s_per_trial": statistics.fmean(turn.seconds for turn in own),
        "s_of_finals_per_trial": own[0].finals,
        "s_per_trial_of_rounds": [turn.seconds for turn in own],
        "s_of_trials": [trial.seconds for trial in trials],
        "refusals": [trial.refusals for trial in trials],
        "kl": [trial.kl for trial in trials],
    }


def ratios(turns: Sequence[Turn], peer: str, tool: str) -> list[float]:
    """How many times faster `tool` was than `peer`, per round."""
    seconds = {(turn.tool, turn.round): turn.seconds for turn in turns}
    return [seconds[peer, n] / seconds[tool, n] for t, n in seconds if t == tool]


def prompt_tokens(job: Job) -> Json:
    """Judged prompts, and their tokens, by class."""
    tokenizer = load(str(job.model), dtypes=("float32",), device="cpu").tokenizer
    found: Json = {"prompts": {}, "tokens": {}}
    for name in tribunal_side.CLASSES:
        texts = (job.prompts / f"{name}-search.txt").read_text().splitlines()
        rendered = [render(tokenizer, text, job.system_prompt) for text in texts]
        found["prompts"][name] = len(texts)
        found["tokens"][name] = sum(map(len, encode(tokenizer, rendered)))
    return found


def write_prompts(folder: Path) -> None:
    """The organism's prompt sets, one prompt a line: both tools read these files."""
    folder.mkdir(parents=True)
    for name in tribunal_side.CLASSES:
        for split in ("direction", "search", "selection", "test"):
            texts = [record["text"] for record in card.prompts(f"{name}-{split}")]
            (folder / f"{name}-{split}.txt").write_text("\n".join(texts) + "\n")


def gigaflops(peaks: Mapping[str, float]) -> str:
    return ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())


def machine(peaks: Mapping[str, float]) -> Json:
    """What the numbers depend on beside the code."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "heretic": heretic_side.VERSION,
        "matmul_flops": dict(peaks),
        "load_at_end": os.getloadavg()[0],
    }


def table(found: Json) -> str:
    """The same for people."""
    told, dtypes = found["machine"], ", ".join(sorted({m["dtype"] for m in found["models"]}))
    lines = [
        f"{told['cores']} cores, {told['threads']} threads, torch {told['torch']}; "
        f"matrix products: {gigaflops(told['matmul_flops'])}; models in {dtypes}"
    ]
    head = (
        "| model | tool | s per trial | ratio (rounds) | as released | tokens/s | share of peak |"
    )
    lines += ["", head, "|---|---|---|---|---|---|---|"]
    for model in found["models"]:
        for peer in model["heretic"]:
            lines.append(
                f"| {model['name']} | {peer['name']} | {peer['s_per_trial']:.2f} | | | "
                f"~{peer['tokens_per_s_estimated']:.0f} | ~{peer['share_of_peak_estimated']:.1%} |"
            )
        for own in model["tribunal"]:
            lines.append(
                f"| {model['name']} | tribunal, {own['name']} | {own['s_per_trial']:.2f} | "
                f"{own['ratio']:.2f} ({own['ratio_least']:.2f}-{own['ratio_most']:.2f}) | "
                f"{own['ratio_as_released']:.2f} | {own['tokens_per_s']:.0f} | "
                f"{own['share_of_peak']:.1%} |"
            )
    notes = (
        "ratio: against the faster setting of HERETIC, median of the rounds; as released: against",
        "its defaults. Tribunal's trials also answer the harmless prompts, HERETIC's do not.",
        "~: with the mean length of Tribunal's harmful responses, for HERETIC tells none.",
    )
    return "\n".join([*lines, "", *notes])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
