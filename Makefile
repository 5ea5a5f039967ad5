# make demo   sets up and quantizes the embedded model      make test   sets up and runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
comma := ,

.PHONY: demo test test-engines lint typecheck docs bench clean

demo: $(STAMP)
	$(BIN)/cptquant quantize embedded:opt-mini --budget 4bpw --output runs/demo

# Two processes of one thread each take little more than half the time of one with two threads, which wait for each other.
test: $(STAMP) lint typecheck
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not engines" -n 2 --dist worksteal

# ONNX Runtime comes as a wheel. llama-cpp-python is compiled (about 20 minutes on 2 cores): asked for by LLAMACPP=1, or
# tested where it is installed already.
test-engines: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[onnx$(if $(LLAMACPP),$(comma)llamacpp)]"
	$(BIN)/python -m pytest -m engines

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .
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
