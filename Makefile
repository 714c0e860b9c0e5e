# Every target sets itself up: a bare Python >= 3.11 is enough. Another interpreter: `make test PYTHON=python3.12`.
# CPU-only torch on Linux: `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
HALF := .venv-half-built
LLAMA_CPP := 0.3.36
PIP := $(BIN)/python -m pip --disable-pip-version-check

# pip refuses to touch the Python that lies under a broken .venv.
export PIP_REQUIRE_VIRTUALENV := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test slow contract gguf-test docs lint format bench clean

help:
	@echo "make demo    fine-tune the shipped model, prune it by 30 %, save it, reload it (offline)"
	@echo "make test    the test suite, without the slow tests"
	@echo "make slow    the slow tests"
	@echo "make contract   what every family must pass; on another transformers: make contract TRANSFORMERS=5.15.0 (or newest)"
	@echo "make gguf-test  build llama.cpp (some ten minutes, needs a C++ compiler), and run saved files in it"
	@echo "make docs    pages and API reference into build/docs/index.html; a link inside that leads nowhere is an error"
	@echo "make lint    ruff, format check, mypy"
	@echo "make format  let ruff mend what it can"
	@echo "make bench   what pruning costs and what it brings, as ratios"
	@echo "make clean   remove .venv and caches; runs/ and pruned/ stay"

demo: $(READY)
	@$(BIN)/python recipes/demo.py

# A file of tests stays in one process: its tests share models and plans. Some 1 GB for each process.
TOGETHER := -n $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 4))') --dist loadfile

test: $(READY)
	@$(BIN)/python -m pytest -q $(TOGETHER)

slow: $(READY)
	@$(BIN)/python -m pytest -q -m slow $(TOGETHER)

# Another version lies in a folder in front of .venv; a warning of one that we are not written for is no error.
TRANSFORMERS ?= pinned
OTHER := .venv-transformers/$(TRANSFORMERS)

contract: $(READY)
ifeq ($(TRANSFORMERS),pinned)
	@$(BIN)/python -m pytest -q $(TOGETHER) -m "slow or not slow" -k "not on_more_models" tests/test_testing.py
else
	@rm -rf $(OTHER) && mkdir -p $(OTHER)
	@grep -vE '^(transformers|tokenizers|huggingface)' .ci/constraints.txt > $(OTHER)/constraints.txt
	@$(PIP) install -qq --target $(OTHER) -c $(OTHER)/constraints.txt transformers$(if $(filter newest,$(TRANSFORMERS)),,==$(TRANSFORMERS))
	@PYTHONPATH=$(OTHER) $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	@PYTHONPATH=$(OTHER) $(BIN)/python -m pytest -q $(TOGETHER) -m "slow or not slow" -k "not on_more_models" -W default tests/test_testing.py
endif

# Not in the constraints: nothing else needs it, and it is built from source.
gguf-test: $(READY)
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null \
		|| { echo "building llama-cpp-python $(LLAMA_CPP) (once; some ten minutes on two cores)"; \
		     CMAKE_ARGS=-DLLAVA_BUILD=OFF $(PIP) install -qq -c .ci/constraints.txt llama-cpp-python==$(LLAMA_CPP); }
	@$(BIN)/python -m pytest -q -m gguf

docs: $(READY)
	@$(BIN)/python -c 'import furo, myst_parser, sphinx_copybutton' 2>/dev/null || $(PIP) install -qq -c .ci/constraints.txt -e ".[docs]"
	@$(BIN)/python -m sphinx -W --keep-going -q -E -b html .docs build/docs
	@echo "build/docs/index.html"

lint: $(READY)
	@failed=0; \
	$(BIN)/ruff check . || failed=1; \
	$(BIN)/ruff format --check --output-format concise . || { echo "to be reformatted, see: make format"; failed=1; }; \
	$(BIN)/mypy || failed=1; \
	exit $$failed

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY)
	@$(BIN)/python recipes/benchmark.py

# An interrupted set-up leaves a marker beside .venv, where emptying .venv does not lose it, and is built anew: pip would
# take a half-written package for an installed one. So is a .venv that is no environment: without its pyvenv.cfg,
# .venv/bin/python is the base Python.
$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lit_prune needs Python >= 3.11, $(PYTHON) is older or missing; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@rm -f $(READY)
	@if [ ! -e $(HALF) ] && $(BIN)/python -c 'import sys, pip; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then \
		echo "bringing .venv up to date"; touch $(HALF); \
	else \
		echo "setting up .venv (once; about 2 GB, some minutes)"; touch $(HALF); $(PYTHON) -m venv --clear .venv; \
	fi
	@$(PIP) install -qq -c .ci/constraints.txt -e ".[dev]"
	@touch $(READY) && rm -f $(HALF)

clean:
	rm -rf .venv $(HALF) .venv-transformers build dist .mypy_cache .pytest_cache .ruff_cache
	find lit_prune tests recipes -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
