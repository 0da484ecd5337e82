# Every target sets up what it needs: `make demo` works on a machine that has Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SHOWN_EXAMPLES := $(sort $(wildcard examples/0*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types contracts examples bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(INSTALLED) ## report, train, save and reload LoRA on a real transformer (under 3 minutes on 2 cores)
	$(BIN)/python examples/demo.py

test: $(INSTALLED) ## the tests, in two processes
	$(BIN)/python -m pytest -n 2

check: lint types contracts test examples ## everything that CI runs

lint: $(INSTALLED) ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED) ## mypy, strict
	$(BIN)/mypy

contracts: $(INSTALLED) ## which package may import which
	$(BIN)/lint-imports

examples: $(INSTALLED) ## the examples, and the demo
	set -e; for example in $(SHOWN_EXAMPLES); do echo "== $$example"; $(BIN)/python $$example; done
	$(BIN)/python examples/demo.py

bench: $(INSTALLED) ## the benchmarks, each a script
	set -e; for script in $(sort $(wildcard tests/benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

format: $(INSTALLED) ## format the code and mend what lint can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and the caches
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tensorpeft needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@
