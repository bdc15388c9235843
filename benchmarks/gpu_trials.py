"""Seconds per trial on a GPU: an 8-billion-parameter Llama shape with random weights, in bfloat16.

    python benchmarks/gpu_trials.py [--trials 4] [--rounds 3] [--out FILE]     # skips without a GPU
    python benchmarks/gpu_trials.py --shape tiny --device cpu                  # does it work at all

20 harmful and 64 harmless prompts of 40 to 60 random tokens, 96 new tokens. HERETIC 1.4.0 itself
needs a tokenizer, a hub or a driver that may be missing beside a GPU, so its procedure is written
out here: rank-3 LoRA adapters that approximate the norm-preserving edit, one forward pass over the
harmless prompts for the KL, `generate` for the harmful ones. The adapters are PEFT's where PEFT is
installed; else hooks that multiply by the same two factors, which costs less than PEFT. Its garbage
collections are left out. Tribunal edits the same layers by the same weights and directions, exactly
instead of by rank 3, and answers the harmless prompts too. Random weights refuse nothing, so there
is nothing for racing to decide.

Imports only what a bare machine with torch, transformers and safetensors has.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peak import DTYPES, matmul_peak, trial_flops
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.models.anatomy import COMPONENTS, anatomy
from tasks.models.batching import pad_left
from tasks.models.decoding import decode
from tasks.models.editing import build_edit, edited_places
from tasks.models.engine import Engine, Pool
from tasks.models.engine_options import EngineOptions
from tasks.models.loading import LoadedModel
from tasks.numerics.divergence import first_token_kl
from tasks.numerics.edit import edited_weight
from tasks.numerics.kernel import Kernel

HARMFUL, HARMLESS, SHORTEST, LONGEST = 20, 64, 40, 60
END, RANK = 1, 3
SHAPES: Mapping[str, Mapping[str, int]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
# Ways to run the engine: how many trials side by side, and whether harmless prompts are answered
# (for overrefusals) or only read, as HERETIC does and as a race does for all but finalists.
VARIANTS: Mapping[str, tuple[int, bool]] = {
    "one trial at a time": (1, True),
    "8 trials side by side": (8, True),
    "8 side by side, harmless prompts read": (8, False),
}
Json = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A random model, its prompts, and what it says unedited."""

    loaded: LoadedModel
    harmful: list[list[int]]
    harmless: list[list[int]]
    base_logits: Tensor  # [harmless prompts, vocabulary], float32, CPU
    new_tokens: int


@dataclass(frozen=True)
class Trial:
    """What is taken out, and where: arguments of `build_edit`."""

    vectors: Mapping[str, Tensor]
    weights: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Outcome:
    """What a way of judging found: first-token KL in nats, and how many tokens it produced."""

    kl: float
    produced: int


Judge = Callable[[Sequence[Trial]], list[Outcome]]


def main() -> None:
    options = parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        finish({"skipped": "no GPU: torch sees none"}, options.out)
        return
    bench = open_bench(options)
    judges: dict[str, Judge] = {peer_name(): peer(bench)}
    judges |= {name: tribunal(bench, *told) for name, told in VARIANTS.items()}
    seconds, outcomes = take_turns(judges, trials(bench, options), options)
    size = 8192 if options.device == "cuda" else 512
    peaks = {dtype: matmul_peak(dtype, size=size, device=options.device) for dtype in DTYPES}
    finish(summary(bench, seconds, outcomes, peaks, options), options.out)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--trials", type=int, default=8, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, help="save the JSON here")
    return parser.parse_args()


def open_bench(options: argparse.Namespace) -> Bench:
    """A random model on its device, the same for the same options."""
    shape, device = dict(SHAPES[options.shape]), torch.device(options.device)
    config = LlamaConfig(
        **shape, max_position_embeddings=512, bos_token_id=None, eos_token_id=END, pad_token_id=0
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    tokenizer = SimpleNamespace(eos_token_id=END)
    loaded = LoadedModel(model, tokenizer, anatomy(model), device, options.dtype, "random")
    dice = torch.Generator().manual_seed(1)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (HARMFUL + HARMLESS,), generator=dice).tolist()
    prompts = [
        torch.randint(2, shape["vocab_size"], (n,), generator=dice).tolist() for n in lengths
    ]
    harmful, harmless = prompts[:HARMFUL], prompts[HARMFUL:]
    (base,) = decode(loaded, harmless, max_new_tokens=1, rows=HARMLESS)
    return Bench(loaded, harmful, harmless, base.first_logits, options.new_tokens)


