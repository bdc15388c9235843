"""Benchmarks: what they read off a console, what they compute from it, and that they run at all."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_trials
import heretic_agreement
import heretic_side
import mid_model
import peak
import trials
import tribunal_side
from heretic_side import HereticError, Job, Line, Seen

from artifacts.store import Store
from flows.settings import load_config
from tasks.organism import MODEL_FOLDER

SEARCH = """\
0.0 * Counting model refusals...
1.0 * Initial refusals: 8/8
2.0 Running trial 1 of 2...
2.5   * KL divergence: 0.0150
3.0   * Refusals: 5/8
3.1 Elapsed time: 1s
4.0 Running trial 2 of 2...
4.5   * KL divergence: 0.0009
7.0   * Refusals: 0/8
7.5 Optimization finished!
7.5 Which trial do you want to use?
7.6 [1] [Trial   2] Refusals:  0/8, KL divergence: 0.0009
7.6 [2] Run additional trials
7.6 [3] Exit program
7.6 Enter number:"""


def lines(text: str) -> list[Line]:
    pairs = (row.split(" ", 1) for row in text.splitlines())
    return [Line(float(at), said) for at, said in pairs]


def job(folder: Path) -> Job:
    return Job(
        MODEL_FOLDER, folder / "prompts", "float32", 12, "You answer questions about crafts."
    )


def test_a_trial_lasts_until_the_next_one_starts_or_the_search_ends() -> None:
    assert heretic_side.trials_of(lines(SEARCH)) == [
        Seen(1, 2.0, 5, 0.0150),
        Seen(2, 3.5, 0, 0.0009),
    ]


def test_an_unfinished_trial_is_none() -> None:
    begun = lines("\n".join(SEARCH.splitlines()[:8]))
    assert heretic_side.trials_of(begun) == [Seen(1, 2.0, 5, 0.0150)]


def test_a_lengthened_search_counts_on() -> None:
    later = SEARCH.replace("trial 1 of 2", "trial 3 of 4").replace("trial 2 of 2", "trial 4 of 4")
    both = lines(SEARCH) + [Line(line.at + 100, line.text) for line in lines(later)]
    found = heretic_side.trials_of(both)
    assert [(trial.number, trial.seconds) for trial in found] == [
        (1, 2.0),
        (2, 3.5),
        (3, 2.0),
        (4, 3.5),
    ]


def test_menus_are_answered_by_number() -> None:
    assert heretic_side.choice(lines(SEARCH), "Run additional trials") == "2"
    with pytest.raises(HereticError, match="no 'Upload'"):
        heretic_side.choice(lines(SEARCH), "Upload")


def test_an_evaluation_is_told_last() -> None:
    told = "0.0 * Initial refusals: 8/8\n1.0   * KL divergence: 0.0123\n2.0   * Refusals: 3/8"
    assert heretic_side.evaluation_of(lines(told)) == Seen(0, 2.0, 3, 0.0123)


def test_a_console_without_numbers_is_an_error_that_shows_it() -> None:
    with pytest.raises(HereticError, match="Failed to load"):
        heretic_side.evaluation_of(lines("0.0 Failed to load model"))


def test_lines_are_read_as_they_come_and_questions_without_a_line_end() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"one\nha")
    with os.fdopen(reader, "rb") as stream:
        found = heretic_side.read_lines(stream)
        assert next(found).text == "one"
        os.write(writer, b"lf\nEnter number: ")
        assert [next(found).text, next(found).text] == ["half", "Enter number: "]
        os.write(writer, b"\nafter\n")
        os.close(writer)
        assert [line.text for line in found] == ["", "after"]


def test_both_tools_are_told_the_same(tmp_path: Path) -> None:
    told = tomllib.loads(heretic_side.config(job(tmp_path), 7, offload=False))
    file = tmp_path / "ours.toml"
    file.write_text(tribunal_side.config(job(tmp_path)))
    ours = load_config(str(file), ["search.trials=7"])
    assert told["model"] == ours.model.id
    assert tuple(told["dtypes"]) == ours.model.dtype
    assert told["system_prompt"] == ours.model.system_prompt
    assert told["response_prefix"] == ours.model.response_prefix == ""
    assert told["max_response_length"] == ours.judging.max_new_tokens
    assert told["n_trials"] == ours.search.trials
    assert told["seed"] == ours.seed
    assert not told["offload_outputs_to_cpu"]
    for table, source in (
        ("bad_prompts", ours.prompts.harmful.direction),
        ("good_prompts", ours.prompts.harmless.direction),
        ("bad_evaluation_prompts", ours.prompts.harmful.search),
        ("good_evaluation_prompts", ours.prompts.harmless.search),
    ):
        assert told[table]["dataset"] == source.source
    assert ours.prompts.borderline is None
    assert ours.search.generation == 1


def test_an_evaluation_names_the_model_and_the_split(tmp_path: Path) -> None:
    asked = replace(job(tmp_path), split="test")
    told = tomllib.loads(heretic_side.config(asked, 1, offload=True, evaluate=tmp_path))
    assert told["evaluate_model"] == str(tmp_path)
    assert told["bad_evaluation_prompts"]["dataset"].endswith("harmful-test.txt")


def test_a_missing_environment_has_no_heretic(tmp_path: Path) -> None:
    assert not heretic_side.installed(tmp_path)


class Fixed:
    """A tool whose trials take what it is told."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def finals(self) -> float:
        return 6.0 if self.name == "fast" else 0.0

    def trials(self, count: int) -> Sequence[Seen]:
        self.log.append(self.name)
        return [Seen(n, 1000.0 if n == 0 else self.seconds, 0, 0.0) for n in range(count)]


