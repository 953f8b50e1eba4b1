# One command each; `make help` lists them. Everything is installed by pip from the pinned constraints into .venv.
PYTHON ?= python3
VENV ?= .venv
VENV_ONNX ?= .venv-onnx
WORKERS ?= auto
DEMO ?=

BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt constraints-older.txt
# Recent diffusers and numpy need Python 3.11; on 3.10 everything runs on the older set.
CONSTRAINTS = $(shell $(PYTHON) -c 'import sys; print("constraints-older.txt" if sys.version_info < (3, 11) else "constraints.txt")')
PIP_INSTALL = -m pip install --quiet --constraint $(CONSTRAINTS) --build-constraint $(CONSTRAINTS)
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PRECIOUS: %/.pip
.PHONY: help demo test test-onnx test-older lint docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# One process per core with one thread each, and nothing from the Hub.
test test-onnx test-older: export OMP_NUM_THREADS = 1
test test-onnx test-older: export HF_HUB_OFFLINE = 1

demo: $(VENV)/.runtime ## what IEC does to a small efficient model: a table, a picture, a page (DEMO="options")
	$(BIN)/iec demo $(DEMO)

test: lint ## lint, types, layers, all tests and the examples of the docs
	$(BIN)/python $(PYTEST)

test-onnx: $(VENV_ONNX)/.ready ## the tests with a frozen int8 ONNX pipeline, in an environment of their own
	$(VENV_ONNX)/bin/python $(PYTEST) tests/test_onnx.py

test-older: $(VENV_ONNX)/.ready ## all tests on the oldest supported diffusers
	$(VENV_ONNX)/bin/python $(PYTEST)

lint: $(VENV)/.dev ## style, types and layers only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs ## the documentation, into site/
	$(BIN)/mkdocs build --strict --quiet

clean: ## remove the environments and everything that was built
	rm -rf $(VENV) $(VENV_ONNX) build dist site .pytest_cache .ruff_cache .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment with the pinned pip: a stamp stands for each finished stage.
%/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "IEC needs Python 3.10 or later, and $(PYTHON) is none; choose another: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade --constraint $(CONSTRAINTS) pip
	@touch $@

$(VENV)/.runtime: $(VENV)/.pip $(INPUTS)
	$(BIN)/python $(PIP_INSTALL) --editable '.[cpu]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.pip $(INPUTS)
	$(BIN)/python $(PIP_INSTALL) --editable '.[docs]'
	@touch $@

$(VENV_ONNX)/.ready: CONSTRAINTS = constraints-older.txt
$(VENV_ONNX)/.ready: $(VENV_ONNX)/.pip $(INPUTS)
	$(VENV_ONNX)/bin/python $(PIP_INSTALL) --editable '.[cpu,onnx,test]'
	@touch $@
