# Two commands to start with: `make serve` and `make test`. Everything they need lands in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
PIP_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help serve profile browser test test-training lint types contracts audit check bench train clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.run ## Serve the bundled small model on the CPU (options: make serve ARGS="--ranks 4")
	@$(BIN)/tetriserve serve $(ARGS)

profile: $(VENV)/.run ## Measure a profile of the bundled model
	@$(BIN)/tetriserve profile $(ARGS)

browser: ## Install the Chromium of tests/browser, where apt-get may
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq \
		&& apt-get install -qq -y --no-install-recommends chromium; } || echo "no Chromium: tests/browser will be skipped"

# Two processes on two cores. Whole modules go to one of them until the other has nothing left to do.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(VENV)/.dev ## Run the test suite
	$(BIN)/pytest $(PARALLEL) $(ARGS)

test-training: $(VENV)/.dev ## Run the tests of the training code, which train for minutes
	$(BIN)/pytest $(PARALLEL) tests/training $(ARGS)

lint: $(VENV)/.dev ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Types
	$(BIN)/mypy

contracts: $(VENV)/.dev ## Import contracts
	$(BIN)/lint-imports

audit: $(VENV)/.dev ## Known vulnerabilities of what is installed, if the advisory service can be asked
	@$(BIN)/python .ci/audit

check: lint types contracts audit test ## Everything that CI runs

bench: $(VENV)/.run ## Speed, as ratios measured in one run
	$(BIN)/python benchmarks/policy_decision.py
	$(BIN)/python benchmarks/execution.py
	$(BIN)/python benchmarks/simulation.py

# The defaults suit one CPU core. On a GPU: make train TRAIN_ARGS="--device cuda --workers 16" VAE_MINUTES=10 DEAF_MINUTES=4 DIT_MINUTES=10 GUIDED_MINUTES=6
TRAIN_ARGS ?=
VAE_MINUTES ?= 30
TEXT_MINUTES ?= 10
DEAF_MINUTES ?= 60
DIT_MINUTES ?= 200
GUIDED_MINUTES ?= 100
# On a CPU much time would go into page faults, were freed memory given back.
TRAIN = MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 \
	$(BIN)/python -m training $(TRAIN_ARGS)

train: $(VENV)/.run ## Train the bundled model anew, into out/training, for as long as *_MINUTES say
	$(TRAIN) vae --minutes $(VAE_MINUTES) --decay 0.5
	$(TRAIN) latents
	$(TRAIN) vae --decoder-only --rate 1e-3 --minutes $(VAE_MINUTES) --decay 0.5
	$(TRAIN) text --minutes $(TEXT_MINUTES) --rate 3e-3 --decay 0.5
	$(TRAIN) dit --minutes $(DEAF_MINUTES) --rate 3e-3
	$(TRAIN) hear
	$(TRAIN) dit --minutes $(DIT_MINUTES) --rate 3e-3
	$(TRAIN) dit --minutes $(GUIDED_MINUTES) --rate 2e-3 --decay 1 --guidance 2.5
	$(TRAIN) export
	$(BIN)/tetriserve evaluate out/training/pipeline --sizes 256x256,512x512,1024x1024 --sheet out/training/sheet.png

clean: ## Remove the virtual environment
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "TetriServe needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# What serving needs, and on top of it what developing needs.
$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[dev]'
	@touch $@ $(VENV)/.run
