"""Configs of the four figures: one TOML file, a model and a table for each figure that is wanted.

As in `artifacts.specs`, every field here can change a number, so every field is part of a key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from artifacts.specs import Fraction, JudgingSpec, ModelSpec, Name, PromptSource, Seed, Spec


class HeadsSpec(Spec):
    """Safety heads: Ships, Generalized Ships and Sahara (arXiv 2410.13708)."""

    prompts: Annotated[dict[Name, PromptSource], Field(min_length=1)] = Field(
        description="harmful prompt sets on which heads are scored, a panel each"
    )
    harmless: PromptSource = Field(description="the control: the same scores on these")
    heldout: PromptSource = Field(description="harmful prompts on which refusals are counted")
    ablations: Annotated[tuple[Literal["ua", "sc"], ...], Field(min_length=1)] = ("ua", "sc")
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    rank: Annotated[int, Field(ge=1, le=64)] = Field(1, description="r of Generalized Ships")
    score: Literal["angle", "ships"] = Field("angle", description="what greedy groups maximise")
    top: Annotated[int, Field(ge=1, le=1000)] = 10
    group: Annotated[int, Field(ge=1, le=50)] = Field(5, description="heads of a greedy group")
    draws: Annotated[int, Field(ge=2, le=1000)] = Field(10, description="random groups per size")
    max_new_tokens: Annotated[int, Field(ge=1, le=1000)] = 16
    labeller: Literal["heretic-33", "iconoclast-32", "prefix-strict"] = "heretic-33"
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000

    @model_validator(mode="after")
    def _distinct(self) -> HeadsSpec:
        if "harmless" in self.prompts:
            raise ValueError("a harmful prompt set is called 'harmless'; give it another name")
        if len(set(self.ablations)) < len(self.ablations):
            raise ValueError("an ablation is listed twice")
        return self


class NormsSpec(Spec):
    """Hidden-state norms over layers and token positions (arXiv 2602.11495).

    `benign` and `jailbreak` are drawn and scored; what detects them is fitted on `fit_benign` and
    `fit_jailbreak`, which share no prompt with them.
    """

    benign: PromptSource
    jailbreak: PromptSource
    fit_benign: PromptSource
    fit_jailbreak: PromptSource
    control: PromptSource | None = Field(
        None, description="benign requests in the jailbreaks' own words: a wrapper without harm"
    )
    fit_control: PromptSource | None = Field(
        None, description="the same, for a second detector that is fitted on them as benign too"
    )
    template_column: str | None = Field(
        None, description="column of `jailbreak` that names the template of a prompt"
    )
    tokens: Annotated[int, Field(ge=2, le=512)] = Field(512, description="positions of the maps")
    least: Annotated[int, Field(ge=1)] = Field(8, description="prompts a cell needs to be drawn")
    length_bin: Annotated[int, Field(ge=1)] = Field(
        1, description="tokens within which two prompts count as equally long"
    )
    positions: Annotated[int, Field(ge=1, le=512)] = Field(
        4, description="last prompt tokens whose states are decomposed"
    )
    rank: Annotated[int, Field(ge=1, le=256)] = Field(16, description="components of the CP")
    iterations: Annotated[int, Field(ge=1, le=10_000)] = Field(60, description="of the CP, at most")
    threshold: Fraction = Field(0.5, description="jailbreak probability of a susceptible layer")
    bypass_by: Literal["factors", "factors with control"] = Field(
        "factors", description="detector whose probabilities choose the layers to bypass"
    )
    at_most: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = Field(
        (2, 512), description="layers bypassed per prompt, the most probable first; one arm each"
    )
    judging: JudgingSpec = JudgingSpec()

    @model_validator(mode="after")
    def _the_bypass_has_its_detector(self) -> NormsSpec:
        if self.bypass_by == "factors with control" and self.fit_control is None:
            raise ValueError("bypass_by 'factors with control' needs fit_control")
        return self


class ActivitySpec(Spec):
    """A direction's activity over layers and generated tokens (arXiv 2310.01405).

    The sets of questions have a column each for the question (`column` of the source), its true and
    its false answer, and perhaps for a true but unusual one and for what kind of question it is.
    """

    questions: PromptSource = Field(description="what is scored; nothing is fitted on it")
    neutral: PromptSource = Field(description="what gives every state its zero and its unit")
    pairs: PromptSource | None = Field(None, description="what the direction is fitted on")
    harmful: PromptSource | None = Field(None, description="for direction = 'refusal'")
    harmless: PromptSource | None = Field(None, description="for direction = 'refusal'")
    direction: Literal["pairs", "refusal"] = "pairs"
    recipe: Literal["pca", "mean", "probe"] = Field(
        "pca", description="how pairs become a direction; the other recipes are for comparison"
    )
    pooling: Literal["last", "mean"] = Field(
        "last", description="the state of an answer: at its last token, or mean over its tokens"
    )
    true: str = Field("true", min_length=1, description="column of the true answer")
    false: str = Field("false", min_length=1, description="column of the false answer")
    odd: str = Field("odd", description="column of a true but unusual answer; '': none")
    kind: str = Field("kind", description="column of the kind of question; '': none")
    neutral_answers: Annotated[tuple[Literal["true", "false", "odd"], ...], Field(min_length=1)] = (
        Field(("true", "false"), description="the answers of the neutral set that are pooled")
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(64, description="of the model's own answer")
    draws: Annotated[int, Field(ge=2, le=1000)] = Field(20, description="of each control direction")
    resamples: Annotated[int, Field(ge=100, le=100_000)] = Field(2000, description="bootstrap")
    example: Annotated[int, Field(ge=0)] = Field(0, description="the question drawn, from 0")

    @model_validator(mode="after")
    def _direction_has_its_sets(self) -> ActivitySpec:
        needed = ("pairs",) if self.direction == "pairs" else ("harmful", "harmless")
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"direction = '{self.direction}' needs the set '{missing[0]}'")
        if "odd" in self.neutral_answers and not self.odd:
            raise ValueError("neutral_answers has 'odd', but no column is named for it")
        return self


class DivergenceSpec(Spec):
    """Entropy and Jensen-Shannon divergence of generated answers (the definition is ours)."""

    dataset: str = Field("", max_length=64, description="in titles; default: the test file's name")
    calibration: PromptSource = Field(description="questions that lines and combination are set on")
    test: PromptSource = Field(description="questions that are plotted and scored")
    form: Literal["columns", "proofwriter"] = Field(
        "columns", description="columns: a text and a gold answer; proofwriter: theory, questions"
    )
    gold: str = Field("gold", description="column of the gold answer (form 'columns')")
    kind: str | None = Field(None, description="column of the kind of question (form 'columns')")
    occurrence: Literal["first", "last"] = Field(
        "first", description="which of true, false, unknown (yes, no) in an answer counts"
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    mode: Literal["late-vs-final", "adjacent", "all-vs-final"] = "late-vs-final"
    late: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="fraction of the layers that is late; the last one is left out"
    )
    line: Literal["lowest-entropy", "youden"] = Field(
        "lowest-entropy",
        description="horizontal line: the JS of the answer that sets the "
        "vertical one, or Youden's cut",
    )
    resamples: Annotated[int, Field(ge=1, le=100_000)] = 2000


class FigureConfig(Spec):
    """Everything that changes a figure."""

    name: Name = "figures"
    seed: Seed = 0
    model: ModelSpec
    heads: HeadsSpec | None = None
    norms: NormsSpec | None = None
    activity: ActivitySpec | None = None
    divergence: DivergenceSpec | None = None
