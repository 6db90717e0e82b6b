# From a clean clone with python3 and a C++ compiler: `make demo` makes a video, `make test` checks everything,
# `make quick` what takes no torch and no model.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install --constraint constraints.txt
# The install is editable, so only what is compiled or declared calls for another one.
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)
TEST_PROCESSES ?= 2
PROMPT ?= two red circles and a blue square drifting left on a dark background

# More requirements of `make test-newest`, such as NEWEST=torch==2.13.0 where another torch is not to be had.
NEWEST ?=

.PHONY: demo test types most-tests quick test-newest clean

demo: .venv/.installed
	mkdir -p demo
	$(BIN)/dualparal generate --prompt "$(PROMPT)" --num-frames 257 --anchor-frames 4 \
		--out demo/video.mp4 --device cpu --stages 2 --overwrite

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory --jobs=2 types most-tests
	$(BIN)/pytest -m alone

# At once: mypy takes a minute of one core, and tests wait for each other now and then.
types: .venv/.installed-dev
	$(BIN)/mypy

most-tests: .venv/.installed-dev
	$(BIN)/pytest -m 'not alone' --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

quick: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q --quick --numprocesses $(TEST_PROCESSES)

# Beside the pinned versions: the newest ones that pyproject.toml allows, in a folder of their own, installed as a user
# installs, and the tests that are quick, or ask diffusers for its own numbers.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --upgrade --upgrade-strategy eager '.[dev]' $(NEWEST)
	.venv-newest/bin/pytest -q --quick
	.venv-newest/bin/pytest -q tests/hosts tests/engine/test_engine.py -k 'diffusers or loaded or argument or blocks'

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/.installed: $(BUILD_INPUTS) | $(BIN)/pip
	$(PIP_INSTALL) -e .
	touch $@

.venv/.installed-dev: $(BUILD_INPUTS) | $(BIN)/pip
	$(PIP_INSTALL) -e '.[dev]'
	touch .venv/.installed $@

clean:
	rm -rf .venv .venv-newest build dist demo *.egg-info dualparal/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
