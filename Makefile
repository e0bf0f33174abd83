# `make demo` and `make test` set up everything they need: a virtual environment, pinned packages, smalti itself.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.smalti-installed
# How long a thread spins before it sleeps. Sleeping at once costs a third of the speed on idle cores; spinning for
# long, the default, costs far more when something else wants the second core.
export GOMP_SPINCOUNT ?= 20000

.PHONY: help setup demo demo-latents test test-long test-faults lint gpu clean

help:
	@echo "make demo   train the four backbones on the shipped emoji (under 20 minutes on 2 cores), and a page that compares them"
	@echo "make demo-latents   the same images through an autoencoder: train it, train on its latents, sample, evaluate (12 minutes)"
	@echo "make test   run the tests (some minutes); make test-long runs the long ones that it leaves out"
	@echo "make test-faults   the failure table of docs/reliability.md at full count (at most 15 minutes on 2 cores)"
	@echo "make lint   layering, style and types"
	@echo "make gpu    CUDA tests and benchmarks; says so and stops where there is no GPU"
	@echo "make clean  remove the virtual environment (runs stay)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "smalti needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and by exact version: any other way to name it may bring gigabytes of CUDA packages
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/smalti demo

demo-latents: $(STAMP)
	$(BIN)/python tools/demo_latents.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m 'not long'

# What is long and a row of the failure table runs in test-faults, at full count.
test-long: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m 'long and not faults'

test-faults: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m faults --full-faults

lint: $(STAMP)
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	$(PYTHON) tools/gpu.py

clean:
	rm -rf $(VENV)
