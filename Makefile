# make demo | test | test-slow | test-faults | check | .venv      (Python 3.11 and make are all that is needed)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-slow test-faults check format clean

demo: .venv
	$(BIN)/tribunal run organism
	@echo "  first: source .venv/bin/activate"

test: check
	$(BIN)/pytest -q -m "not slow"

test-slow: .venv
	$(BIN)/pytest -q -m slow

test-faults: .venv
	$(BIN)/pytest -q -m faults

check: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch .venv

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
