# Each target does all its own set-up in a virtual environment, .venv, on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-segmentation test check lint docs package clean

demo: .venv/runtime
	$(BIN)/python train.py --config configs/digits.py
	$(BIN)/python convert.py --workdir runs/digits --output deploy

demo-segmentation: .venv/runtime
	$(BIN)/python train.py --config configs/digits_scenes.py
	$(BIN)/python convert.py --workdir runs/digits_scenes --output deploy-scenes

test: .venv/develop
	$(BIN)/python -m pytest

# What to run while working: lint and the tests of re-parameterization, models and weights. They
# compile without optimizations, which is quicker; `make test` runs them with all of them.
check: lint
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -m "core and not slow"

lint: .venv/develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site; `.venv/bin/mkdocs serve` shows it while it is written.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# What is published: a wheel and a source archive in dist/, with metadata that an index accepts.
package: .venv/package
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build -q --no-isolation
	$(BIN)/python -m twine check --strict dist/*

.venv/created:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(None if ok \
	else "error: Python 3.11 to 3.13 is needed, $(PYTHON) is " + sys.version.split()[0] + \
	"; make PYTHON=python3.12 names another")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/runtime: .venv/created requirements.txt requirements-core.txt requirements-convert.txt \
		requirements-train.txt
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

.venv/develop: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@

.venv/docs: .venv/created requirements-docs.txt
	$(BIN)/python -m pip install -q -r requirements-docs.txt
	@touch $@

.venv/package: .venv/created requirements-package.txt
	$(BIN)/python -m pip install -q -r requirements-package.txt
	@touch $@

# Runs and deploy directories stay.
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
