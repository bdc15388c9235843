"""Config and settings: what changes a result, and what cannot.

A config is one TOML file. It may extend a sibling (`extends = "base.toml"`), its preset is merged
under it, and `--set a.b=c` over it; then it is validated as a whole. Settings come from the
environment (TRIBUNAL_*) and are never part of a key.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from artifacts.errors import ConfigError
from artifacts.paths import exists
from artifacts.specs import Config
from artifacts.store import Store
from tasks.stage import Reporter, Runtime, running

Tree = dict[str, Any]
SHIPPED_ORGANISM = "organism"
LARGEST_CONFIG = 1_000_000  # bytes
DEEPEST = 32  # tables in tables; the schema needs 5
# tomllib takes time with the square of a key's dots: what is far too deep it does not get to see.
_KEY_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
_ENDLESS_KEY = re.compile(rf"(?:^|[{{,\[])[ \t]*+(?>{_KEY_PART}){{100}}", re.MULTILINE)
# prefect.yaml, deploy/as-worker and `tribunal relabel --endpoint` read them
ELSEWHERE = {"TRIBUNAL_ROOT", "TRIBUNAL_ENVIRONMENT", "TRIBUNAL_JUDGE_KEY"}
TOO_DEEP = f"it is nested deeper than {DEEPEST} tables"


def _bytes(text: Any) -> Any:
    """A size as a number of bytes: 50GB as 50,000,000,000."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kMGT]?)B?\s*", str(text), re.IGNORECASE)
    if not found:
        raise ValueError("a size is needed, as in 50GB")
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " "))


def _devices(text: Any) -> Any:
    """Names between commas, cuda:0,cuda:1 say, as a tuple."""
    names = tuple(name.strip() for name in str(text).split(","))
    if not all(names):
        raise ValueError("torch devices are needed, as in cuda:0,cuda:1")
    return names


Bytes = Annotated[int, BeforeValidator(_bytes)]
Devices = Annotated[tuple[str, ...], BeforeValidator(_devices)]


class Settings(BaseModel):
    """Where and how to run."""

    model_config = ConfigDict(frozen=True)

    store: str = Field("~/.tribunal", description="folder or URL of the artifact store")
    quota: Bytes | None = Field(None, description="what all artifacts may take, 50GB say")
    device: str | None = Field(None, description="torch device; default: the first GPU, or the CPU")
    device_map: str | None = Field(None, description="transformers device map, 'auto' say")
    rows: int = Field(512, ge=1, description="rows of a batch")
    runner: Literal["threads", "processes", "dask"] | None = Field(
        None, description="what the workers of a generation are; default: threads"
    )
    devices: Devices | None = Field(None, description="one worker on each: cuda:0,cuda:1 say")
    workers: int | None = Field(None, ge=1, le=1024, description="workers on the same device")
    dask: str | None = Field(
        None, pattern=r"^(tcp|tls|ucx)://[^\s/]+$", description="a running Dask scheduler"
    )
    log: str | None = Field(None, description="file for a line of JSON per artifact; '-': stderr")

    def open_store(self) -> Store:
        """The store, under its quota."""
        return Store(self.store, self.quota)

    @property
    def places(self) -> tuple[str | None, ...]:
        """The device of every worker of this machine; None: the first GPU, or the CPU."""
        return self.devices or (self.device,) * (self.workers or 1)

    @contextmanager
    def running(self, store: Store, reporter: Reporter) -> Iterator[Runtime]:
        """Run stages as set: on the first device, a generation's trials on all of them."""
        runtime = Runtime(store, reporter, self.places[0], self.device_map, self.rows)
        if len(self.places) == 1 and not self.dask:
            with running(runtime):
                yield runtime
            return
        from tasks.lanes.dispatch import Lanes

        kind = "dask" if self.dask else self.runner or "threads"
        lanes = Lanes(kind, self.places, dask=self.dask, device_map=self.device_map, rows=self.rows)
        with lanes as runtime.workers, running(runtime):
            yield runtime

    @classmethod
    def from_environment(cls) -> Settings:
        """Settings of the environment: TRIBUNAL_ and a field's name in capitals.

        Raises:
            ConfigError: there is no such setting, a value is not what it should be, or two
                contradict each other.
        """
        names = {f"TRIBUNAL_{name.upper()}": name for name in cls.model_fields}
        for name, value in os.environ.items():
            if name.startswith("TRIBUNAL_") and value and name not in names.keys() | ELSEWHERE:
                _refuse_misspelt(name, names)
        given = {names[n]: v for n, v in os.environ.items() if n in names and v}
        try:
            settings = cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = f"TRIBUNAL_{str(first['loc'][0]).upper()}"
            raise ConfigError(f"{name} is '{first['input']}': {_plain(first['msg'])}") from error
        settings._refuse_clashes(given)
        return settings

    def _refuse_clashes(self, given: Mapping[str, str]) -> None:
        """Refuse settings that say two things about workers.

        Raises:
            ConfigError: naming both, and which to unset.
        """
        pairs = [("device", "devices"), ("workers", "devices")]
        pairs += [("devices", "dask"), ("workers", "dask")]  # a running cluster has its own
        if self.runner in ("threads", "processes"):
            pairs += [("runner", "dask")]
        if len(self.places) > 1:
            pairs += [("device_map", "devices"), ("device_map", "workers")]
        for pair in pairs:
            if given.keys() >= set(pair):
                one, two = (f"TRIBUNAL_{name.upper()} is '{given[name]}'" for name in pair)
                raise ConfigError(f"{one} and {two}; unset one of them")


