# `make` alone lists the targets. Everything runs from .venv, which is made on first use and brought up to date when
# pyproject.toml has changed. Only make and a Python 3.11 or 3.12 are needed beforehand. Variables:
#   PYTHON  the Python that makes .venv            make install PYTHON=/opt/python3.12/bin/python3
#   ARGS    further arguments for the command      make test ARGS='-k redis'   make serve ARGS='--port 9000'

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
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

.PHONY: help install demo serve check test bench score-nano train-nano format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Install Glimmer with everything for development into .venv

demo: $(STAMP) ## Start a server, make a picture through HTTP into out/demo.png, stop the server
	@$(BIN)/python -m server.demo $(ARGS)

serve: $(STAMP) ## Serve on http://127.0.0.1:8000 until Ctrl+C
	@$(BIN)/glimmer serve $(ARGS)

check: $(STAMP) ## Formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

test: check ## All checks and all tests; what continuous integration runs
	$(BIN)/pytest $(ARGS)

bench: $(STAMP) ## Measure throughput and latency against the reference pipeline
	@$(BIN)/python -m benchmarks.throughput $(ARGS)

score-nano: $(STAMP) ## Whether the default checkpoint draws held-out prompts as asked
	@$(BIN)/python -m benchmarks.nano_quality $(ARGS)

train-nano: $(STAMP) ## Train the default checkpoint again, into out/nano-checkpoint; hours on a CPU, resumable
	@$(BIN)/python -m models.nano.train --out out/nano-checkpoint $(ARGS)

format: $(STAMP) ## Format the code and apply the lint fixes that are safe
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

clean: ## Remove .venv, caches and everything that was built
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an installation that was interrupted is taken up again.
$(STAMP): pyproject.toml
	@$(BIN)/python -c 'import pip; $(SUPPORTED)' 2>/dev/null || $(MAKE_VENV)
	@echo "Installing Glimmer and its dependencies into $(VENV); the first time this takes some minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_NOISE) --editable '.[dev]'
	@touch $@
