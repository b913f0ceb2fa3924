# Everything a new user or a CI machine runs. `make help` lists it; each target also stands in README.md as plain lines.
PYTHON ?= python3
BIN := .venv/bin
DIGITS := datasets/digits
# two files of tests at a time; a file's tests share what they have trained
PARALLEL := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help quickstart claim ablations notebooks test test-all test-slow-share faults bench lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/.quickstart $(DIGITS)/dataset.json ## install, prepare the digits, train: 1- and 2-step samples in minutes
	$(BIN)/python lightning_cli.py fit --config configs/experiment/quickstart.yaml

claim: .venv/.quickstart $(DIGITS)/dataset.json ## MeanFlow's claim, small: 1 step against flow matching at 1 to 32, into docs/results.md: 20 minutes
	$(BIN)/python -m scripts.claim $(ARGS)

ablations: .venv/.quickstart $(DIGITS)/dataset.json ## the paper's ablations, small, beside its table, into docs/results.md: an hour
	$(BIN)/python -m scripts.ablations $(ARGS)

test: .venv/.dev ## install with the dev extra and run every test not marked slow
	$(BIN)/python -m pytest $(PARALLEL)

test-all: .venv/.dev ## the slow tests too: the whole quickstart, two processes, a built wheel
	$(BIN)/python -m pytest -m "slow or not slow"

test-slow-share: .venv/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m slow -k "not quickstart and not killed_runs and not compiled" tests/test_torchrun.py tests/test_slow.py tests/faults
	$(BIN)/python -m tests.faults --kills 4 --seed 1

faults: .venv/.dev ## kill runs at random moments, resume them, compare: 25 kills, about 5 minutes (python -m tests.faults --kills N)
	$(BIN)/python -m tests.faults --kills 25

notebooks: .venv/.dev ## run the notebooks, put their pictures into docs/images: about 4 minutes
	$(BIN)/python -m scripts.notebooks $(ARGS)

bench: .venv/.dev ## the training step against flow matching, and sampling: figures of this machine, about 5 minutes
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/sample.py

lint: .venv/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove the virtual environment (data and runs stay)
	rm -rf .venv

$(DIGITS)/dataset.json: | .venv/.quickstart
	$(BIN)/python -m mf_lightning prepare-digits $(DIGITS)

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/.quickstart: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e '.[quickstart]'
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@