def _refuse_misspelt(name: str, known: Mapping[str, str]) -> None:
    """Refuse what is nearly a setting. Others stay: Kubernetes makes TRIBUNAL_PORT, for one."""
    endings = [other.removeprefix("TRIBUNAL_") for other in known]
    if difflib.get_close_matches(name.removeprefix("TRIBUNAL_"), endings, cutoff=0.75):
        raise ConfigError.unknown("setting", name, known)


def shipped(folder: str) -> dict[str, Path]:
    """The TOML files of flows/`folder`, by name."""
    files = sorted((Path(__file__).parent / folder).glob("*.toml"))
    return {file.name.removesuffix(".toml"): file for file in files}


def config_names() -> list[str]:
    """Shipped configs that can be run (one without a model is a base for others)."""
    trees = {name: _merged(file) for name, file in shipped("configs").items()}
    return sorted(name for name, tree in trees.items() if "model" in tree)


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a shipped name or a TOML path, with `a.b=c` overrides.

    Raises:
        ConfigError: no such config, an unknown key, a wrong type or value.
    """
    return validate(load_tree(name, "configs", config_names, overrides), name)


def load_tree(
    name: str, folder: str, names: Callable[[], Iterable[str]], overrides: Sequence[str]
) -> Tree:
    """The tree of a TOML path or of a name in flows/`folder`, with `a.b=c` overrides.

    Raises:
        ConfigError: no such file, or it cannot be read; `names` are those to suggest.
    """
    file = find_file(name, shipped(folder))
    if file is None:
        raise ConfigError.unknown("config", name, names())
    tree = _merged(file)
    for override in overrides:
        tree = merge(tree, _parse_override(override))
    return tree


def validate(tree: Tree, name: str = "config") -> Config:
    """A config from a tree of values, with its preset merged under it.

    Raises:
        ConfigError: naming the key, the value and the way out.
    """
    search = tree.get("search", {})
    preset = search.get("preset", "strict") if isinstance(search, dict) else "strict"
    presets = shipped("presets")
    if not isinstance(preset, str) or preset not in presets:
        raise ConfigError.unknown("preset", str(preset), presets)
    try:
        return Config.model_validate(merge(read_toml(presets[preset]), tree))
    except ValidationError as error:
        raise explain(error, name) from None  # pydantic's own words hold the value as it is


def validate_stored(tree: Tree, name: str) -> Config:
    """The config of a stored study; one from before there was racing was judged without it."""
    search = {"racing": False} | tree.get("search", {})
    return validate(tree | {"search": search}, name)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`over` laid on `under`, tables merged, other values replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def find_file(name: str, known: Mapping[str, Path]) -> Path | None:
    """The file of a path or of a shipped name; None if there is no such name.

    Raises:
        ConfigError: the path leads to no file.
    """
    path = Path(name)
    if path.suffix == ".toml" or exists(path):
        if not exists(path) or not path.is_file():
            raise ConfigError(f"no config file '{name}'; shipped: {', '.join(known)}")
        return path.absolute()
    return known.get(name)


def read_toml(file: Path) -> Tree:
    """The tree of a TOML file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ConfigError(f"'{file.name}' is larger than {LARGEST_CONFIG:,} bytes; split it")
        return _parsed(file.read_bytes().decode())  # a lone carriage return ends no line of TOML
    except (ValueError, OSError) as error:  # no TOML, no UTF-8, a number of too many digits
        raise ConfigError(f"cannot read '{file.name}': {error}") from error


