# make demo   sets up and quantizes the embedded model      make test   sets up and runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint typecheck docs bench clean

demo: $(STAMP)
	$(BIN)/cptquant quantize embedded:opt-mini --budget 4bpw --output runs/demo

test: $(STAMP) lint typecheck
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	$(BIN)/python docs/generate_cli_reference.py

clean:
	rm -rf $(VENV) runs/demo

# torch is installed first, at its pinned version: a plain `torch` would take the newest build with CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('cptquant needs Python 3.11 or newer, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $(STAMP)
