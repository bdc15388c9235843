"""Bad configs and prompt files: one line naming the fault, exit code 2, no wait, nothing written.

The kept corpus lies in tests/fuzz, one case per line. A text there is a string, bytes in base64, or
a list [text, unit, times, text, ...] for long ones. The rest is derived from the config's schema or
drawn by hypothesis. A case is bad by construction; the valid twins of a few are run as well.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import string
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest.mock import patch

import pytest
from pydantic import BaseModel

from artifacts.specs import Config
from flows.cli import main

HERE = Path(__file__).parent / "fuzz"
SECONDS = 10  # a case that takes longer hangs
SOURCES = [
    f"{group}-{split}"
    for group in ("harmful", "harmless")
    for split in ("direction", "search", "selection", "test")
]
COMMANDS = (("run",), ("plan",), ("why", "prompts"))


def corpus(name: str) -> list[Any]:
    lines = (HERE / f"{name}.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    return [pytest.param(case, id=f"{number}-{label(case)}") for number, case in enumerate(cases)]


def label(case: dict[str, Any]) -> str:
    text = str(case.get("name") or case.get("set") or case.get("split") or case.get("file"))
    return "".join(char for char in text if char in string.ascii_letters + string.digits)[:24]


def unpacked(text: str | list[Any]) -> str:
    """A text of the corpus: plain, or with repetitions."""
    if isinstance(text, str):
        return text
    parts = iter(text)
    return "".join(
        before + unit * times
        for before, unit, times in zip(parts, [*parts, ""], strict=False)  # replaced below
    )


def content(case: dict[str, Any]) -> bytes:
    if "base64" in case:
        return base64.b64decode(case["base64"])
    return unpacked(case["text"]).encode("utf-8", "surrogatepass")


class Place:
    """A folder with a valid config and its prompts, in which bad things are tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in SOURCES:
            (folder / f"{name}.txt").write_text(f"Brew {name} one\nBrew {name} two\n")
        self.config = self.write("good.toml", self.text())
        self.write("broken.toml", "name =")
        self.write("circle.toml", 'extends = "bad.toml"\n')

    def text(self, **sources: str) -> str:
        """The valid config; `sources` replaces lines of prompt sources."""
        lines = ["[model]", 'id = "organism"']
        for group in ("harmful", "harmless"):
            lines.append(f"[prompts.{group}]")
            for name in (name for name in SOURCES if name.startswith(f"{group}-")):
                place = sources.get(name.replace("-", "_"), f'{{ source = "{name}.txt" }}')
                lines.append(f"{name.removeprefix(group + '-')} = {place}")
        return "\n".join(lines) + "\n"

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return path

    def with_source(self, path: Path, **fields: str) -> Path:
        """A config whose last test split is at `path`: what is before it is good."""
        inline = {"source": str(path), **fields}
        table = ", ".join(f"{name} = {toml(value)}" for name, value in inline.items())
        return self.write("bad.toml", self.text(harmless_test=f"{{ {table} }}"))

    def listing(self) -> list[str]:
        return sorted(str(path) for path in self.folder.parent.rglob("*"))


