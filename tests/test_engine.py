"""The trial engine answers as plain greedy generation on edited weights does, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decoding import EVERY_FIFTH, generated, loaded
from tiny_models import LAYERS, NAMES, VOCAB, each

from artifacts.errors import ModelError
from tasks.models import engine as engine_module
from tasks.models.anatomy import COMPONENTS
from tasks.models.baking import bake
from tasks.models.decoding import Response, decode
from tasks.models.drafts import Drafts
from tasks.models.editing import Edit, build_edit
from tasks.models.engine import Engine, Pool, Sitting
from tasks.models.engine_options import EngineOptions
from tasks.models.loading import LoadedModel
from tasks.models.partial_pass import PartialPass
from tasks.numerics.divergence import first_token_kl

NEW = 10
FRONT = [7, 8, 9, 10, 11]
OPTIONS = {
    "all": EngineOptions(),
    "small chunks": EngineOptions(verify_tokens=12, rows=3),
    "no layers": EngineOptions(share_layers=False),
    "no front": EngineOptions(share_front=False),
    "no drafts": EngineOptions(drafts=False),
    "none": EngineOptions(share_layers=False, share_front=False, drafts=False),
}


def prompts(count: int = 8) -> list[list[int]]:
    """Token lists with a common front and 1 to 7 tokens of their own."""
    generator = torch.Generator().manual_seed(1)
    return [
        FRONT + torch.randint(3, VOCAB, (1 + (5 * i) % 7,), generator=generator).tolist()
        for i in range(count)
    ]


def some_edit(held: LoadedModel, seed: int, first: int = 1) -> tuple[Edit, dict[str, Any]]:
    """An edit of the layers from `first` on, and the arguments that bake the same into weights."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(LAYERS, held.anatomy.hidden_size, generator=generator)
    vectors /= vectors.norm(dim=-1, keepdim=True)
    arguments: dict[str, Any] = {
        "vectors": dict.fromkeys(COMPONENTS, vectors),
        "weights": dict.fromkeys(COMPONENTS, [0.0] * first + [0.9] * (LAYERS - first)),
        "row_normalization": "none",
        "frame": "module",
    }
    return build_edit(held.anatomy, **arguments), arguments


def expected(name: str, arguments: dict[str, Any] | None) -> list[Response]:
    """What transformers' own greedy search answers with the edit in the weights."""
    held = loaded(name, EVERY_FIFTH)
    if arguments is not None:
        bake(held.anatomy, **arguments)
    found = []
    for prompt in prompts():
        tokens = generated(held.model, prompt, EVERY_FIFTH, NEW)
        ended = tokens[-1] in EVERY_FIFTH
        found.append(Response(tokens[:-1] if ended else tokens, ended))
    return found


def answered(engine: Engine, edits: list[Edit | None], drafts: Drafts) -> list[Sitting]:
    """Every prompt under every edit, in two classes, what waits pooled over all edits."""
    pool, sittings = Pool(engine), []
    for edit in edits:
        sitting = engine.sit(edit)
        for part in (range(5), range(5, 8)):
            sitting.first_logits(list(part))
            sitting.verify(list(part), drafts)
            pool.add(sitting, list(part))
        sitting.release()
        sittings.append(sitting)
    pool.run()
    return sittings


def responses(sitting: Sitting) -> list[Response]:
    return [sitting.found[prompt] for prompt in range(8)]


def learn(drafts: Drafts, sitting: Sitting, eos: int) -> None:
    drafts.learn([(p, [*r.tokens, *[eos] * r.ended]) for p, r in sitting.found.items()])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["llama-bias", "gemma2", "gptneox"])
def test_answers_are_those_of_edited_weights(name: str, options: EngineOptions) -> None:
    held = loaded(name, EVERY_FIFTH)
    made = [some_edit(held, seed, first) for seed, first in ((0, 1), (1, LAYERS - 1), (2, 0))]
    engine, drafts = Engine(held, prompts(), max_new_tokens=NEW, options=options), Drafts()
    (base,) = answered(engine, [None], drafts)
    assert responses(base) == expected(name, None)
    learn(drafts, base, EVERY_FIFTH[0])
    for _ in range(2):  # the second time, drafts know every answer
        sittings = answered(engine, [edit for edit, _ in made], drafts)
        for sitting, (_, arguments) in zip(sittings, made, strict=True):
            assert responses(sitting) == expected(name, arguments)
            learn(drafts, sitting, EVERY_FIFTH[0])
    assert responses(sittings[0]) != responses(base), "the edits must matter"


@pytest.mark.parametrize("name", each(NAMES))
def test_every_architecture(name: str) -> None:
    held = loaded(name, EVERY_FIFTH)
    edit, _ = some_edit(held, 3)
    engine, drafts = Engine(held, prompts(), max_new_tokens=NEW), Drafts()
    plain = decode(held, prompts(), [edit], max_new_tokens=NEW, rows=8)[0]
    for _ in range(2):
        (sitting,) = answered(engine, [edit], drafts)
        assert [r.tokens for r in responses(sitting)] == plain.tokens
        assert [r.ended for r in responses(sitting)] == plain.ended
        learn(drafts, sitting, EVERY_FIFTH[0])


