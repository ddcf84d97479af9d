# `make demo` and `make test` are all a newcomer needs. Both make .venv and install what they use; both can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Two workers, one thread each: two cores are what the suite is sized for.
WORKERS ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-slow browser bench bench-accelerator docs lint format clean

help: ## Say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "Python lacks the venv module: install it (Debian: apt install python3-venv)"; exit 1; }
	@$(PIP) install --upgrade pip

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing ccssl_hf with its $* extra into $(VENV) (a few minutes the first time, most of it torch)"
	@$(PIP) install -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo ## Train supervised, FixMatch and FixMatch+CCSSL on digits, about 5 minutes on two cores
	@echo "Training into outputs/demo (supervised, FixMatch, FixMatch+CCSSL; three seeds each)"
	@PATH="$(abspath $(BIN)):$$PATH" accelerate launch --config_file recipes/accelerate_configs/single_process.yaml \
	  recipes/train_digits.py --config recipes/configs/digits.yaml

test: $(VENV)/.installed-test ## Check style and types, and run the tests, a few minutes on two cores
	@echo "Checking style and types, then running the tests"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed-test ## Run the tests that take longer
	@$(BIN)/python -m pytest -m slow

browser: ## Install Chromium, which the tests of the Space look at its page with (Debian, as root)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get update && timeout 600 apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1; } || \
	  { echo "Chromium could not be installed (Debian, as root: apt-get install chromium)"; exit 1; }

bench: $(VENV)/.installed-test ## Time ours against baselines, about 25 minutes on two quiet cores
	@$(BIN)/python benchmarks/run.py

bench-accelerator: $(VENV)/.installed-test ## Measure steps, views and memory on a GPU
	@$(BIN)/python benchmarks/accelerator.py

docs: $(VENV)/.installed-docs ## Build the documentation into outputs/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "Open outputs/site/index.html"

lint: $(VENV)/.installed-test ## Check style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.installed-test ## Rewrite the code in the project's style
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean: ## Remove .venv and everything that was made
	@rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