def toml(value: str) -> str:
    """A string as TOML's basic string."""
    return (
        json.dumps(value).replace("\\ud", "\\uD")
        if value.isascii()
        else json.dumps(value, ensure_ascii=False)
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fuzz") / "place"
    folder.mkdir()
    before = os.getcwd()
    os.chdir(folder)
    yield Place(folder)
    os.chdir(before)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tribunal(place: Place, *arguments: str) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of the command line, run in this process."""
    out, error = io.StringIO(), io.StringIO()
    environment = {"TRIBUNAL_STORE": str(place.folder.parent / "store"), "HF_HUB_OFFLINE": "1"}
    with (
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", ["tribunal", *arguments]),
        redirect_stdout(out),
        redirect_stderr(error),
        at_most(SECONDS),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return ended.value.code, out.getvalue(), error.getvalue()


def assert_refused(place: Place, says: str, *arguments: str) -> None:
    before = place.listing()
    code, out, error = tribunal(place, *arguments)
    assert (code, out) == (2, ""), (code, out, error)
    assert error.startswith("tribunal: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert says in error, error
    assert len(error) < 1200
    assert place.listing() == before


# The twin: what is good passes, and the harness sees what is written


def test_the_valid_config_passes(shared: Place) -> None:
    for command in ("plan", "why"):
        kind = ("prompts",) if command == "why" else ()
        assert tribunal(shared, command, *kind, str(shared.config))[0] == 0


def test_every_case_is_there() -> None:
    kept = sum(len(corpus(name)) for name in ("configs", "prompts", "overrides"))
    assert kept + len(WRONG_TYPES) >= 500


# Configs


@pytest.mark.parametrize("case", corpus("configs"))
def test_bad_config_files(shared: Place, case: dict[str, Any]) -> None:
    base = shared.text().encode() if case["base"] else b""
    path = shared.write("bad.toml", content(case) + base)
    command = COMMANDS[len(case["name"]) % len(COMMANDS)]
    assert_refused(shared, case["says"], *command, str(path))


@pytest.mark.parametrize("case", corpus("overrides"))
def test_bad_overrides(shared: Place, case: dict[str, Any]) -> None:
    command = COMMANDS[len(case["says"]) % len(COMMANDS)]
    changed = f"--set={unpacked(case['set'])}"
    assert_refused(shared, case["says"], *command, str(shared.config), changed)


def fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Every field of the schema: dotted name, type, and what else pydantic knows of it."""
    for name, field in model.model_fields.items():
        dotted = f"{path}{name}"
        parts = [field.annotation, *get_args(field.annotation)]
        nested = [p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)]
        yield dotted, nested[0] if nested else field.annotation, tuple(field.metadata)
        if nested:
            yield from fields(nested[0], f"{dotted}.")


def wrong_values(kind: Any) -> list[str]:
    """TOML of values that no field of a type takes, whatever its range."""
    if isinstance(kind, types.UnionType):
        return wrong_values(next(part for part in get_args(kind) if part is not type(None)))
    if get_origin(kind) is Literal:
        return ['"no-such-choice"', "1", "[]", "{}", "1979-05-27"]
    if get_origin(kind) is tuple:
        return ['"text"', "3", "true", "{}", "[[]]", "[{}]", "[1979-05-27]", "1979-05-27"]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return ['"text"', "3", "true", "[]", "1979-05-27"]
    others = ["[]", "[1]", "{}", "{ a = 1 }", "1979-05-27", "07:32:00"]
    return others + {
        str: ["1", "1.5", "true", "nan"],
        int: ['"x"', '""', "1.5", "nan", "inf", "-1"],
        float: ['"x"', '""', "nan", "inf", "-inf", "-1"],
        bool: ['"perhaps"', '""', "2", "1.5", "nan"],
    }.get(_plain_type(kind), [])


def _plain_type(kind: Any) -> Any:
    """The type under Annotated[...]."""
    return _plain_type(get_args(kind)[0]) if hasattr(kind, "__metadata__") else kind


WRONG_TYPES = [
    (name, value)
    for name, kind, _ in fields(Config)
    if name != "search.preset"  # looked up before the schema: see overrides.jsonl
    for value in wrong_values(kind)
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_a_wrong_type_in_every_field(shared: Place, name: str, value: str) -> None:
    arguments = ("plan", str(shared.config), "--set", f"{name}={value}")
    assert_refused(shared, name.split(".")[0], *arguments)


# Prompt files


@pytest.mark.parametrize("case", corpus("prompts"))
def test_bad_prompt_files(shared: Place, case: dict[str, Any]) -> None:
    path = shared.write(case["file"], content(case))
    given = {name: unpacked(case[name]) for name in ("split", "column") if name in case}
    config = shared.with_source(path, **given)
    try:
        assert_refused(shared, case["says"], "run", str(config))
    finally:
        path.unlink()
