# Everything that a contributor types. `make demo` and `make test` set up .venv themselves, in a fresh clone too.
VENV   ?= .venv
BIN    := $(VENV)/bin
# A name on PATH may be a shim for a version that is not there: ask each whether it runs.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Small models: threads that wait for each other cost more than they bring.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
DEMO   := build/demo

.PHONY: setup demo test slow transformers4 gpu lint types check docs fix startup clean

setup: $(VENV)/.dev  ## .venv with everything that tests need

# The run-time: light core and llama.cpp, no torch. What a user of `pip install 'efficli[gguf]'` has.
$(VENV)/.run: pyproject.toml constraints.txt scripts/install-llama.sh
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv on PATH" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "set-up: $(VENV) ($$($(PYTHON) --version))"; $(PYTHON) -m venv $(VENV); }
	@echo "set-up: llama-cpp-python (built once in about 2 minutes, then taken from a cache)"
	@bash scripts/install-llama.sh $(BIN)/python
	@echo "set-up: efficli and what it runs on"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "set-up: torch, transformers and the test tools"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.run  ## the main job on the checkpoint that comes with efficli
	$(BIN)/efficli export reference -o $(DEMO) --type Q4_K_M --force
	$(BIN)/efficli try $(DEMO) --base reference -p "def read_lines(path):" -n 48
	@echo; echo "The files are in $(DEMO):"; ls -l $(DEMO)

test: $(VENV)/.dev  ## the fast tier: no network, no GPU
	$(PYTEST) -m "not slow and not gpu"

slow: $(VENV)/.dev  ## the slow tier: whole families, sweeps, real checkpoints
	$(PYTEST) -m "slow and not gpu" --durations=10

# The other supported line of transformers, which writes other configs and tokenizers. Of the tested set only what does
# not depend on it is kept: it wants an older huggingface_hub, and that older data sets.
TRANSFORMERS4 := 4.57.6
KEPT          := '^(torch|llama_cpp_python|gguf|numpy|safetensors|sentencepiece|pytest|hypothesis|typer|rich)=='

.venv4/.dev: pyproject.toml constraints.txt scripts/install-llama.sh
	@test -x .venv4/bin/python || $(PYTHON) -m venv .venv4
	@bash scripts/install-llama.sh .venv4/bin/python
	@grep -E $(KEPT) constraints.txt >.venv4/constraints.txt
	@echo "transformers==$(TRANSFORMERS4)" >>.venv4/constraints.txt
	@.venv4/bin/python -m pip install -qq -c .venv4/constraints.txt -e '.[dev]'
	@touch $@

transformers4: .venv4/.dev  ## the tests that run transformers, under its release 4
	OMP_NUM_THREADS=1 .venv4/bin/python -m pytest -q -m "not slow and not gpu" \
	  tests/export tests/bench tests/network tests/pipeline tests/test_families.py

gpu: $(VENV)/.dev  ## tests that need a CUDA device
	$(PYTEST) -m gpu

check: lint types test  ## what has to be green before a commit

lint: $(VENV)/.dev
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/python tests/sizes.py
	$(BIN)/python tests/cli_docs.py --check
	$(BIN)/python benchmarks/page.py --check

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev  ## writes docs/cli.md from the help texts, and the page of benchmark results
	$(BIN)/python tests/cli_docs.py
	$(BIN)/python benchmarks/page.py

fix: $(VENV)/.dev
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .

startup: $(VENV)/.run  ## CPU milliseconds of --help beside a bare Typer app
	$(BIN)/python tests/startup.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find efficli tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
