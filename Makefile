# Everything CI runs, and nothing else. VENV may point anywhere; PYTHON is what creates it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread each beat one of two on small models; benches set their own threads.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test test-all lint fmt bench clean

demo: $(VENV)/.base
	$(BIN)/foretell demo

test: $(VENV)/.dev
	$(TESTS) -m "not slow and not gpu"

test-all: $(VENV)/.dev
	$(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/decode.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: an open range may pull several GB of GPU packages.
$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
