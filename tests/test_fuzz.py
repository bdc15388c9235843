"""Bad configs and prompt files: one line naming the fault, exit code 2, no wait, nothing written.

The kept corpus lies in tests/fuzz, one case per line. A text there is a string, bytes in base64, or
a list [text, unit, times, text, ...] for long ones. The rest is derived from the config's schema or
drawn by hypothesis, always the same. Kept and derived cases are bad by construction; a drawn one
may be good by chance, so it is only planned, and what is planned must not write either.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from artifacts.specs import Config
from flows.cli import main
from flows.settings import load_config

HERE = Path(__file__).parent / "fuzz"
CORPORA = ("configs", "prompts", "overrides", "studies", "settings")
SECONDS = 60  # a case that takes longer hangs
SOURCES = [
    f"{group}-{split}"
    for group in ("harmful", "harmless")
    for split in ("direction", "search", "selection", "test")
]
COMMANDS = (("run",), ("plan",), ("why", "prompts"))
slow = pytest.mark.slow


def corpus(name: str) -> list[Any]:
    """Kept cases, of which the fast suite takes every tenth."""
    lines = (HERE / f"{name}.jsonl").read_text().splitlines()
    return [
        pytest.param(json.loads(line), id=f"{name}-{number}", marks=[slow] if number % 10 else [])
        for number, line in enumerate(lines, 1)
    ]


def unpacked(text: str | list[Any]) -> str:
    """A text of the corpus: plain, or with repetitions."""
    if isinstance(text, str):
        return text
    repeated = zip(text[0::3], text[1::3], text[2::3], strict=False)  # the last text stands alone
    return "".join(before + unit * times for before, unit, times in repeated) + text[-1]


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
        (folder / "afolder").mkdir()

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

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to know."""
        return {"TRIBUNAL_STORE": str(self.folder.parent / "store"), "HF_HUB_OFFLINE": "1"}

    def listing(self) -> list[str]:
        return sorted(str(path) for path in self.folder.parent.rglob("*"))


def toml(value: Any) -> str:
    """A value as TOML, tables inline."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{toml(name)} = {toml(one)}' for name, one in value.items())} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    # JSON's strings are TOML's, once DEL is escaped; so are its numbers, if infinity is spelt inf.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text if isinstance(value, str) else text.replace("Infinity", "inf").lower()


def document(tree: dict[str, Any]) -> str:
    return "".join(f"{toml(name)} = {toml(value)}\n" for name, value in tree.items())


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


def tribunal(place: Place, *arguments: str, **settings: str) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of the command line, run in this process."""
    out, error = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, place.environment | settings),
        patch.object(sys, "argv", ["tribunal", *arguments]),
        redirect_stdout(out),
        redirect_stderr(error),
        at_most(SECONDS),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return ended.value.code, out.getvalue(), error.getvalue()


def assert_refused(place: Place, says: str, *arguments: str, **settings: str) -> None:
    before = place.listing()
    code, out, error = tribunal(place, *arguments, **settings)
    assert (code, out) == (2, ""), (code, out, error)
    assert is_one_line(error)
    assert says in error, error
    assert place.listing() == before


def is_one_line(error: str) -> bool:
    is_ours = error.startswith("tribunal: ") and error.endswith("\n")
    return is_ours and error.count("\n") == 1 and len(error) < 1200


def assert_planned_or_refused(place: Place, config: Path, *arguments: str) -> None:
    """What may be good by chance: a plan or one line, and nothing written."""
    before = place.listing()
    code, out, error = tribunal(place, "plan", str(config), *arguments)
    assert code in (0, 2), (code, error)
    assert is_one_line(error) if code else out, error
    assert place.listing() == before


# The twins: what is good passes, and the harness sees what it is there to see


def test_the_valid_config_passes(shared: Place) -> None:
    for command in (("plan",), ("why", "prompts")):
        assert tribunal(shared, *command, str(shared.config))[0] == 0
    tree = load_config(str(shared.config)).model_dump(mode="json", exclude_none=True)
    again = shared.write("bad.toml", document(tree))
    assert tribunal(shared, "plan", str(again))[0] == 0


