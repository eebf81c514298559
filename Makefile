# `make demo` is the place to begin. Every target works on a fresh clone: it makes .venv first.
# Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
MINUTES ?= 30
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test check format sim mutants mutation soak bench bench-peers clean

help:
	@echo "make demo         install into .venv and run the main example on this machine"
	@echo "make test         run the tests"
	@echo "make check        ruff and mypy"
	@echo "make format       let ruff format and fix"
	@echo "make sim          run the simulation, 10 million events; or SEEDS=500, or SEEDS=1000-1999"
	@echo "make mutants      plant mistakes one at a time: the simulation must see each"
	@echo "make mutation     change the scheduler's core at random and see whether its tests notice;"
	@echo "                  SAMPLE=400 SEED=1 say how many changes and which (installs mutmut into .venv)"
	@echo "make soak         a mixed load with random kills, MINUTES=30 of it, then everything is counted"
	@echo "make bench        compare with the standard library and joblib, about a minute"
	@echo "make bench-peers  compare with mpire, Ray and Dask too (installs them into .venv)"
	@echo "make clean        remove .venv and caches"

install: $(STAMP)

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON). Install Python 3.11 or newer, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fanout needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version)."; \
	  echo "Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: its venv or ensurepip module is missing."; \
	  echo "On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@echo "installing fanout and its tools into $(VENV)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -e '.[dev]' || { \
	  echo "pip could not install fanout; it says above why. Without a package index within reach, set"; \
	  echo "PIP_NO_INDEX=1 and PIP_FIND_LINKS=<folder of wheels>."; exit 1; }
	@touch $@

# A private FANOUT_HOME keeps the demo apart from daemons that already run, and they end with it. With
# FANOUT_HOME given the demo stops nothing there: its daemons leave when they are idle, and others'
# calls go on. Not every sh runs the EXIT trap at a signal, hence the second trap.
demo: $(STAMP)
	@unset FANOUT_URL; \
	if [ -z "$$FANOUT_HOME" ]; then \
	  FANOUT_HOME=$$(mktemp -d); export FANOUT_HOME; \
	  trap 'trap "" INT TERM; echo; echo "\$$ fanout stop --force"; \
	    $(BIN)/fanout stop --force >/dev/null; rm -rf "$$FANOUT_HOME"' EXIT; \
	  trap 'exit 130' INT TERM; \
	fi; \
	echo "\$$ fanout run examples/stdlib_report.py"; \
	$(BIN)/fanout run examples/stdlib_report.py && \
	echo && echo "\$$ fanout status" && $(BIN)/fanout status

test: $(STAMP)
	@$(BIN)/python -m pytest -q

check: $(STAMP)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary

format: $(STAMP)
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

sim: $(STAMP)
	@$(BIN)/python tests/simulation.py $(if $(SEEDS),--seeds $(SEEDS))

mutants: $(STAMP)
	@$(BIN)/python tests/mutants.py

SAMPLE ?= 400
SEED ?= 1

mutation: $(STAMP)
	@$(PIP) install 'mutmut==3.8.1'
	@$(BIN)/python tests/mutation.py --sample $(SAMPLE) --seed $(SEED)

soak: $(STAMP)
	@$(BIN)/python tests/soak.py --minutes $(MINUTES)

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.bench

bench-peers: $(STAMP)
	@$(PIP) install mpire 'ray[default]' 'dask[distributed]'
	@$(BIN)/python -m benchmarks.bench --peers

clean:
	@rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
