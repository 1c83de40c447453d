# Everything happens in .venv; `make setup` is done by the first target that needs it.
.DEFAULT_GOAL := help
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
SUITE ?= suites/quick.yaml
STAMP := .venv/.ready

.PHONY: help setup run test check board bench test-long test-gpu fuzz docs clean-venv

help:           ## what can be made
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[app,quant,eval,dev]'
	@touch $@

setup: $(STAMP)  ## install into .venv (torch first); needed again after a new entry point

run: $(STAMP)    ## measure SUITE (suites/quick.yaml) and print the leaderboard
	$(BIN)/effbench run $(SUITE)

test: $(STAMP)   ## all tests that take seconds; no GPU, no network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long and not gpu and not alone" -n logical --maxprocesses 4 --dist worksteal
	$(BIN)/python -m pytest -m "alone and not long and not gpu"

check: $(STAMP)  ## lint, formatting, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

board: $(STAMP)  ## the leaderboard in the browser
	$(BIN)/effbench board

bench: $(STAMP)  ## a benchmark of effbench itself: make bench NAME=launch_cost (without NAME: all of them)
	$(BIN)/python benchmarks/run.py $(NAME)

test-long: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -m "long"

fuzz: $(STAMP)       ## 100,000 hostile bundles, drawn at random, and as many guided by coverage where atheris installs
	$(BIN)/python -m pytest -m long tests/exchange/test_fuzz.py
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) atheris
	@if $(BIN)/python -c "import atheris" 2>/dev/null; then $(BIN)/python -m tests.exchange.guided -runs=100000; \
	else echo "atheris has no wheel for this machine: the guided half is left out."; fi

test-gpu: $(STAMP)   ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m "gpu" tests/gpu

docs: $(STAMP)   ## write the generated parts of docs/methodology.md again
	$(BIN)/python docs/generate.py