def test_the_harness_sees_what_it_is_there_to_see(
    shared: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = ("plan", str(shared.config), "--set", "seed=-1")
    assert_refused(shared, "seed is '-1'", *bad)
    with pytest.raises(AssertionError):
        assert_refused(shared, "another fault", *bad)
    with pytest.raises(AssertionError):
        assert_refused(shared, "", "plan", str(shared.config))
    with pytest.raises(TimeoutError), at_most(1):
        signal.pause()
    monkeypatch.setattr(Place, "listing", lambda place: [str(os.urandom(8))])
    with pytest.raises(AssertionError):
        assert_refused(shared, "seed is '-1'", *bad)


@pytest.mark.parametrize(
    ("text", "says"),
    [("name =\n", "cannot read 'bad.toml'"), ("seed = -1\n", "seed is '-1'")],
)
def test_a_process_of_its_own_says_the_same(shared: Place, text: str, says: str) -> None:
    path = shared.write("bad.toml", text + shared.text())
    before = shared.listing()
    done = subprocess.run(
        [sys.executable, "-m", "flows", "run", str(path)],
        env=os.environ | shared.environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert is_one_line(done.stderr)
    assert says in done.stderr
    assert shared.listing() == before


def test_there_are_five_hundred_cases_without_the_drawn_ones() -> None:
    kept = sum(len(corpus(name)) for name in CORPORA)
    assert kept >= 500
    assert kept + len(WRONG_TYPES) >= 1800


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


@slow
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


# Study plans and settings


@pytest.mark.parametrize("case", corpus("studies"))
def test_bad_study_plans(shared: Place, case: dict[str, Any]) -> None:
    path = shared.write("bad.toml", content(case))
    assert_refused(shared, case["says"], "study", str(path))


@pytest.mark.parametrize("case", corpus("settings"))
def test_bad_settings(shared: Place, case: dict[str, Any]) -> None:
    given = {name: unpacked(value) for name, value in case["settings"].items()}
    assert_refused(shared, case["says"], "run", str(shared.config), **given)


# What is drawn

PIECES = [
    *("name", "seed", "[model]", "[[model]]", "[prompts.harmful]", "search.space", "id", "extends"),
    *("=", " = ", "\n", "\r\n", ".", ",", "#", "[", "]", "{", "}", '"', '"""', "'", "'''", "\\"),
    *(
        "0",
        "-1",
        "1e999",
        "nan",
        "true",
        "0x",
        "1979-05-27",
        '"organism"',
        "\\u",
        "\ufeff",
        "\0",
        "é",
    ),
]
NAMES = [name for name, _, _ in fields(Config)]
values = st.recursive(
    st.one_of(
        st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=["Cs"]))
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
drawn = settings(derandomize=True, max_examples=150, database=None)


@slow
@drawn
@given(
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=30), st.booleans()
)
def test_any_text_is_planned_or_refused(shared: Place, parts: list[str], first: bool) -> None:
    text = "".join(parts)
    whole = text + shared.text() if first else shared.text() + text
    assert_planned_or_refused(shared, shared.write("bad.toml", whole))


@slow
@drawn
@given(
    st.sampled_from([*NAMES, "", "a.b", "prompts.harmful.test.source"]) | st.text(max_size=10),
    st.text(max_size=20) | values.map(toml),
)
def test_any_override_is_planned_or_refused(shared: Place, name: str, value: str) -> None:
    assert_planned_or_refused(shared, shared.config, f"--set={name}={value}")


@slow
@drawn
@given(st.data())
def test_any_mutation_of_a_config_is_planned_or_refused(shared: Place, data: st.DataObject) -> None:
    tree = load_config(str(shared.config)).model_dump(mode="json", exclude_none=True)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(tree, data)
    assert_planned_or_refused(shared, shared.write("bad.toml", document(tree)))


def mutate(tree: dict[str, Any], data: st.DataObject) -> None:
    """Drop, rename, replace or wrap one value somewhere in a tree, or add one."""
    while True:
        if not tree:
            return
        name = data.draw(st.sampled_from(sorted(tree)))
        if not isinstance(tree[name], dict) or data.draw(st.booleans()):
            break
        tree = tree[name]
    match data.draw(st.sampled_from(["drop", "rename", "replace", "wrap", "add"])):
        case "drop":
            del tree[name]
        case "rename":
            tree[data.draw(st.text(max_size=8).filter(str.isprintable))] = tree.pop(name)
        case "replace":
            tree[name] = data.draw(values)
        case "wrap":
            tree[name] = [tree[name]]
        case _:
            tree[data.draw(st.sampled_from(NAMES))] = data.draw(values)


@slow
@drawn
@given(
    st.sampled_from(["txt", "csv", "json", "jsonl", "parquet"]),
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(values, max_size=5).map(lambda rows: json.dumps(rows).encode()),
        st.lists(values, max_size=5).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ),
)
def test_any_prompt_file_with_too_few_rows_is_refused(
    shared: Place, suffix: str, written: bytes
) -> None:
    path = shared.write(f"drawn.{suffix}", written)
    try:
        config = shared.with_source(path, split="train[:1000]")
        assert_refused(shared, "", "run", str(config))
    finally:
        path.unlink()
