# Thin: every target is one or two commands that can be typed by hand.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Without an NVIDIA GPU the CPU-tested torch is pinned; with one, pyproject's range decides.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 || echo "-c constraints-cpu.txt")
DEMO ?= demo
GPU_OUT ?= gpu-results
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow bench race gpu gpu-wheels leaderboard results docs lint install install-dev install-bench clean

demo: install
	$(BIN)/vgm train dit --out $(DEMO)/dit --overwrite
	$(BIN)/vgm sample $(DEMO)/dit -n 100 --out $(DEMO)/samples.png
	$(BIN)/vgm evaluate $(DEMO)/dit --metrics fid,class-accuracy -n 2000
	@echo "the samples: $(DEMO)/samples.png"

test: install-dev  # a worker per core, a file of tests to one worker; all of them share compiled modules
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: install-dev
	$(BIN)/python -m pytest -m "slow and not bench"

bench: install-bench
	$(BIN)/python -m pytest -m bench -s tests/bench

race: install-bench  # CHECKOUTS=FOLDER of the official repositories
	$(BIN)/python tests/bench/race.py $(CHECKOUTS)

gpu:
	PYTHON=$(or $(wildcard $(BIN)/python),$(PYTHON)) bash tests/gpu/run.sh $(GPU_OUT)

gpu-wheels:  # what the GPU machine may lack, for Python 3.12 on Linux
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .wheels \
	  $$($(BIN)/python -m pip freeze | grep -iE '^(pydantic|pydantic_core|annotated-types|typing-inspection|typing_extensions)==')

leaderboard: install  # every paper trained, measured and ranked; stopped and started again, it goes on
	$(BIN)/python docs/generate_results.py $(if $(MINUTES),--minutes $(MINUTES))

results: leaderboard

docs: install
	$(BIN)/python docs/generate_cli.py

lint: install-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

install: $(VENV)/.demo
install-dev: $(VENV)/.dev
install-bench: $(VENV)/.bench

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints-cpu.txt
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints-cpu.txt
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[dev,bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
