# Two commands matter most: `make demo` and `make test`. `make help` lists the rest.
# PYTHON chooses the interpreter (3.11 or newer); everything is installed into .venv and nowhere else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
# `make check FAST_TESTS=no` leaves the tests to a `make test` that follows.
FAST_TESTS ?= yes

.DEFAULT_GOAL := help
.PHONY: help setup models check format lint fast-tests test sanitize demo demo-short bench bench-attention results-weights results-weights-gemma docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY)  ## make .venv with the pinned dependencies and a CPU build of torch
	@echo "$(VENV) is ready"

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "memcompile needs Python 3.11 or newer"; exit 1; }
	@echo "setting up $(VENV) (about 3 GB, a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools torch
	@$(PIP) --no-build-isolation -e '.[cpu,triton,tvm,dev]'
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	@touch $@

models: $(MODEL)  ## fetch SmolLM2-135M-Instruct (93 MB) into models/

$(MODEL): | $(READY)
	@$(BIN)/python examples/fetch_model.py

check: lint  ## format, ruff, mypy, import rules, docs, fast tests
ifneq ($(FAST_TESTS),no)
	@$(MAKE) --no-print-directory fast-tests
endif

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

format: $(READY)  ## let ruff format the sources and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fast-tests: $(READY)
	$(PYTEST) -m "not slow"

test: $(READY)  ## the whole test suite; the slow tests use the real model
	@$(MAKE) --no-print-directory models || echo "the tests that need the real model will be skipped"
	$(PYTEST)

# A finding ends the run. Leaks are not looked for: the interpreter has its own.
sanitize: export CXXFLAGS := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: export ASAN_OPTIONS := detect_leaks=0
sanitize: export OMP_NUM_THREADS := 1
sanitize: $(READY)  ## the kernels' own tests under the address and undefined-behaviour sanitizers
	$(BIN)/python -c 'from memcompile.kernels import build; print(build())'
	LD_PRELOAD=$$($${CXX:-g++} -print-file-name=libasan.so) $(BIN)/python -m pytest -n 0 -s -q -p no:cacheprovider tests/kernels

demo: $(MODEL)  ## rewrite SmolLM2 for 4,000-token prompts, compare, generate text
	$(BIN)/python examples/demo.py

demo-short: $(MODEL)  ## the demo at 1,024 tokens with a quick evaluation
	$(BIN)/python examples/demo.py --short

bench: $(MODEL)  ## the benchmark table (quiet machine, about an hour)
	$(BIN)/python -m benchmarks

results-weights: $(MODEL)  ## weights in fewer bits beside OpenVINO GenAI and onnxruntime-genai int4 (quiet machine, about 40 minutes)
	@$(PIP) -e '.[rivals]'
	$(BIN)/python -m benchmarks.weights

GEMMA := models/gemma-3-270m-q4_k_m.gguf

$(GEMMA): | $(READY)
	@$(BIN)/python examples/fetch_model.py --model gemma3-270m

results-weights-gemma: $(GEMMA)  ## the same of Gemma 3 270M (238 MB, Gemma terms; quiet machine, an hour or two)
	@$(PIP) -e '.[rivals]'
	$(BIN)/python -m benchmarks.weights --model $(GEMMA)

bench-attention: $(READY)  ## the attention kernels beside torch's and ONNX Runtime's (quiet machine, a quarter of an hour)
	$(BIN)/python -m benchmarks.attention

docs: $(READY)  ## write the generated pages of docs/ again
	$(BIN)/python docs/generate.py

clean:  ## remove what was built; keeps .venv and models/
	rm -rf out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
