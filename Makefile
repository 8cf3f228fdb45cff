# Everything runs in its own virtual environment, .venv, which the first target that needs it makes from nothing.
#   make demo PYTHON=python3.12      another interpreter
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'    PyTorch without CUDA (smaller)
#   make test WORKERS=8         as many processes

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
# Newer than pyproject.toml means: what pyproject.toml asks for is installed.
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

# The lowest versions of pyproject.toml, beside it.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
# Those versions have wheels for these Pythons alone.
FITS_OLDEST := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON_OLDEST ?= $(shell for each in python3.11 python3.12 $(PYTHON); do \
	$$each -c '$(FITS_OLDEST)' 2>/dev/null && echo $$each && break; done)
# Each process has one thread, and its own share of the tests; a third one computes while others wait for what they started.
PYTEST = -m pytest -n $(WORKERS) --dist worksteal

HAS_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-long test-oldest check format bench docs clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv and install the package into it, editable, with all extras

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
		echo "PYTHON=$(PYTHON): no such command. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1): must be 3.11 or later. Name another one: make PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "Making $(VENV) with PyTorch and what the tests need: some minutes. PyTorch with CUDA is the large part of the"
	@echo "6 GB that come from PyPI; without: PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## Train on the embedded images with the paper's recipe, into runs/demo, and write its report
	@if [ -e runs/demo ]; then echo "Removing the former runs/demo."; rm -rf runs/demo; fi
	$(BIN)/spfde train --out runs/demo
	$(BIN)/spfde report runs/demo --out runs/demo/report.html

test: $(STAMP) ## Run the tests but for the long ones (PYTEST_ARGS='tests/model -x' for some of them)
	@$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

test-long: $(STAMP) ## Run all tests, the long ones too
	@$(BIN)/python $(PYTEST) -m '' $(PYTEST_ARGS)

test-oldest: $(OLDEST_STAMP) ## Run the tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	@$(OLDEST)/bin/python $(PYTEST) $(PYTEST_ARGS)

$(OLDEST_STAMP): pyproject.toml scripts/lowest_versions.py
	@$(or $(PYTHON_OLDEST),false) -c '$(FITS_OLDEST)' || { \
		echo "PYTHON_OLDEST=$(PYTHON_OLDEST): must be Python 3.11 or 3.12, for newer ones have no wheels of the lowest" \
			"versions (numpy 1.26). Install one, or name one: make test-oldest PYTHON_OLDEST=/path/to/python3.12" >&2; \
		exit 1; }
	$(PYTHON_OLDEST) -m venv --clear $(OLDEST)
	$(PYTHON_OLDEST) scripts/lowest_versions.py > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet $(PIP_ARGS) -c $(OLDEST)/lowest.txt -e '.[test]'
	@touch $(OLDEST_STAMP)

check: $(STAMP) ## Format, lint, types and the contract between the rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Put the code into the form that `make check` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Run every script in benchmarks/ (an hour), and write docs/benchmarks.md and the README's results
	@set -e; for script in benchmarks/[!_]*.py; do \
		[ "$$script" = benchmarks/render.py ] && continue; \
		[ "$$script" = benchmarks/gpu.py ] && ! $(BIN)/python -c "$(HAS_GPU)" && continue; \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done
	$(BIN)/python benchmarks/render.py

docs: $(DOCS_STAMP) ## Build the documentation into site/; a broken link or an undocumented public name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e '.[docs]'
	@touch $(DOCS_STAMP)

clean: ## Remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) $(OLDEST) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find src tests scripts benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
