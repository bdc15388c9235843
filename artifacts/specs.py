"""The parts of a config that identify artifacts, as frozen pydantic models.

Every field here can change a number, so every field is part of some artifact's key. What cannot
change a number (store, device, batch rows, log level) is in `flows.settings.Settings`.
Defaults of None in `directions`, `edit` and `search` mean "as the preset says"; presets are TOML
fragments in flows/presets, merged under the config before it is validated.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from artifacts.schemas import COMPONENTS as COMPONENTS

CLASSES = ("harmful", "harmless", "borderline")
SPLITS = ("direction", "search", "selection", "test")

Scope = Literal["global", "per layer"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["mean", "median", "variance", "hybrid"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=64)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _rising(values: Range) -> Range:
    if values[0] > values[1]:
        raise ValueError("a range runs from low to high")
    return values


def _fractions(values: Range) -> Range:
    if not 0 <= values[0] <= values[1] <= 1:
        raise ValueError("a range of fractions lies between 0 and 1 and runs from low to high")
    return values


def _without_credentials(value: str) -> str:
    if re.search("://[^/]*@", value):
        raise ValueError("a config holds no credentials; give them in the environment")
    return value


Address = Annotated[str, AfterValidator(_without_credentials)]
Rising = Annotated[Range, AfterValidator(_rising)]
Fractions = Annotated[Range, AfterValidator(_fractions)]


class Spec(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _empty_means_preset(schema: dict[str, Any]) -> None:
    """What a preset decides is optional in a form and starts empty: so a form overrides nothing.

    The form is the one that Prefect's UI makes from the JSON schema. It sends every default back,
    and a switch as off if nobody touched it, unless it may be null, which means left out.
    """
    schema.pop("required", None)
    for name, entry in schema["properties"].items():
        if entry.get("type") == "boolean":
            entry.pop("type")
            entry |= {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None}
        elif name != "preset":
            entry.pop("default", None)


def _sections_mean_preset(schema: dict[str, Any]) -> None:
    """The same for the config's tables that a preset fills."""
    schema["required"].remove("search")
    for name in ("directions", "edit", "search", "judging"):
        schema["properties"][name].pop("default", None)


class PresetSpec(Spec):
    """A table that the preset fills where a config does not."""

    model_config = ConfigDict(json_schema_extra=_empty_means_preset)


class PromptSource(Spec):
    """Where one prompt set comes from and how its rows become prompts."""

    source: Address = Field(description="hub id, folder, or .parquet/.csv/.jsonl/.txt file")
    revision: str | None = Field(None, description="hub revision; pin a commit to be reproducible")
    config: str | None = Field(None, description="hub data set configuration")
    split: str = Field("train", description="split and slice, as in 'train[:400]'")
    column: str | None = Field(None, description="text column; default: the only or 'text' one")
    prefix: str = ""
    suffix: str = ""
    system_prompt: str | None = Field(None, description="overrides model.system_prompt")


class ClassSplits(Spec):
    """The four disjoint splits of one class of prompts."""

    direction: PromptSource
    search: PromptSource
    selection: PromptSource
    test: PromptSource


class BorderlineSplits(Spec):
    """Borderline-safe prompts are only ever judged, so they have no direction split."""

    search: PromptSource
    selection: PromptSource
    test: PromptSource


class PromptsSpec(Spec):
    """All prompt sets of a run."""

    harmful: ClassSplits
    harmless: ClassSplits
    borderline: BorderlineSplits | None = None


class ModelSpec(Spec):
    """Which model, in which precision, addressed how."""

    id: Address = Field(min_length=1, description="'organism', a hub id, or a local folder")
    revision: str | None = None
    dtype: Annotated[tuple[Dtype, ...], Field(min_length=1)] = ("auto", "bfloat16", "float32")
    quantization: Literal["none", "bnb-4bit"] = "none"
    trust_remote_code: bool = False
    system_prompt: str | None = None
    response_prefix: str | None = Field(None, description="None: detected; '': none")


class DirectionSpec(PresetSpec):
    """How residuals become directions."""

    winsorization: Annotated[float, Field(gt=0, le=1)] = 1.0
    benign_subspace_rank: Annotated[int, Field(ge=0)] = 0
    benign_subspace_strength: Fraction = 1.0
    orthogonalize: bool = True
    projection: Literal["joint", "iconoclast"] = "joint"


class EditSpec(PresetSpec):
    """How a direction becomes an edit of a module."""

    row_normalization: Literal["none", "pre", "full"] = "none"
    frame: Literal["module", "residual"] = "residual"


class KernelSpace(PresetSpec):
    """Ranges of one component's weight kernel."""

    max_weight: Rising
    max_weight_position: Fractions = Field(description="as fractions of the last layer's index")
    min_weight: Fractions = Field((0.0, 1.0), description="as fractions of max_weight")
    min_weight_distance: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (
        Field(description="(layers, fraction of the last layer's index)")
    )


class SearchSpace(PresetSpec):
    """Ranges of everything a trial samples."""

    direction_scope: Annotated[tuple[Scope, ...], Field(min_length=1)] = ("global", "per layer")
    direction_index: Fractions = Field(description="as fractions of the last layer's index")
    direction_method: Annotated[tuple[Method, ...], Field(min_length=1)] = ("mean",)
    direction_blend: Fractions = (0.0, 1.0)
    per_component_direction: bool = False
    attn_o_proj: KernelSpace
    mlp_down_proj: KernelSpace


