# Every target is complete on a fresh Debian or Ubuntu with Python 3.11 or newer (with venv) and make.
#
#   PYTHON        the interpreter to build .venv from; the first of python3.11, 3.12, 3.13, python3 that works
#   TORCH_INDEX   an extra package index to take torch from. Plain PyPI serves Linux the CUDA build, several
#                 gigabytes; on a machine without a GPU:
#                 make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                 Not needed where pip's own configuration already points to the build that is wanted.
#   WORKERS       test processes; 2
#   FUZZ_SECONDS  how long make fuzz runs; 60

SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
# Tried by running it: a version manager's shim exists also for interpreters that do not.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
WORKERS ?= 2
FUZZ_SECONDS ?= 60
# The long ones, which train, first: the last to begin should be short.
NOTEBOOKS = $(shell printf '%s\n' notebooks/*.ipynb | sort -r)

PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
# Threads that wait without spinning: tests share few cores. No hub: what a test needs is shipped.
# MPLBACKEND, where set, keeps figures out of notebooks' outputs.
CALM = env -u MPLBACKEND HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
PYTEST = $(CALM) $(PY) -m pytest
# Test processes side by side have a share of the cores each: more threads than cores wait for one another.
SIDE_BY_SIDE = $(CALM) OMP_NUM_THREADS=$$((($$(nproc) + $(WORKERS) - 1) / $(WORKERS))) $(PY) -m pytest -n $(WORKERS)

STEPS := lint types unit nbval papermill wheel

.DEFAULT_GOAL := help
.PHONY: help run test notebooks slow fuzz lint $(addprefix step-,$(STEPS))

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16
	@echo "  single steps of make test: $(addprefix make step-,$(STEPS))"

run: $(VENV)/.installed-run  ## hosted against local, end to end; results in a new folder under runs/
	env -u MPLBACKEND OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/dsr1kit run 30_hosted_vs_local --out runs/$(shell date +%Y%m%d-%H%M%S)

test: $(VENV)/.installed-test  ## lint, types, unit tests, all notebooks two ways, the wheel
	@for step in $(STEPS); do \
		printf '\n== %s\n' "$$step"; began=$$SECONDS; \
		if $(MAKE) --no-print-directory "step-$$step"; \
		then printf '== %s: ok, %s s\n' "$$step" "$$((SECONDS - began))"; \
		else printf '== %s: FAILED, %s s\n' "$$step" "$$((SECONDS - began))"; exit 1; fi; \
	done; printf '\n== all steps ok, %s s\n' "$$SECONDS"

notebooks: $(VENV)/.installed-test  ## run all notebooks and save them with their outputs
	$(CALM) $(PY) tests/notebooks/refresh.py

slow: $(VENV)/.installed-test  ## the slow tests: real weights from the package registry, minutes
	$(PYTEST) -m slow tests

fuzz: $(VENV)/.installed-test  ## fuzz the stream reader for a minute (FUZZ_SECONDS); Linux alone
	$(PIP_INSTALL) -e '.[fuzz]'
	$(PY) tests/fuzz/fuzz_stream.py --seconds $(FUZZ_SECONDS)

lint: $(VENV)/.installed-test  ## ruff and mypy alone
	@$(MAKE) --no-print-directory step-lint step-types

step-lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

step-types: $(VENV)/.installed-test
	$(PY) -m mypy

step-unit: $(VENV)/.installed-test
	$(SIDE_BY_SIDE) --ignore tests/notebooks/test_papermill.py

# Each notebook as committed: its own parameters, its marked outputs compared. All cells of one run in order
# in one process. The longest cell may train for minutes.
step-nbval: $(VENV)/.installed-test
	$(SIDE_BY_SIDE) --no-loadscope-reorder --nbval-lax --nbval-current-env --timeout 900 $(NOTEBOOKS)

# Each notebook from an empty folder, with the parameters and limits of data/notebooks.yaml.
step-papermill: $(VENV)/.installed-test
	rm -rf runs/notebooks
	NOTEBOOK_RUNS=$(CURDIR)/runs/notebooks \
		$(SIDE_BY_SIDE) --dist load --maxschedchunk 1 --durations 0 tests/notebooks/test_papermill.py

step-wheel: $(VENV)/.installed-test
	$(CALM) TORCH_INDEX=$(TORCH_INDEX) $(PY) tests/wheel_check.py

# pip runs again only when bounds or versions changed.
$(VENV)/.installed-test: pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed-run

$(VENV)/.installed-run: pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) -e '.[local,notebooks]'
	@touch $@

$(PY):
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer: apt install python3 python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "needs venv: apt install python3-venv" >&2; exit 1; }
