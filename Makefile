# Every target creates .venv when needed; nothing but Python 3.11 and make has to be there before.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
# The networks here are small: more threads would only wait for each other.
export OMP_NUM_THREADS ?= 1
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-rl examples paper uses test test-cuda test-distributed-cuda format lint type check docs bench matrix dist clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt hesscale_lightning/_version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(STAMP)  ## create .venv with the pinned versions

demo: $(STAMP)  ## train digits at rates over three decades, with curvature and without (SHORT=1: a few epochs, as CI does)
	$(BIN)/python examples/lightning/demo.py $(if $(SHORT),--short)

demo-rl: $(STAMP)  ## train PPO on CartPole with AdaHesScale and with Stable-Baselines3's own policy, draw both curves
	$(BIN)/python examples/reinforcement_learning/train.py --compiled true --required_return 475

examples: $(STAMP)  ## run every example config in full
	for config in examples/lightning/*.yaml; do \
		echo "== $$config"; $(BIN)/python -m hesscale_lightning fit --config $$config || exit 1; \
	done
	$(BIN)/python examples/lightning/plot_curvature.py --log "$$(ls -td outputs/digits_curvature/version_* | head -1)"

paper: $(STAMP)  ## reproduce docs/approximation.md (QUICK=1: in minutes, into outputs/)
	for script in approximation_quality computational_cost rank_one_training; do \
		$(BIN)/python examples/paper/$$script.py $(if $(QUICK),--quick,--write docs/approximation.md) || exit 1; \
	done

uses: $(STAMP)  ## redo the comparisons of docs/uses.md (QUICK=1: in two minutes, into outputs/); Laplace if laplace-torch is there
	for use in pruning quantization laplace; do \
		if [ $$use = laplace ] && ! $(BIN)/python -c "import laplace" 2>/dev/null; then \
			echo "left out: Laplace posteriors need laplace-torch; docs/uses.md says how to install it"; \
			continue; \
		fi; \
		$(BIN)/python examples/uses/$${use}_comparison.py $(if $(QUICK),--quick,--write docs/uses.md) || exit 1; \
	done

test: $(STAMP)  ## the whole test suite, doctests included
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-cuda: $(STAMP)  ## the tests that need a GPU, on one
	$(BIN)/python -m pytest -m cuda $(PYTEST_ARGS)

test-distributed-cuda: $(STAMP)  ## the tests of several processes on as many GPUs, over NCCL (what needs more is skipped)
	HESSCALE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/distributed -n 0 $(PYTEST_ARGS)

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(STAMP)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)  ## check types
	$(BIN)/mypy

docs: $(STAMP)  ## run every example of the pages and docstrings, build the site into build/docs, look up its links
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_readme.py hesscale_lightning sb3_integration $(PYTEST_ARGS)
	$(BIN)/sphinx-build -b html -W --keep-going -q -E docs build/docs
	$(BIN)/python docs/check_links.py build/docs
	@echo "site: build/docs/index.html"

check: lint type test  ## what CI checks: lint, types, tests

bench: $(STAMP)  ## measure the cost of curvature, in time and memory, and of an optimizer's step
	$(BIN)/python -m benchmarks.curvature
	$(BIN)/python -m benchmarks.account
	$(BIN)/python -m benchmarks.structures
	$(BIN)/python -m benchmarks.optimizer_step
	$(BIN)/python -m benchmarks.output
	$(BIN)/python -m benchmarks.lightning_step
	$(BIN)/python -m benchmarks.rank_one
	$(BIN)/python -m benchmarks.sb3_train
	$(BIN)/python -m benchmarks.compiled_step

matrix: $(STAMP)  ## the test suite on every supported torch and Python that is here (gigabytes; PYTEST_ARGS="-n 2")
	$(BIN)/nox -s tests -- $(PYTEST_ARGS)

dist: $(STAMP)  ## build wheel and sdist, check them, use the wheel from an empty environment and another folder
	$(BIN)/nox -s dist installed

clean:  ## remove what runs leave behind, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .nox lightning_logs outputs