class SearchSpec(PresetSpec):
    """The search. `trials` says how far the chain goes and is not part of a study's identity."""

    preset: str = Field("strict", description="gives every field of the search that is left out")
    trials: Annotated[int, Field(ge=1, le=100_000)] = 48
    startup: Annotated[int, Field(ge=0)] = 16
    generation: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="trials asked at once")
    sampler: Literal["gp", "tpe", "random"] = Field(
        "tpe", description="gp: a Gaussian process over what edits do; tpe: Optuna's"
    )
    objective: Literal["strict", "heretic", "iconoclast"] = "strict"
    warm_start: Literal["none", "sweep"] = "none"
    ei_candidates: Annotated[int, Field(ge=1)] = 128
    best_group: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="trials that the sampler looks at most closely; None: Optuna's default for the "
        "objective",
    )
    racing: bool = Field(
        True, description="stop a trial once the sampler needs to know no more of it"
    )
    finalists: Annotated[int, Field(ge=1)] = Field(
        8, description="first places that the finals make exact; at least selection.candidates"
    )
    target_kl: Annotated[float, Field(ge=0)] = 0.01
    objective_weights: tuple[float, float, float] = Field(
        (0.32, 0.18, 0.42), description="iconoclast's overrefusals, disclaimers, non-compliance"
    )
    space: SearchSpace

    @model_validator(mode="after")
    def _a_model_knows_the_strict_order(self) -> SearchSpec:
        if self.sampler == "gp" and self.objective != "strict":
            raise ValueError(
                f"sampler 'gp' foresees the strict order, not objective '{self.objective}'; "
                "set search.objective='strict', or search.sampler='tpe'"
            )
        return self


class JudgingSpec(PresetSpec):
    """How a response is produced and labelled."""

    labeller: Literal["heretic-33", "iconoclast-32", "prefix-strict"] = "heretic-33"
    max_new_tokens: Annotated[int, Field(ge=1)] = 64


class GatesSpec(Spec):
    """What a trial must satisfy to be ranked before the gated ones."""

    max_kl: Annotated[float, Field(ge=0)] = 0.5
    max_degenerate: Fraction = 0.05
    max_length_ratio: Annotated[float, Field(ge=1)] = Field(
        3.0, description="mean harmless response length against the unedited model's, either way"
    )


class SelectionSpec(Spec):
    """How the winner is chosen and what is tested beside it."""

    candidates: Annotated[int, Field(ge=1)] = Field(8, description="best trials by search")
    controls: tuple[Literal["identity", "random-direction", "over-edit"], ...] = (
        "identity",
        "random-direction",
    )


class ParameterSet(Spec):
    """The parameters of one trial, by the names that `tribunal show --format json` prints.

    What is left out of a component's own direction is as shared.
    """

    direction_scope: Scope
    direction_index: Annotated[float, Field(ge=0)] = Field(
        description="layer whose output gives the global direction, interpolated"
    )
    direction_method: Method = "mean"
    direction_blend: Fraction = 0.0
    attn_o_proj_max_weight: Annotated[float, Field(ge=0)]
    attn_o_proj_max_weight_position: Annotated[float, Field(ge=0)] = Field(description="a layer")
    attn_o_proj_min_weight: Fraction = Field(description="as a fraction of max_weight")
    attn_o_proj_min_weight_distance: Annotated[float, Field(ge=0)] = Field(description="layers")
    attn_o_proj_direction_scope: Scope | None = None
    attn_o_proj_direction_method: Method | None = None
    attn_o_proj_direction_blend: Fraction | None = None
    mlp_down_proj_max_weight: Annotated[float, Field(ge=0)]
    mlp_down_proj_max_weight_position: Annotated[float, Field(ge=0)] = Field(description="a layer")
    mlp_down_proj_min_weight: Fraction = Field(description="as a fraction of max_weight")
    mlp_down_proj_min_weight_distance: Annotated[float, Field(ge=0)] = Field(description="layers")
    mlp_down_proj_direction_scope: Scope | None = None
    mlp_down_proj_direction_method: Method | None = None
    mlp_down_proj_direction_blend: Fraction | None = None


class ExplicitSpec(Spec):
    """One trial that is given instead of searched for, under the name of its arm."""

    name: Name
    parameters: ParameterSet


class Config(Spec):
    """Everything that changes a result. One TOML file; every field but the model has a default."""

    model_config = ConfigDict(json_schema_extra=_sections_mean_preset)

    name: Name = "study"
    seed: Seed = 0
    model: ModelSpec
    prompts: PromptsSpec
    directions: DirectionSpec = DirectionSpec()
    edit: EditSpec = EditSpec()
    search: SearchSpec
    judging: JudgingSpec = JudgingSpec()
    gates: GatesSpec = GatesSpec()
    selection: SelectionSpec = SelectionSpec()
    explicit: ExplicitSpec | None = Field(None, description="a trial to judge without a search")

    @property
    def arm(self) -> str:
        """What proposes the trials: the preset, or the name of the explicit set."""
        return self.explicit.name if self.explicit else self.search.preset

    @model_validator(mode="after")
    def _finalists_are_judged(self) -> Config:
        """Whoever may be selected has to be heard in the finals."""
        search, candidates = self.search, self.selection.candidates
        if search.racing and candidates > search.finalists:
            raise ValueError(
                f"selection.candidates {candidates} is more than search.finalists "
                f"{search.finalists}, the places that the finals make exact; set "
                f"search.finalists={candidates}, or search.racing=false"
            )
        return self
