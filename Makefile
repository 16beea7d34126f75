# The two commands of the project: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed

.PHONY: demo test lint types docs coverage-models

demo: $(DONE)
	$(BIN)/svdpeft compare --no-search --out runs/demo

test: lint types
	$(BIN)/python -m pytest -n auto --dist loadgroup

# Every family of timm and many architectures of transformers; writes docs/coverage-*.md.
coverage-models: $(DONE)
	$(BIN)/python benchmarks/coverage.py timm
	$(BIN)/python benchmarks/coverage.py transformers

# A page and a picture per method, made from the classes.
docs: $(DONE)
	$(BIN)/python docs/build.py

lint: $(DONE)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DONE)
	$(BIN)/pyright

# Everything comes from pyproject.toml; the stamp makes a second run start at once.
$(DONE): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(DONE)
