# Two commands do everything on a fresh machine: make demo, make test.
.POSIX:
SHELL = /bin/bash
.SHELLFLAGS = -euo pipefail -c
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
SETUP = $(VENV)/.installed
SETUP_DEV = $(VENV)/.installed-dev
# A path with a space breaks the first line of the scripts that pip writes, so none is run directly.
RUN = $(BIN)/python
# Files of tests run side by side; 0 runs them in one process, with its output (-s) and its debugger.
TEST_WORKERS ?= 2

.PHONY: help setup demo test lint types site format supply hooks clean

help:
	@echo "make demo   set up, then videos to an evaluated model, on a CPU or a GPU (VIDEOS=DIR for your own)"
	@echo "make test   set up, then the tests"
	@echo "make setup  create $(VENV) and install Strata with all it needs: 2 GB, or 7 GB with a GPU"
	@echo "make hooks  run the checks before each commit and push"
	@echo "make site   the documentation as pages in build/site"
	@echo "make lint | types | format | clean"
	@echo "make supply known vulnerabilities, licences, tests on the lowest versions allowed"

setup: $(SETUP)

# The builds of torch and DALI that fit this machine: a GPU's driver, or no GPU.
$(SETUP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Strata and its packages into $(VENV) (the first time several minutes)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	@read -r extra place < <($(RUN) tools/choose_build.py); \
	if [ "$$place" != - ]; then \
		$(RUN) -m pip install --quiet --disable-pip-version-check --index-url "$$place" torch torchvision; \
	fi; \
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$$extra,test]"
	@touch $(SETUP)

$(SETUP_DEV): $(SETUP)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(SETUP_DEV)

demo: $(SETUP)
	@$(RUN) tools/demo.py $(if $(VIDEOS),--videos "$(VIDEOS)") $(DEMO_ARGS)

test: $(SETUP)
	@$(RUN) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

lint: $(SETUP_DEV)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m codespell_lib

format: $(SETUP_DEV)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

# The folders are subpackages of strata by pyproject.toml; a type checker wants to see them so.
types: $(SETUP_DEV)
	@rm -rf $(VENV)/typecheck && mkdir -p $(VENV)/typecheck/strata
	@for f in strata/*; do ln -s "$(CURDIR)/$$f" $(VENV)/typecheck/strata/; done
	@for d in preprocess dataload train eval tools; do ln -s "$(CURDIR)/$$d" $(VENV)/typecheck/strata/; done
	@$(RUN) -m pyright --warnings

# Dead links and pages that cannot be made fail.
site: $(SETUP_DEV)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

supply: $(SETUP_DEV)
	@$(RUN) .ci/supply_chain.py

hooks: $(SETUP_DEV)
	@$(RUN) -m pre_commit install

clean:
	rm -rf build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