def test_tools_take_turns_and_the_first_trial_of_a_round_does_not_count() -> None:
    log: list[str] = []
    tools: dict[str, Any] = {"slow": Fixed("slow", 6.0, log), "fast": Fixed("fast", 2.0, log)}
    turns = trials.take_turns("organism", tools, 2, 3)
    assert log == ["slow", "fast", "fast", "slow"]
    assert trials.ratios(turns, "slow", "fast") == [2.0, 2.0]
    told = trials.told(turns, "fast")
    assert (told["trials"], told["s_per_trial"]) == (4, 3.0), "six seconds of finals for six trials"


def test_prompts_are_one_to_a_line(tmp_path: Path) -> None:
    asked = job(tmp_path)
    trials.write_prompts(asked.prompts)
    for name in tribunal_side.CLASSES:
        rows = (asked.prompts / f"{name}-search.txt").read_text().splitlines()
        assert [r.strip() for r in rows] == [
            r["text"] for r in trials.card.prompts(f"{name}-search")
        ]


@pytest.mark.parametrize(
    ("theirs", "verdict"), [((3, 0.02), True), ((4, 0.02), False), ((3, 0.0203), False)]
)
def test_agreement_is_of_refusals_and_of_kl(theirs: tuple[int, float], verdict: bool) -> None:
    assert heretic_agreement.agrees(3, 0.02, *theirs) is verdict


def test_a_small_kl_agrees_as_far_as_four_decimals_tell() -> None:
    assert heretic_agreement.agrees(0, 0.00234, 0, 0.0023)
    assert not heretic_agreement.agrees(0, 0.00234, 0, 0.0024)


def test_the_floor_of_a_trial_counts_every_token_once() -> None:
    layers, head = peak.matmul_weights(MODEL_FOLDER)
    assert (layers, head) == (8 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384), 1024 * 128)
    assert peak.trial_flops((10, 3), prompt_tokens=7, produced=5, responses=2) == 2 * (10 * 10 + 15)


def test_the_peak_is_some_work_per_second() -> None:
    assert peak.matmul_peak("float32", size=64, seconds=0.01) > 1e6


