# Everything here works on a machine with Python and pip alone: the first target asked for makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread for each of the two test workers: tiny models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg $(BIN)/python -m pytest --no-header
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo bench test test-slow check format clean

help:  ## Say what the targets do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Make .venv with the package (editable) and the pinned tools; done by the others when needed

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --root-user-action=ignore \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

bench: $(STAMP)  ## Measure speed and memory against plain passes and steps, into outputs/bench.json; options in ARGS="..."
	@TOKENIZERS_PARALLELISM=false $(BIN)/python tests/performance/bench.py $(ARGS)

demo: $(STAMP)  ## Run the demonstration into outputs/demo; further options in ARGS="..."
	@$(BIN)/hf-unlearn demo --output_dir outputs/demo $(ARGS)

test: $(STAMP)  ## Run the tests but the slow ones; pytest's options in ARGS="..."
	@$(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(STAMP)  ## Run the slow tests
	@$(PYTEST) -n $(WORKERS) --dist worksteal -m slow $(ARGS)

check: $(STAMP)  ## Lint, formatting, types and the direction of imports
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary
	@$(PYTEST) -q tests/repo/test_imports.py

format: $(STAMP)  ## Mend what ruff can mend, and format
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

clean:  ## Remove caches and built files; .venv and outputs stay
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