def trials(bench: Bench, options: argparse.Namespace) -> list[Trial]:
    """Random directions, and kernels as HERETIC's search space has them; one more to warm up."""
    dice = torch.Generator().manual_seed(2)
    layers, hidden = len(bench.loaded.anatomy.layers), bench.loaded.anatomy.hidden_size

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=dice))

    found = []
    for _ in range(options.rounds * options.trials + 1):
        directions = torch.randn(layers, hidden, generator=dice)
        directions = torch.nn.functional.normalize(directions, dim=1).to(bench.loaded.device)
        last = layers - 1
        kernels = [
            Kernel(
                between(0.8, 1.5),
                between(0.6, 1.0) * last,
                between(0.0, 1.0),
                between(1.0, max(0.6 * last, 1.0)),
            )
            for _ in COMPONENTS
        ]
        weights = {c: k.weights(layers) for c, k in zip(COMPONENTS, kernels, strict=True)}
        found.append(Trial(dict.fromkeys(COMPONENTS, directions), weights))
    return found


def tribunal(bench: Bench, together: int, answer_harmless: bool) -> Judge:
    """Our engine: edits of outputs, responses that go on from the pass that gave the KL.

    Without drafts, which a random model's answers would never match.
    """
    options = EngineOptions(drafts=False, rows=together * (HARMFUL + HARMLESS))
    prompts = bench.harmful + bench.harmless
    engine = Engine(bench.loaded, prompts, max_new_tokens=bench.new_tokens, options=options)
    harmful, harmless = range(HARMFUL), range(HARMFUL, HARMFUL + HARMLESS)
    base_logits = engine.sit().first_logits(harmless)

    def judge_some(some: Sequence[Trial]) -> list[Outcome]:
        pool, found = Pool(engine), []
        for trial in some:
            edit = build_edit(bench.loaded.anatomy, trial.vectors, trial.weights, "full", "module")
            sitting = engine.sit(edit)
            kl = first_token_kl(base_logits, sitting.first_logits(harmless)).mean().item()
            sitting.first_logits(harmful)
            for prompts in (harmful, harmless)[: 1 + answer_harmless]:
                pool.add(sitting, prompts)
            sitting.release()
            found.append((sitting, kl))
        pool.run()
        return [
            Outcome(kl, sum(len(r.tokens) + r.ended for r in sitting.found.values()))
            for sitting, kl in found
        ]

    def judge(trials: Sequence[Trial]) -> list[Outcome]:
        parts = [trials[at : at + together] for at in range(0, len(trials), together)]
        return [outcome for part in parts for outcome in judge_some(part)]

    return judge


def peer_name() -> str:
    return "HERETIC's procedure, " + ("PEFT" if find_spec("peft") else "adapters written out")