def test_an_edit_that_does_nothing_is_the_unedited_model_to_the_bit() -> None:
    held = loaded()
    engine = Engine(held, prompts(), max_new_tokens=NEW)
    own, nothing, something = (
        engine.sit(edit).first_logits(range(8)) for edit in (None, Edit({}), some_edit(held, 0)[0])
    )
    assert torch.equal(own, nothing)
    assert not torch.equal(own, something)


def test_first_logits_do_not_depend_on_what_is_shared_below_the_edit() -> None:
    held = loaded()
    edit, _ = some_edit(held, 0, first=LAYERS - 1)
    shared, whole = (
        Engine(held, prompts(), max_new_tokens=NEW, options=OPTIONS[name])
        for name in ("all", "no layers")
    )
    assert shared.level_of(edit) == LAYERS - 1
    assert whole.level_of(edit) == 0
    assert torch.equal(
        shared.sit(edit).first_logits(range(8)), whole.sit(edit).first_logits(range(8))
    )


def test_layers_below_the_edit_are_left_out() -> None:
    held, ran = loaded(), []
    engine = Engine(held, prompts(), max_new_tokens=NEW)
    engine.group(range(8))
    inner = held.anatomy.layers[0].get_submodule("mlp")
    handle = inner.register_forward_hook(lambda *_: ran.append(0))
    engine.sit(some_edit(held, 0, first=1)[0]).first_logits(range(8))
    assert not ran
    engine.sit(some_edit(held, 0, first=0)[0]).first_logits(range(8))
    assert ran
    handle.remove()
    assert "forward" not in held.anatomy.layers[0].__dict__


@pytest.mark.parametrize("right", [0, 1, 4])
def test_a_wrong_draft_changes_no_token(right: int) -> None:
    held = loaded(eos=None)
    engine = Engine(held, prompts(), max_new_tokens=NEW)
    (plain,) = answered(engine, [None], Drafts())
    drafts = Drafts()
    for prompt, response in plain.found.items():
        tokens = list(response.tokens)
        tokens[right] = 3 + (tokens[right] + 1 - 3) % (VOCAB - 3)
        drafts.learn([(prompt, tokens)])
    (sitting,) = answered(engine, [None], drafts)
    assert responses(sitting) == responses(plain)


def test_right_drafts_spare_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    held = loaded(eos=None)
    engine, drafts = Engine(held, prompts(), max_new_tokens=NEW), Drafts()
    (plain,) = answered(engine, [None], drafts)
    learn(drafts, plain, 0)
    monkeypatch.setattr(engine_module, "Batch", None)  # decoding would fail
    (sitting,) = answered(engine, [None], drafts)
    assert responses(sitting) == responses(plain)


def test_drafts_are_recorded_without_the_edit_in_force() -> None:
    """Recorded under one edit, the states of a draft would be wrong for another."""
    held = loaded(eos=None)
    engine, drafts = Engine(held, prompts(), max_new_tokens=NEW), Drafts()
    low, high = some_edit(held, 0, first=1)[0], some_edit(held, 1, first=LAYERS - 1)[0]
    for edit in (low, high):  # all answers are drafts before any is verified
        (sitting,) = answered(Engine(held, prompts(), max_new_tokens=NEW), [edit], Drafts())
        learn(drafts, sitting, 0)
    answered(engine, [low], drafts)
    (sitting,) = answered(engine, [high], drafts)
    plain = decode(held, prompts(), [high], max_new_tokens=NEW, rows=8)[0]
    assert [r.tokens for r in responses(sitting)] == plain.tokens


def test_the_front_of_all_prompts_is_run_once() -> None:
    engine = Engine(loaded(), prompts(), max_new_tokens=NEW)
    assert engine.front == len(FRONT)
    assert Engine(loaded(), [FRONT, FRONT], max_new_tokens=NEW).front == len(FRONT) - 1
    assert Engine(loaded(), [[3, 4, 5, 6, 7], [4, 5, 6, 7, 8]], max_new_tokens=NEW).front == 0
    assert Engine(loaded(), [FRONT], max_new_tokens=NEW).front == 0


def test_states_are_kept_for_as_many_levels_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def levels(of_free: float) -> list[int]:
        held = loaded()
        tokens = sum(map(len, prompts())) + 2 * NEW * 8
        one = tokens * held.anatomy.hidden_size * 4
        free = int(of_free * one / engine_module.MEMORY_SHARE) + 8
        monkeypatch.setattr(engine_module, "free_memory", lambda _: free)
        return Engine(held, prompts(), max_new_tokens=NEW).levels

    assert levels(LAYERS) == list(range(1, LAYERS + 1))
    assert levels(1.0) == [LAYERS]
    assert levels(0.5) == []


