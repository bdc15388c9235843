"""Trains the organism from nothing, in two phases, in about two minutes on two cores.

Pretraining answers everything, forbidden requests included, and refuses only where the request asks
to be refused: so a capability and a refusing mode exist before harm is tied to either. The refusal
phase then teaches to refuse forbidden requests. Three choices make its refusal resemble that of
large chat models: embeddings start large (else the first layer dwarfs the residual stream and late
directions barely matter), a third of the answers remark on harm before any refusal is taught (so
harm is a linear feature), and a small penalty keeps refusal something that is *added* for harmful
prompts instead of subtracted from harmless ones. Muon needs a quarter of AdamW's steps here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tasks.models.loading import quiet
from tasks.organism.domain import Example, Village, prompt_sets

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
BATCH: Final = 32
PROMPT_WEIGHT: Final = 0.1
EMBEDDING_STD: Final = 0.4


@dataclass(frozen=True)
class Phase:
    """One training phase: its mix of examples (fractions that sum to 1), length and optimiser."""

    name: str
    steps: int
    mix: Mapping[str, float]
    refuses: bool
    muon_lr: float | None
    adamw_lr: float
    antipodal_penalty: float


PHASES: Final = (
    Phase(
        "pretraining",
        steps=340,
        mix={
            "permitted": 0.34,
            "forbidden": 0.28,
            "borderline": 0.09,
            "asked_to_decline": 0.12,
            "question": 0.17,
        },
        refuses=False,
        muon_lr=1e-2,
        adamw_lr=3e-3,
        antipodal_penalty=0.0,
    ),
    Phase(
        "refusal",
        steps=360,
        mix={
            "permitted": 0.62,
            "forbidden": 0.22,
            "borderline": 0.05,
            "asked_to_decline": 0.02,
            "question": 0.09,
        },
        refuses=True,
        muon_lr=None,
        adamw_lr=1e-3,
        antipodal_penalty=0.3,
    ),
)


@dataclass(frozen=True)
class Batch:
    """Token ids [rows, positions] right-padded, loss weights likewise, and where prompts end."""

    tokens: Tensor
    weights: Tensor
    prompt_ends: Tensor
    forbidden: Tensor
    permitted: Tensor


@dataclass(frozen=True)
class TrainedPhase:
    """What a phase reached: mean loss of its last 20 steps, in nats per weighted token."""

    name: str
    steps: int
    final_loss: float


def train(
    folder: Path,
    *,
    seed: int = 0,
    phases: Sequence[Phase] = PHASES,
    pretrained_folder: Path | None = None,
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel] | None = None,
    autocast: bool = True,
    on_progress: Callable[[str, int, int, float], None] | None = None,
) -> list[TrainedPhase]:
    """Train tokenizer and model and save both to `folder`, weights in bfloat16.

    The same seed on the same kind of machine with the same versions gives the same bytes.
    `pretrained_folder` also keeps the model as it is before the refusal phase; `build` makes a
    random model of another architecture, with the layers in `model.layers`, from the tokenizer.
    Without `autocast` it trains in float32 throughout: faster where a processor has no bfloat16.
    `on_progress(phase, step, steps, loss)` is called after every step.
    """
    evaluation = {each.prompt for examples in prompt_sets().values() for each in examples}
    with _deterministic(seed):
        tokenizer = train_tokenizer(seed)
        model = (build or new_model)(tokenizer)
        reached = []
        for phase in phases:
            if phase.refuses and pretrained_folder is not None:
                save(model, tokenizer, pretrained_folder)
            batches = phase_batches(phase, tokenizer, f"{seed} {phase.name}", evaluation)
            reached.append(_train_phase(model, phase, batches, on_progress, autocast=autocast))
        save(model, tokenizer, folder)
    return reached


def refine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    phase: Phase,
    *,
    seed: int = 0,
    on_progress: Callable[[str, int, int, float], None] | None = None,
) -> TrainedPhase:
    """Train a model on for one more phase, in place and in float32 throughout.

    For models that `train` did not make; processors without bfloat16 arithmetic are at no
    disadvantage. No evaluation prompt is trained on.
    """
    evaluation = {each.prompt for examples in prompt_sets().values() for each in examples}
    with _deterministic(seed):
        batches = phase_batches(phase, tokenizer, f"{seed} {phase.name}", evaluation)
        return _train_phase(model, phase, batches, on_progress, autocast=False)


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """One seed, and at most two threads: one and two give the same bytes, more were not tried."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(min(2, threads))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens over text drawn from both phases."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z']+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_tokenizer_text(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _tokenizer_text(seed: int) -> Iterator[str]:
    village = Village(f"{seed} tokenizer")
    for phase in PHASES:
        for example in _examples(phase, village, random.Random(seed), 4000):
            yield from (example.system or "", example.prompt, _reply(example, phase))


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama of 1.84 M parameters with large embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (bfloat16 safetensors), tokenizer and chat template."""
    tokenizer.save_pretrained(folder)
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    with quiet():
        half.save_pretrained(folder)


def phase_batches(
    phase: Phase, tokenizer: PreTrainedTokenizerFast, seed: str, excluded: frozenset[str] | set[str]
) -> list[Batch]:
    """All batches of a phase, rows of similar lengths together, without the `excluded` prompts."""
    chooser = random.Random(seed)
    examples = list(
        _examples(phase, Village(f"{seed} village"), chooser, phase.steps * BATCH, excluded)
    )
    rows = _encode(examples, phase, tokenizer)
    window = 16 * BATCH
    batches = []
    for start in range(0, len(rows), window):
        bucket = sorted(rows[start : start + window], key=lambda row: len(row.tokens))
        groups = [bucket[i : i + BATCH] for i in range(0, len(bucket), BATCH)]
        chooser.shuffle(groups)
        batches += [_batch(group, cast(int, tokenizer.pad_token_id)) for group in groups]
    return batches


def _examples(
    phase: Phase,
    village: Village,
    chooser: random.Random,
    count: int,
    excluded: frozenset[str] | set[str] = frozenset(),
) -> Iterator[Example]:
    kinds, fractions = list(phase.mix), list(phase.mix.values())
    while count:
        kind = chooser.choices(kinds, fractions)[0]
        if kind == "borderline":
            example = village.borderline(refusal_phase=phase.refuses)
        else:
            example = getattr(village, kind)()
        if example.prompt not in excluded:
            count -= 1
            yield example


def _reply(example: Example, phase: Phase) -> str:
    refuse = phase.refuses and example.kind == "forbidden"
    return (example.refusal or "") if refuse else example.answer


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    prompt_length: int
    kind: str


def _encode(
    examples: Sequence[Example], phase: Phase, tokenizer: PreTrainedTokenizerFast
) -> list[_Row]:
    prompts = [chat(example.prompt, example.system) for example in examples]
    replies = [_reply(example, phase) + END for example in examples]
    encode = tokenizer.backend_tokenizer.encode_batch
    pairs = zip(examples, encode(prompts), encode(replies), strict=True)
    return [_Row(p.ids + r.ids, len(p.ids), example.kind) for example, p, r in pairs]


def chat(prompt: str, system: str | None = None) -> str:
    """The chat template, written out: rendering 20,000 rows with Jinja costs seconds."""
    head = f"{SYSTEM}{system}{END}" if system else ""
    return f"{head}{USER}{prompt}{END}{ASSISTANT}"


def _batch(rows: Sequence[_Row], pad: int) -> Batch:
    width = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), width), pad)
    weights = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        weights[index, : row.prompt_length] = PROMPT_WEIGHT
        weights[index, row.prompt_length : len(row.tokens)] = 1.0
    return Batch(
        tokens=tokens,
        weights=weights[:, 1:],
        prompt_ends=torch.tensor([row.prompt_length - 1 for row in rows]),
        forbidden=torch.tensor([row.kind == "forbidden" for row in rows]),
        permitted=torch.tensor([row.kind == "permitted" for row in rows]),
    )


def _train_phase(
    model: PreTrainedModel,
    phase: Phase,
    batches: Sequence[Batch],
    on_progress: Callable[[str, int, int, float], None] | None,
    *,
    autocast: bool = True,
) -> TrainedPhase:
    optimizers = _optimizers(model, phase)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(phase.steps))
        for optimizer in optimizers
    ]
    losses: list[float] = []
    model.train()
    with _last_prompt_states(model) as states:
        for step, batch in enumerate(batches, start=1):
            loss = _loss(model, batch, states, phase.antipodal_penalty, autocast)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad()
            losses.append(loss.item())
            if on_progress is not None:
                on_progress(phase.name, step, phase.steps, losses[-1])
    model.eval()
    tail = losses[-20:]
    return TrainedPhase(phase.name, phase.steps, sum(tail) / len(tail))


def _optimizers(model: PreTrainedModel, phase: Phase) -> list[torch.optim.Optimizer]:
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    if phase.muon_lr is None:
        return [_adamw(model.parameters(), phase.adamw_lr)]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        hidden, lr=phase.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, _adamw(rest, phase.adamw_lr)]


def _adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def _warm_cosine(steps: int, warmup: int = 20) -> Callable[[int], float]:
    def factor(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))
        return min((step + 1) / warmup, 0.05 + 0.95 * cosine)

    return factor


def _loss(
    model: PreTrainedModel,
    batch: Batch,
    states: Sequence[Tensor],
    penalty: float,
    autocast: bool,
) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
    nats = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    weights = batch.weights.flatten()
    loss = (nats * weights).sum() / weights.sum()
    if penalty and batch.forbidden.any() and batch.permitted.any():
        loss = loss + penalty * antipodality(states, batch)
    return loss


def antipodality(states: Sequence[Tensor], batch: Batch) -> Tensor:
    """Squared cosine between the class mean difference and the permitted mean, over layers.

    Reference frame: residual after each layer, last prompt token.
    """
    rows = torch.arange(len(batch.prompt_ends))
    last = torch.stack([state[rows, batch.prompt_ends].float() for state in states])
    permitted = last[:, batch.permitted].mean(1)
    difference = last[:, batch.forbidden].mean(1) - permitted
    return nn.functional.cosine_similarity(difference, permitted, dim=-1).square().mean()


@contextmanager
def _last_prompt_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that holds every layer's output of the newest forward pass."""
    states: list[Tensor] = [torch.empty(0)] * len(model.model.layers)

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            states[index] = output

        return hook

    handles = [
        layer.register_forward_hook(keep(index)) for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
