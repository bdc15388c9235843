"""A config.toml of HERETIC or ICONOCLAST written as a config here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from artifacts.errors import ConfigError, PeerError
from artifacts.paths import exists
from flows.settings import config_names, load_config, load_tree, read_toml
from tasks.peers.configs import Mapped, map_config

HELD_OUT = "seed-004"  # shipped; its selection and test splits are rows that no tool's default uses
Tree = Mapping[str, Any]


def convert(
    source: Path, out: Path | None, held_out: str | None, force: bool
) -> tuple[Mapped, Path]:
    """Write the config that runs the protocol of a tool's config.toml; what, and where.

    Args:
        source: the tool's file.
        out: the new one; None: beside the tool's file, by the model's name.
        held_out: a config, shipped or a file, whose selection and test splits are taken.
        force: whether an existing file may be replaced.

    Raises:
        PeerError: it is no config of a tool, or held-out rows are rows that the tool uses.
        ConfigError: the file cannot be read or written, is there already, or is not valid here.
    """
    if not exists(source) or not source.is_file():
        raise PeerError(f"no file '{source}'")
    settings = read_toml(source)
    prompts = _held_out(held_out)

    def place(text: str) -> str:
        return _place(text, source.parent, (out or source).parent)

    mapped = map_config(settings, source.name, prompts, move=held_out is None, place=place)
    target = out or source.with_name(f"{mapped.tree['name']}.toml")
    if exists(target) and not force:
        raise ConfigError(f"'{target}' is there already; choose another with -o, or --force")
    text = "\n".join(_lines(mapped, source.name, held_out or HELD_OUT)) + "\n"
    _write(text, target)
    return mapped, target


def _held_out(name: str | None) -> dict[str, dict[str, Any]]:
    """Selection and test sources, by class.

    Raises:
        ConfigError: no such config, or it lacks one.
    """
    tree = load_tree(name or HELD_OUT, "configs", config_names, ())
    try:
        return {
            group: {split: tree["prompts"][group][split] for split in ("selection", "test")}
            for group in ("harmful", "harmless")
        }
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"'{name}' lacks prompts of selection or test splits; --held-out takes a whole config"
        ) from error


def _place(text: str, here: Path, there: Path) -> str:
    """A path beside the tool's config, or of the working directory, seen from the new file.

    What names nothing on this disk (a hub id, say) stays as it is.
    """
    for folder in (here, Path()):
        path = folder / text
        if text and exists(path):
            full = path.resolve()
            beside = full.is_relative_to(there.resolve())
            return str(full.relative_to(there.resolve()) if beside else full)
    return text


def _write(text: str, target: Path) -> None:
    """Put a file in its place, whole, once it is seen to be a valid config.

    Raises:
        ConfigError: it is not, or cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        number, draft = tempfile.mkstemp(".toml", ".", target.parent)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write '{target}': {error.strerror}") from error
    try:
        load_config(draft)
        os.chmod(draft, 0o644)
        Path(draft).replace(target)
    except ConfigError as error:
        told = str(error).replace(draft, target.name).replace(Path(draft).name, target.name)
        raise ConfigError(f"the config cannot be mapped as it is: {told}") from error
    finally:
        Path(draft).unlink(missing_ok=True)


def _lines(mapped: Mapped, name: str, held_out: str) -> Iterator[str]:
    """The file, with what became of the tool's keys as comments."""
    yield f"# The protocol of '{_comment(name)}' ({mapped.tool}), written by tribunal import."
    yield f"# Selection and test prompts are those of {_comment(held_out)}."
    for note in mapped.notes:
        yield f"# {_comment(note)}"
    for title, keys in (("Not mapped", mapped.unmapped), ("No meaning here", mapped.meaningless)):
        if keys:
            yield f"# {title}:"
            yield from (f"#   {_comment(key)}: {_comment(why)}" for key, why in keys.items())
    tree = mapped.tree
    yield ""
    yield from (f"{key} = {_value(tree[key])}" for key in ("name", "seed"))
    for section in ("model", "search", "directions", "edit", "judging"):
        yield f"\n[{section}]"
        yield from (f"{key} = {_value(value)}" for key, value in tree[section].items())
    for group, splits in tree["prompts"].items():
        yield f"\n[prompts.{group}]"
        yield from (f"{split} = {_value(source)}" for split, source in splits.items())


def _comment(text: str) -> str:
    """A text as part of a comment: one line, nothing that ends it."""
    return "".join(char if char.isprintable() else " " for char in text)


def _value(value: Any) -> str:
    """A value as TOML, whose strings and numbers are nearly JSON's."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