def test_a_grown_model_says_the_same_and_its_copies_differ() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    small = LlamaForCausalLM(config).eval()
    large = mid_model.grown(small, seed=1)
    ids = torch.randint(0, 50, (3, 11))
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, large(ids).logits, atol=1e-5)
    assert large.config.hidden_size == mid_model.WIDTH * 16
    read = large.model.layers[0].mlp.up_proj.weight.unflatten(1, (mid_model.WIDTH, 16))
    assert not torch.allclose(read[:, 0], read[:, 1])


def options(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_trials.py", *arguments])


def test_without_a_gpu_the_gpu_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options("--out", str(tmp_path / "found.json"), monkeypatch=monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_trials.main()
    assert "no GPU" in json.loads(capsys.readouterr().out)["skipped"]
    assert "no GPU" in json.loads((tmp_path / "found.json").read_text())["skipped"]


TINY = ("--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--new-tokens", "4")


def test_the_gpu_benchmark_runs_in_a_tiny_shape_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options(*TINY, "--rounds", "1", "--trials", "2", monkeypatch=monkeypatch)
    gpu_trials.main()
    (model,) = json.loads(capsys.readouterr().out)["models"]
    (theirs,) = model["heretic"]
    assert model["ratio"] > 0
    assert len(model["tribunal"]) == len(gpu_trials.VARIANTS)
    for ours in model["tribunal"]:
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.2)
        assert min(ours["kl"]) > 0
        assert ours["tokens_per_s"] > 0


@pytest.mark.parametrize("adapters", ["hooks", "peft"])
def test_rank_3_adapters_do_nearly_what_the_exact_edit_does(
    adapters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapters == "peft":
        pytest.importorskip("peft")
    monkeypatch.setattr(gpu_trials, "find_spec", lambda _: adapters == "peft" or None)
    options(*TINY, "--rounds", "1", "--trials", "2", monkeypatch=monkeypatch)
    told = gpu_trials.parse_options()
    bench = gpu_trials.open_bench(told)
    ours, theirs = gpu_trials.tribunal(bench, 8, True), gpu_trials.peer(bench)
    trials = gpu_trials.trials(bench, told)
    for exact, near in zip(ours(trials), theirs(trials), strict=True):
        assert near.kl == pytest.approx(exact.kl, rel=0.2)
    nothing = replace(trials[0], weights={name: [0.0] * 4 for name in trials[0].weights})
    for judge in (ours, theirs):
        assert judge([nothing])[0].kl == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_our_half_runs_and_goes_on(tmp_path: Path) -> None:
    asked = job(tmp_path)
    trials.write_prompts(asked.prompts)
    with tribunal_side.Session(tmp_path / "ours", asked, trials.VARIANTS[0]) as session:
        first, second = session.trials(2), session.trials(1)
        assert session.finals() > 0
    assert [trial.number for trial in [*first, *second]] == [0, 1, 2]
    assert first[0].seconds is None
    assert (first[1].seconds or 0) > 0
    assert first[0].harmful_tokens > 0
    assert len(list(Store(tmp_path / "ours" / "store").manifests("generations"))) == 3


@pytest.mark.slow
@pytest.mark.skipif(
    not heretic_side.installed(trials.ENVIRONMENT),
    reason=f"HERETIC is not installed in {trials.ENVIRONMENT}: benchmarks/trials.py installs it",
)
def test_heretic_runs_goes_on_and_evaluates(tmp_path: Path) -> None:
    asked = job(tmp_path)
    trials.write_prompts(asked.prompts)
    with heretic_side.Session(trials.ENVIRONMENT, tmp_path / "one", asked, offload=False) as search:
        found = [*search.trials(2), *search.trials(1)]
    assert [trial.number for trial in found] == [1, 2, 3]
    assert all(trial.seconds > 0 and 0 <= trial.refusals <= 128 for trial in found)
    with heretic_side.Session(trials.ENVIRONMENT, tmp_path / "two", asked) as evaluation:
        same = evaluation.evaluate(MODEL_FOLDER)
    assert same.kl == 0
    assert same.refusals >= 126
