# Two commands for a fresh machine: `make quickstart` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow bench lint audit clean

help:
	@echo "make quickstart  fine-tune a real model on real data and show what it learned (5 minutes on 2 cores, 20 without bfloat16 instructions)"
	@echo "make test        lint, types, import rules and tests (at most 15 minutes on 2 cores)"
	@echo "make test-slow   the tests that take minutes each"
	@echo "make audit       look the pinned requirements up in a database of known vulnerabilities (needs one in reach)"
	@echo "make bench       time training steps beside PEFT and TRL (DATA=folder for real rows; keep the machine idle)"

$(VENV)/.runtime: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: $(VENV)/.runtime
	$(BIN)/python examples/quickstart.py

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests examples bench
	$(BIN)/ruff format --check src tests examples bench
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes of one thread each: two of two threads wait for each other. Those that tests start need not compile
# trivet anew, whatever the environment says.
test: lint
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not gpu"

bench: $(VENV)/.dev
	$(BIN)/python bench/speed.py $(if $(DATA),--data "$(DATA)")

# In an environment of its own: what it needs is none of trivet's business. --strict: what was not looked up is a failure.
audit:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	grep -v '^-e' requirements.txt > .audit/requirements.txt
	.audit/bin/pip-audit --strict --disable-pip --no-deps -r .audit/requirements.txt

clean:
	rm -rf $(VENV) .audit .mypy_cache .ruff_cache .hypothesis .import_linter_cache