def peer(bench: Bench) -> Judge:
    """HERETIC's procedure: adapters, a pass for the KL, `generate` for the harmful prompts."""
    model, adapted = _with_peft(bench) if find_spec("peft") else _with_hooks(bench)
    base = torch.log_softmax(bench.base_logits.to(bench.loaded.device), dim=-1)

    def generate(prompts: list[list[int]], **told: Any) -> Any:
        ids, mask, _ = pad_left(prompts, bench.loaded.device)
        return model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **told
        )

    def judge(trials: Sequence[Trial]) -> list[Outcome]:
        return [judge_one(trial) for trial in trials]

    def judge_one(trial: Trial) -> Outcome:
        with torch.inference_mode(), adapted(trial):
            first = generate(
                bench.harmless,
                max_new_tokens=1,
                use_cache=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            after = torch.log_softmax(first.logits[0].float(), dim=-1)
            kl = torch.nn.functional.kl_div(after, base, reduction="batchmean", log_target=True)
            width = max(map(len, bench.harmful))
            answers = generate(bench.harmful, max_new_tokens=bench.new_tokens)[:, width:]
        ends = [(row == END).nonzero() for row in answers]
        lengths = [int(end[0]) + 1 if len(end) else answers.shape[1] for end in ends]
        return Outcome(kl.item(), sum(lengths))

    return judge


Adapted = Callable[[Trial], Any]  # a context in which a trial's adapters are in place


def factors(bench: Bench, trial: Trial) -> Iterator[tuple[tuple[int, str], Tensor, Tensor]]:
    """Every edited place with the two factors, [RANK, inputs] and [d, RANK], of its change."""
    own = bench.loaded.anatomy
    for place, writer, v, lam in edited_places(own, trial.vectors, trial.weights, "module"):
        weight = writer.weight.float()
        change = edited_weight(weight, v, lam, "full") - weight
        left, sizes, right = torch.svd_lowrank(change, q=2 * RANK + 4, niter=6)
        roots = sizes[:RANK].sqrt()
        down, up = roots[:, None] * right[:, :RANK].T, left[:, :RANK] * roots
        yield place, down.to(writer.weight.dtype), up.to(writer.weight.dtype)


def _with_hooks(bench: Bench) -> tuple[Any, Adapted]:
    writers = bench.loaded.anatomy.writers

    @contextmanager
    def adapted(trial: Trial) -> Iterator[None]:
        handles = []
        for (layer, component), down, up in factors(bench, trial):

            def add(_: Any, inputs: Any, output: Tensor, down: Any = down, up: Any = up) -> Tensor:
                return output + (inputs[0] @ down.T) @ up.T

            handles.append(writers[layer][component].module.register_forward_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return bench.loaded.model, adapted


def _with_peft(bench: Bench) -> tuple[Any, Adapted]:
    """A twin that shares the weights and has PEFT's adapters, so that ours stays as it is."""
    from peft import LoraConfig, get_peft_model

    model = bench.loaded.model
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    targets = ["o_proj", "down_proj"]
    wrapped = get_peft_model(
        twin, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    )
    wrapped.requires_grad_(False)
    layers = wrapped.base_model.model.model.layers

    @contextmanager
    def adapted(trial: Trial) -> Iterator[None]:
        for layer in layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.lora_B["default"].weight.data.zero_()
        for (number, component), down, up in factors(bench, trial):
            layer = layers[number]
            attention = component == COMPONENTS[0]
            module = layer.self_attn.o_proj if attention else layer.mlp.down_proj
            module.lora_A["default"].weight.data = down
            module.lora_B["default"].weight.data = up
        yield

    return wrapped, adapted


def take_turns(
    judges: Mapping[str, Judge], trials: Sequence[Trial], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[Outcome]]]:
    """Mean seconds per trial of every round, and every outcome, by way; all judge the same."""
    seconds: dict[str, list[float]] = {name: [] for name in judges}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in judges}
    for judge in judges.values():
        judge(trials[-1:])
    started, done = time.monotonic(), 0
    for number in range(options.rounds):
        own = trials[number * options.trials : (number + 1) * options.trials]
        for name in list(judges)[:: 1 if number % 2 == 0 else -1]:
            _wait(options.device)
            begun = time.perf_counter()
            outcomes[name] += judges[name](own)
            _wait(options.device)
            seconds[name].append((time.perf_counter() - begun) / len(own))
            done += 1
            left = (time.monotonic() - started) / done * (options.rounds * len(judges) - done)
            say(f"{name}: {seconds[name][-1]:.3f} s per trial; about {left:.0f} s left")
    return seconds, outcomes


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def summary(
    bench: Bench,
    seconds: Mapping[str, list[float]],
    outcomes: Mapping[str, list[Outcome]],
    peaks: Mapping[str, float],
    options: argparse.Namespace,
) -> Json:
    """The same form as that of benchmarks/trials.py."""
    reference, *variants = seconds
    ways = {}
    for name, rounds in seconds.items():
        own = statistics.fmean(rounds)
        produced = statistics.fmean(outcome.produced for outcome in outcomes[name])
        ways[name] = {
            "name": name,
            "s_per_trial": own,
            "s_per_trial_of_rounds": rounds,
            "tokens_per_s": produced / own,
            "share_of_peak": _flops(bench, produced, name == reference)
            / own
            / peaks[options.dtype],
            "kl": [outcome.kl for outcome in outcomes[name]],
            "ratios": [a / b for a, b in zip(seconds[reference], rounds, strict=True)],
        }
    first = ways[variants[0]]
    model = {
        "name": f"llama-{options.shape}-random",
        "dtype": options.dtype,
        "ratio": statistics.median(first["ratios"]),
        "heretic_s_per_trial": ways[reference]["s_per_trial"],
        "tribunal_s_per_trial": first["s_per_trial"],
        "heretic": [ways[reference]],
        "tribunal": [ways[name] for name in variants],
    }
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    machine = {"device": device, "torch": torch.__version__, "matmul_flops": dict(peaks)}
    return {"machine": machine, "models": [model]}


def _flops(bench: Bench, produced: float, peer: bool) -> float:
    """Floor of a trial's arithmetic; HERETIC's procedure asks one token of a harmless prompt."""
    model, prompts = bench.loaded.model, bench.harmful + bench.harmless
    layers = sum(w.numel() for w in model.model.layers.parameters() if w.ndim == 2)
    chosen = produced + HARMLESS if peer else produced
    weights = (layers, model.lm_head.weight.numel())
    return trial_flops(weights, sum(map(len, prompts)), chosen, len(prompts))


def finish(found: Json, out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
