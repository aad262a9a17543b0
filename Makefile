# A newcomer needs two of these: `make demo` and `make test`. Each target sets up what it needs and calls one program.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV := .venv/bin
PYTEST := $(VENV)/python -m pytest
# In as many processes as there are cores, grouped by tests/conftest.py, the longest groups first: the tests that compute,
# then those that mostly wait for processes of their own. Real engines, last, need the whole machine.
COMPUTING := tests/contracts tests/attack tests/unit
SPREAD := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo up down test test-fast lint bench ape ape-setup lock clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1 - /'

setup: ## create or refresh .venv; nothing to do when the locks have not changed
	@$(PYTHON) -m build_tools.setup_env

demo: setup ## a whole network on this machine; ends by itself with a table of who earned and lost what
	@$(VENV)/poip demo

up: setup ## the demo's network, kept running
	@$(VENV)/poip up

down: setup ## stop what `make up` started
	@$(VENV)/poip down

test: setup ## lint and every test, the real engine included; all of it runs, and any failure fails
	@status=0; \
	$(VENV)/python -m build_tools.lint || status=$$?; \
	OMP_NUM_THREADS=1 $(PYTEST) $(SPREAD) $(COMPUTING) || status=$$?; \
	$(PYTEST) $(SPREAD) tests/integration || status=$$?; \
	$(PYTEST) $(patsubst %,--ignore=%,$(COMPUTING) tests/integration) || status=$$?; \
	exit $$status

test-fast: setup ## unit, contract and attack tests: what needs neither processes nor patience
	@OMP_NUM_THREADS=1 $(PYTEST) $(SPREAD) $(COMPUTING) -m "not engine and not slow"

lint: setup ## ruff, mypy and the lint of the contracts
	@$(VENV)/python -m build_tools.lint

bench: setup ## one table of measurements, also as JSON
	@$(VENV)/python -m benchmarks

ape: setup ape-setup ## the same contracts under Ape: compile, test, and scripts against Ape's network and the devnet
	@$(VENV)/python -m build_tools.ape_check

ape-setup:
	@$(PYTHON) -m build_tools.setup_env --ape

lock: setup ## rewrite requirements/*.lock after editing an .in file
	@$(VENV)/python -m build_tools.lock_requirements

clean: ## remove environments, caches and build results
	@rm -rf .venv .venv-ape .build build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
