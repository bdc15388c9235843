"""The architecture, held by the imports: flows -> tasks -> {numerics, models, artifacts}."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("flows", "tasks", "artifacts")
HEAVY = {"torch", "transformers", "prefect"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, type-checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", modules("artifacts"), ids=str)
def test_artifacts_know_neither_torch_nor_prefect_nor_who_uses_them(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in HEAVY | {"flows", "tasks"}


@pytest.mark.parametrize("path", modules("tasks/numerics"), ids=str)
def test_numerics_import_nothing_of_ours_but_numerics(path: Path) -> None:
    for name in imports(path):
        assert not any(inside(name, package) for package in OURS) or inside(name, "tasks.numerics")


@pytest.mark.parametrize("path", modules("tasks/models"), ids=str)
def test_models_run_on_a_bare_machine(path: Path) -> None:
    allowed = ("tasks.models", "tasks.numerics", "artifacts.errors", "artifacts.paths")
    for name in imports(path):
        assert name.split(".")[0] not in {"pydantic", "polars", "duckdb", "prefect", "flows"}
        if any(inside(name, package) for package in OURS):
            assert any(inside(name, package) for package in allowed), name


@pytest.mark.parametrize("path", modules("tasks"), ids=str)
def test_tasks_do_not_know_flows_and_only_mirror_and_lanes_know_prefect(path: Path) -> None:
    for name in imports(path):
        assert not inside(name, "flows")
        assert (
            not inside(name, "prefect") or "lanes" in path.parts or path.name == "prefect_mirror.py"
        )


@pytest.mark.parametrize("path", modules("flows"), ids=str)
def test_flows_never_import_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}


@pytest.mark.parametrize("path", [p for o in OURS for p in modules(o)], ids=str)
def test_no_module_hides_one_of_the_standard_library(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names or path.stem in {"__init__", "__main__"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["sql", "SELECT 1"], ["plan"]]
)
def test_the_light_commands_load_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['tribunal', *{arguments!r}]\n"
        "from flows.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'transformers', 'prefect', 'optuna'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), "TRIBUNAL_STORE": str(tmp_path / "s")},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
