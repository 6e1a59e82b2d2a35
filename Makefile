# Needs Python 3.11 or newer and nothing else; each target sets up .venv by itself the first time.
#   make test ARGS="-k zeroq"   arguments for pytest        make test WORKERS=0   in one process
#   make demo ARGS="scheme=w2a4"   other arguments for dfq run    make demo PYTHON=/path/to/python3
ARGS ?=
# Two torch processes with two threads each fight over two cores: one thread in each of at most four processes.
WORKERS ?= auto
PYTHON ?=
INSTALL = PYTHON='$(PYTHON)' sh scripts/install.sh

.PHONY: help demo test check bench clean
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: ## a 3-bit network made without data, and its report (dfq run)
	@$(INSTALL) onnx
	@echo "[2/2] dfq run $(or $(ARGS),scheme=w3a3)"
	@start=$$(date +%s) && .venv/bin/dfq run $(or $(ARGS),scheme=w3a3) && echo "dfq run took $$(($$(date +%s) - start)) s"

test: ## the tests
	@$(INSTALL) dev
	@echo "[2/2] pytest"
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal $(ARGS)

check: ## style, types, import directions
	@$(INSTALL) dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

bench: ## speed and accuracy against other tools
	@$(INSTALL) dev
	@set -e; for script in benchmarks/[a-z]*.py; do \
	    if [ -e "$$script" ]; then echo "$$script"; .venv/bin/python "$$script"; else echo "no benchmarks yet"; fi; done

clean: ## remove .venv, caches and build files; outputs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