def _parsed(text: str) -> Tree:
    """TOML as a tree of at most DEEPEST tables.

    Raises:
        ValueError: it is none.
    """
    if _ENDLESS_KEY.search(text):
        raise ValueError(TOO_DEEP)
    try:
        tree = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    level: list[Any] = [tree]
    for _ in range(DEEPEST):
        level = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [value for value in level if isinstance(value, (dict, list))]
    if level:
        raise ValueError(TOO_DEEP)
    return tree


def _merged(file: Path, above: tuple[Path, ...] = ()) -> Tree:
    """A config file with what it extends merged under it, its local paths made absolute."""
    tree = read_toml(file)
    base = tree.pop("extends", None)
    tree = _anchored(tree, file.parent)
    if base is None:
        return tree
    sibling = file.parent / str(base)
    if not exists(sibling) or not sibling.is_file():
        raise ConfigError(f"'{file.name}' extends '{base}', which is not beside it")
    chain = (*above, file.resolve())
    if sibling.resolve() in chain:
        raise ConfigError(f"'{file.name}' extends '{base}', which extends it; cut the circle")
    return merge(_merged(sibling, chain), tree)


def _anchored(tree: Tree, folder: Path) -> Tree:
    """Sources and model folders that lie beside the config file, as absolute paths."""
    return {
        key: _anchored(value, folder)
        if isinstance(value, dict)
        else str(folder / value)
        if _is_place(key, value) and exists(folder / value)
        else value
        for key, value in tree.items()
    }


def _is_place(key: str, value: Any) -> bool:
    """Whether a value may name a file or folder; the shipped organism's names never do."""
    return (
        key in ("source", "id")
        and isinstance(value, str)
        and value.split("/")[0] != SHIPPED_ORGANISM
    )


def _parse_override(text: str) -> Tree:
    """`a.b=c` as a tree; c is TOML if it parses, else a string."""
    path, separator, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not separator or not all(keys):
        raise ConfigError(f"--set takes KEY=VALUE, as in search.trials=96, not '{text}'")
    if any("\ud800" <= char <= "\udfff" for char in text):  # from bytes that are no UTF-8
        raise ConfigError(f"--set: '{text}' is no Unicode text; write it in UTF-8")
    if len(keys) > DEEPEST:
        raise ConfigError(f"--set: '{path}' is nested deeper than {DEEPEST} tables")
    try:
        tree = _parsed(f"value = {value}")
    except ValueError:
        tree = {}
    parsed: Any = tree["value"] if len(tree) == 1 else value  # more lines are text, not more keys
    for key in reversed(keys):
        parsed = {key: parsed}
    return dict(parsed)


def explain(error: ValidationError, name: str, schema: type[BaseModel] = Config) -> ConfigError:
    """The first fault of a config (or of what else has this schema), in one line."""
    faults = error.errors()
    # A misspelt key is also a missing one; its name says more.
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = [".".join([*path[:-1], field]) for field in _fields_at(path[:-1], schema)]
        return ConfigError.unknown("config key", dotted, known)
    if first["type"] == "missing":
        return ConfigError(f"{name}: '{dotted}' is missing; give it in the file or with --set")
    wrong = "a table is needed" if first["type"] == "model_type" else _plain(first["msg"])
    return ConfigError(f"{name}: {dotted} is '{_shown(first['input'])}': {wrong}")


def _shown(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python writes
        return hex(value)


def _plain(message: str) -> str:
    """pydantic's words without its prefix."""
    words = message.removeprefix("Value error, ")
    return words[:1].lower() + words[1:]


def _fields_at(path: Sequence[str], schema: type[BaseModel]) -> Iterator[str]:
    """Names of the fields at a path of the schema."""
    model: Any = schema
    for part in path:
        field = model.model_fields.get(part)  # None: the name of an entry of a mapping
        annotation = field.annotation if field else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        models = (o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
        model = next(models, model)
    yield from model.model_fields
