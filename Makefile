PYTHON ?= python3
# Which extras to install, for instance EXTRAS=dev,all.
EXTRAS ?= dev

# Options of the soak, which lists them with SOAK=--help.
SOAK ?= --jobs 2

# Two processes, each with one half of the tests, so that what one file compiles is compiled once; who is done first
# takes from the other.
SPREAD := -n 2 --dist worksteal

VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.installed-$(EXTRAS)
TORCH := $(shell grep -E '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test smoke test-all soak lint bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## Compile a few layers, check them against their definition, and write a report
	@$(BIN)/tttc demo

test: $(STAMP) ## Run the tests, but for the slow ones
	$(BIN)/python -m pytest -q $(SPREAD) -m "not slow"

smoke: $(STAMP) ## Run a few tests of every room, in a minute and a half: what a commit is checked with
	$(BIN)/python -m pytest -q $(SPREAD) -m "not slow" @tests/smoke.txt

test-all: $(STAMP) ## Run all the tests
	$(BIN)/python -m pytest -q $(SPREAD)

soak: $(STAMP) ## Draw declarations without end and compare them with the definition: make soak SOAK="--seconds 600"
	$(BIN)/python -m tests.soak $(SOAK)

lint: $(STAMP) ## Check style, format and types, and print the size of each folder
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tttc
	$(BIN)/python -m tests.house

bench: $(STAMP) ## Measure on this CPU: every variant, the torch backend, chunks, context, ONNX Runtime, networks
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.torch_backend
	$(BIN)/python -m benchmarks.chunks
	$(BIN)/python -m benchmarks.context
	$(BIN)/python -m benchmarks.onnx
	$(BIN)/python -m benchmarks.end_to_end

clean: ## Remove what builds and tests leave behind (.venv stays)
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch goes first and by its exact version: asked for by a range, pip would take the newest release, whose default
# Linux build brings several gigabytes of CUDA packages. What pip compiles to bytecode on one core takes as long as all
# else; some files of torch are for later Pythons, which pip does not mind either.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "tttc needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is not one: try make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing tttc[$(EXTRAS)] with $(TORCH) into $(VENV), which takes a minute or two ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@$(PIP) install --no-compile -c constraints.txt "$(TORCH)"
	@$(PIP) install --no-compile -c constraints.txt -e ".[$(EXTRAS)]"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@
