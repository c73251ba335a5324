# Each target does all its own set-up: make demo and make test work on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Compiled files make importing the stack three times as fast; some machines switch them off.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,tensorboard,quantized]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/onlay demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff check onlay tests recipes bench docs
	$(BIN)/ruff format --check onlay tests bench docs

types: $(VENV)/installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