def test_a_partial_pass_needs_layers_in_their_own_form() -> None:
    """Falcon's layers return tuples, Llama's tensors: what stands for a layer does the same."""
    for name in ("falcon", "llama", "gptneox", "gptj"):
        held = loaded(name)
        partial = PartialPass(held.anatomy.layers)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.inference_mode():
            with partial.recorded([1, LAYERS]) as states:
                whole = held.model(ids, use_cache=False).logits
            for level in (1, LAYERS):
                with partial.beginning_at(level, states[level]):
                    assert torch.equal(held.model(ids, use_cache=False).logits, whole)
            assert torch.equal(held.model(ids, use_cache=False).logits, whole)


def test_logits_that_are_not_finite_name_the_prompt() -> None:
    held = loaded()
    held.model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(ModelError, match="logits of prompt 0 are not finite at new token 0"):
        Engine(held, prompts(), max_new_tokens=NEW).sit().first_logits(range(8))


@pytest.mark.parametrize(("rows", "new"), [(0, 5), (5, 0)])
def test_sizes_below_one_are_refused(rows: int, new: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Engine(loaded(), prompts(), max_new_tokens=new, options=EngineOptions(rows=rows))


def test_a_draft_is_the_most_frequent_answer_that_begins_so() -> None:
    drafts = Drafts()
    drafts.learn([(0, [1, 2, 3]), (0, [1, 4]), (1, [9])])
    drafts.learn([(0, [1, 4]), (1, [8])])
    assert drafts.hit_rate == 0.5
    assert drafts.match(0, [1]) == (1, 4)
    assert drafts.match(0, [1, 2]) == (1, 2, 3)
    assert drafts.match(0, [1, 4]) is None
    assert drafts.match(2, [1]) is None
    twin = drafts.copy()
    twin.learn([(2, [5, 6])])
    assert drafts.match(2, [5]) is None
    assert twin.match(2, [5]) == (5, 6)
    drafts.forget()
    assert drafts.match(0, [1]) is None


def test_drafts_rest_where_answers_are_always_new() -> None:
    held = loaded(eos=None)
    engine, drafts = Engine(held, prompts(), max_new_tokens=NEW), Drafts()
    (plain,) = answered(engine, [None], drafts)
    learn(drafts, plain, 0)
    assert drafts.pay
    drafts.learn([(prompt, [3, 4, 5]) for prompt in range(8)])
    assert not drafts.pay
    sitting = engine.sit()
    sitting.first_logits(range(8))
    assert sitting.guesses(range(8), drafts) == {}
    learn(drafts, plain, 0)
    assert sitting.guesses(range(8), drafts)


def test_a_draft_is_not_followed_beyond_an_end() -> None:
    """Text that spells an end of sequence comes back as one when it is encoded again."""
    held = loaded(eos=None)
    (free,) = answered(Engine(held, prompts(), max_new_tokens=NEW), [None], Drafts())
    held.model.generation_config.eos_token_id = sorted({free.found[p].tokens[3] for p in range(8)})
    engine, drafts = Engine(held, prompts(), max_new_tokens=NEW), Drafts()
    drafts.learn([(p, [*response.tokens, *[5] * NEW]) for p, response in free.found.items()])
    (plain,) = answered(engine, [None], Drafts())
    (sitting,) = answered(engine, [None], drafts)
    assert responses(sitting) == responses(plain)


def test_no_more_drafts_are_kept_than_memory_was_counted_for() -> None:
    held = loaded(eos=None)
    engine, edit = Engine(held, prompts(), max_new_tokens=NEW), some_edit(loaded(eos=None), 0)[0]
    for last in range(3, 12):
        drafts = Drafts()
        sitting = engine.sit(edit)
        sitting.first_logits(range(8))
        begun = {p: [sitting._begun[p][0], last] for p in range(8)}
        drafts.learn(begun.items())
        sitting.verify(range(8), drafts)
        assert len(engine._draft_states) <= 3 * 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", "gptneox"])
def test_64_random_edits(name: str) -> None:
    """Tokens of edited weights, and their KL to 1e-6 nats, with every saving on and off."""
    held, drafts = loaded(name, EVERY_FIFTH), Drafts()
    engines = {
        label: Engine(held, prompts(), max_new_tokens=NEW, options=options)
        for label, options in OPTIONS.items()
    }
    base = first_logits(held)
    for seed in range(64):
        edit, arguments = some_edit(held, seed, first=seed % LAYERS)
        baked = loaded(name, EVERY_FIFTH)
        bake(baked.anatomy, **arguments)
        kl, wanted = first_token_kl(base, first_logits(baked)), expected(name, arguments)
        for engine in engines.values():
            (sitting,) = answered(engine, [edit], drafts)
            assert responses(sitting) == wanted
            logits = engine.sit(edit).first_logits(range(8))
            found = first_token_kl(engine.sit().first_logits(range(8)), logits)
            assert (found - kl).abs().max() < 1e-6
        learn(drafts, sitting, EVERY_FIFTH[0])


def first_logits(held: LoadedModel) -> torch.Tensor:
    """Of every prompt by itself, as transformers gives them."""
    with torch.inference_mode():
        return torch.stack([held.model(torch.tensor([p])).logits[0, -1] for p in prompts()]).float()
