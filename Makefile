# make demo | test | test-slow | test-faults | check | .venv      (Python 3.11 and make are all that is needed)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PARALLEL ?= -n 2 --dist loadfile

.PHONY: demo test test-slow test-faults check format clean

demo: .venv
	$(BIN)/tribunal run organism
	@echo "  first: source .venv/bin/activate"

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow" $(PARALLEL)

test-slow: .venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow $(PARALLEL)

test-faults: .venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m faults $(PARALLEL)

check: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv: .venv/installed

# The stamp comes last, so an interrupted install is taken up again.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
