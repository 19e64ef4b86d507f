# The commands of this repository. `make setup` needs Python 3.11 or later with pip, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One more than cores: many tests wait for processes that they have started.
TEST_PROCESSES ?= 3
STAMP := $(VENV)/.installed
MANIFESTS := constraints.txt pyproject.toml $(wildcard packages/*/pyproject.toml)
PACKAGES := $(patsubst %/pyproject.toml,-e %,$(wildcard packages/*/pyproject.toml))

.PHONY: setup demo compare test test-fast lint

setup: $(STAMP)

# DeepSpeed has no wheel: DS_BUILD_OPS=0 leaves its CUDA operators to be built when first used.
$(STAMP): $(MANIFESTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "setuptools>=77" wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt $(PACKAGES) -e ".[test,lint]"
	touch $(STAMP)

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" bash launch/demo.sh

compare: setup
	PATH="$(abspath $(BIN)):$$PATH" bash launch/compare.sh

# Files in the order of their names: those with few, long tests would come last otherwise.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile \
	--no-loadscope-reorder

# Bytecode is made once, as every process that a test starts would compile the sources otherwise.
test: setup
	$(BIN)/python -m compileall -q packages examples tests
	$(PYTEST)

# No process is launched, nothing is trained and no other library's model is built: what to run
# between two edits.
test-fast: setup
	$(PYTEST) -m "not slow and not gpu" --durations=10

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
