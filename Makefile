# Set-up, checks and the demo. `make setup` runs by itself before the other targets.
# All paths are relative, so the checkout may lie in a folder with spaces in its name.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
STAMP := $(VENV)/.installed
# Exists while pip works. If it is found later, that pip was killed: it may have left packages
# that look installed but are not, so such an environment is thrown away.
BUSY := $(VENV)/.installing
PY := $(VENV)/bin/python
NEEDED_GB := 8

# Several ranks share the cores of one machine; a thread pool in each would only compete.
export OMP_NUM_THREADS := 1
export PYTHON

# The stamp holds the folder it was made in: an environment does not survive a move, nor the
# removal of the interpreter it points to.
READY := $(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd)" ] && $(PY) -c '' 2>/dev/null && echo yes)

# Minutes of `make fuzz`.
MINUTES ?= 60

.PHONY: help setup test quick fuzz lint demo demo-control clean FORCE

help:
	@echo "make setup         create .venv with the tested versions"
	@echo "make test          run the tests"
	@echo "make quick         those without ranks, launches and kills: 2 minutes on two cores"
	@echo "make fuzz          hostile inputs for every reader, for an hour or MINUTES=n"
	@echo "make lint          ruff check and format check, mypy"
	@echo "make demo          train, discover experts, reinforce: the digits demo, into runs/demo"
	@echo "make demo-control  the same without the look back at the image"
	@echo "make clean         remove caches and build output (keeps .venv and runs)"

setup: $(STAMP)

$(STAMP): setup.py constraints.txt $(if $(READY),,FORCE)
	@# A folder that moved, was half made or lost its interpreter starts from nothing.
	@if [ -e $(BUSY) ] || ! $(PY) -m pip --version >/dev/null 2>&1 \
	    || { [ -s $(STAMP) ] && [ "$$(cat $(STAMP))" != "$$(pwd)" ]; }; then \
	    rm -rf $(VENV); \
	    free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	    if [ "$$free" -lt $(NEEDED_GB) ]; then \
	        echo "error: set-up needs about $(NEEDED_GB) GB free here, $$free GB are" >&2; exit 1; \
	    fi; \
	    python=$$(bash tools/find_python.sh); \
	    echo "creating $(VENV) with $$python"; \
	    "$$python" -m venv $(VENV); \
	fi
	@rm -f $(STAMP); touch $(BUSY)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(BUSY); pwd > $(STAMP)

# A worker for each core, at most eight: each holds up to four ranks. The tests of a file share one
# worker, its fixtures and its ranks; files come in the order of tests/conftest.py, the long ones
# first. nproc would answer with OMP_NUM_THREADS, which is 1 here.
PYTEST = $(PY) -m pytest --numprocesses $$(env -u OMP_NUM_THREADS nproc) --maxprocesses 8 \
    --dist loadfile --no-loadscope-reorder

test: setup
	@$(PYTEST)

quick: setup
	@$(PYTEST) -m "not ranks and not kills and not launches and not slow"

fuzz: setup
	@$(PY) -m tests.hostile.fuzz --minutes $(MINUTES)

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

demo: setup
	@bash examples/digits/demo.sh
	@bash examples/digits/earl.sh

demo-control: setup
	@bash examples/digits/control.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
