"""Configs of figures: a shipped name or a TOML file, validated as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ValidationError

from artifacts.errors import ConfigError
from artifacts.figure_specs import FigureConfig
from artifacts.specs import PromptSource
from flows.settings import explain, load_tree, shipped

FOLDER = "figure_configs"


def load_figure_config(name: str, figure: str, overrides: Sequence[str] = ()) -> FigureConfig:
    """The config of a shipped name or a TOML path, with `a.b=c` overrides.

    Raises:
        ConfigError: no such config, an unknown key, a wrong type or value, or no table for
            `figure`.
    """
    tree = load_tree(name, FOLDER, lambda: shipped(FOLDER), overrides)
    try:
        config = FigureConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error, name, FigureConfig) from None
    if getattr(config, figure) is None:
        raise ConfigError(f"{name} has no table [{figure}]; add one, or use a shipped config")
    return config


def sources(spec: BaseModel) -> Iterator[PromptSource]:
    """Every prompt set that a table of a config names."""
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        for each in value.values() if isinstance(value, dict) else (value,):
            if isinstance(each, PromptSource):
                yield each
            elif isinstance(each, BaseModel):
                yield from sources(each)
