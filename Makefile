# The targets need only Python and pip: the first one creates .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
# One thread for each test worker: tiny models gain nothing from more.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest --no-header
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal
# Lines of the package that the fast tests run, in percent; code in launched processes is not counted.
COVERAGE ?= 85

.DEFAULT_GOAL := help
.PHONY: help venv demo bench test test-slow coverage lowest check format docs build clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Create .venv with the package (editable) and the pinned tools; the other targets do it when needed

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --root-user-action=ignore \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

check: $(STAMP)  ## Run ruff, mypy and the test of the import direction
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary
	@$(PYTEST) -q tests/repo/test_imports.py

format: $(STAMP)  ## Fix what ruff can fix, and format
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

test: $(STAMP)  ## Run the tests without the slow ones; options for pytest in ARGS="..."
	@$(PYTEST) $(PARALLEL) $(ARGS)

test-slow: $(STAMP)  ## Run the slow tests
	@$(PYTEST) $(PARALLEL) -m slow $(ARGS)

coverage: $(STAMP)  ## Run the tests and fail if they cover less than COVERAGE percent of the lines
	@$(PYTEST) $(PARALLEL) --cov=hf_unlearn --cov-report=term:skip-covered --cov-report=xml \
		--cov-fail-under=$(COVERAGE) $(ARGS)

lowest:  ## Run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	@test -x $(LOWEST)/bin/uv || { $(PYTHON) -m venv $(LOWEST) && $(LOWEST)/bin/python -m pip install -qq uv; }
	@$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@$(TEST_ENV) $(LOWEST)/bin/python -m pytest $(PARALLEL) $(ARGS)

docs: $(STAMP)  ## Check the links and code blocks of the documentation and the examples of docstrings
	@$(PYTEST) -q tests/repo/test_readme.py tests/repo/test_public_surface.py $(ARGS)

build: $(STAMP)  ## Build sdist and wheel into dist/ and check them
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist
	@$(BIN)/python -m twine check --strict dist/*

demo: $(STAMP)  ## Run the demonstration into outputs/demo; options in ARGS="..."
	@$(BIN)/hf-unlearn demo --output_dir outputs/demo $(ARGS)

bench: $(STAMP)  ## Measure speed and memory against plain passes and steps, into outputs/bench.json; options in ARGS="..."
	@TOKENIZERS_PARALLELISM=false $(BIN)/python tests/performance/bench.py $(ARGS)

clean:  ## Remove caches and built files; the environments and outputs stay
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage coverage.xml htmlcov
	@find . \( -path ./$(VENV) -o -path ./$(LOWEST) \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
