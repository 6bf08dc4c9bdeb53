# One command a task. All of them share one virtual environment, made from nothing when it is not there.
#
#   make test                        in .venv
#   make test VENV=/tmp/other        in another virtual environment
#   make test PYTHON=python3         in this Python's environment as it is: nothing is installed into it
#   make compat TORCH=torch==2.4.1   in an environment of its own with that torch
#
# Needs python3 >= 3.10, a C++17 compiler and make. pip's own settings (an index with CPU-only torch, say) are honoured.

VENV ?= .venv
# The site's generator imports neither torch nor onepass, and stays out of their environment.
DOCS_VENV ?= .venv-docs
BASE_PYTHON ?= python3
# Installed before what depends on it, so that pip does not choose another.
TORCH ?= torch==2.13.0
# `make demo` in a new environment installs less: no tools, and no CUDA kernels beside a torch without CUDA.
ifeq ($(MAKECMDGOALS)$(PYTHON)$(wildcard $(VENV)/.onepass-installed),demo)
  FOR := -for-demo
  EXTRAS ?= demo
  ONEPASS_CUDA ?= $(shell $(PY) -c "import torch; print('AUTO' if torch.version.cuda else 'OFF')")
endif
# Extras of pyproject.toml to install. "models", for BENCH=training, is large.
EXTRAS ?= demo bench test lint
PYTEST_ARGS ?=
# CUDA kernels: AUTO where nvcc is found, ON, OFF.
ONEPASS_CUDA ?= AUTO
# Python versions to build wheels for; empty: all that are found.
WHEELS ?=
BENCH ?= optimizers wrappers layers
BENCH_ARGS ?=
RESULTS ?= benchmarks/results

SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc python -type f -not -name '*.so' -not -name '*.pyc')
NATIVE = $(shell find csrc tests/cuda_on_host benchmarks -name '*.[ch]' -o -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

ifdef PYTHON
  # The environment as it is, the package beside it in build/site.
  PY := $(PYTHON)
  SITE := build/site
  ENVIRONMENT :=
  PACKAGE := $(SITE)/.installed
  DOCS_PY := $(PYTHON)
  DOCS_ENVIRONMENT :=
  INSTALL := --upgrade --target $(SITE)
  export PYTHONPATH := $(abspath $(SITE))
else
  PY := $(VENV)/bin/python
  ENVIRONMENT := $(VENV)/.dependencies-installed$(FOR)
  PACKAGE := $(VENV)/.onepass-installed$(FOR)
  DOCS_PY := $(DOCS_VENV)/bin/python
  DOCS_ENVIRONMENT := $(DOCS_VENV)/.dependencies-installed
  INSTALL := --force-reinstall
endif

# Compiled files stay in build/, one folder an environment: an edit recompiles only what it touches.
BUILD_DIR := build/$(patsubst .%,%,$(notdir $(abspath $(or $(SITE),$(VENV)))))-{wheel_tag}
PIP := $(PY) -m pip --disable-pip-version-check --quiet
BUILD_FLAGS := --no-build-isolation --no-deps --config-settings=build-dir=$(BUILD_DIR)

.DEFAULT_GOAL := help
.PHONY: help demo lectures test compat test-sanitized test-cuda-host cross gate lint docs bench gpu wheels clean
.DELETE_ON_ERROR:

help: ## This list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(PACKAGE) ## Train three networks with torch and with onepass: table and demo.png
	$(PY) -m onepass demo --plot demo.png

lectures: $(PACKAGE) ## The pictures of docs/lectures.md, each computed and checked
	$(PY) examples/lectures/gallery.py

test: $(PACKAGE) ## Tests of the package; PYTEST_ARGS="-k adam" for some
	$(PY) -m pytest --ignore=tests/cuda_on_host $(PYTEST_ARGS)

compat: ## The tests with another torch: make compat TORCH=torch==2.4.1
	$(MAKE) test VENV=.venv-$(subst ==,-,$(TORCH)) TORCH='$(TORCH)' EXTRAS='test' ONEPASS_CUDA=OFF

test-sanitized: $(PACKAGE) ## Tests of the CPU kernels under Address- and UndefinedBehaviorSanitizer
	$(PY) tests/sanitized.py $(PYTEST_ARGS)

test-cuda-host: $(PACKAGE) ## The same tests on the CUDA kernels, run on the CPU with sanitizers; mutants
	$(PY) tests/cuda_on_host/run.py
	$(PY) -m pytest tests/cuda_on_host

cross: $(ENVIRONMENT) ## The CPU engine on aarch64, cross-compiled and emulated, against this processor's
	$(PY) tests/cross/run.py

gate: $(PACKAGE) ## What nvcc made of the CUDA kernels: registers, spills, wide accesses, bytes in flight
	$(PY) tests/cuda_on_host/compile_gate.py $(subst {wheel_tag},*,$(BUILD_DIR)) \
	  --budget 'double|Adadelta|Adam<true>|RMSprop|Sgd<true>|Lion|apply_stored|(float|half|bfloat16), true>|row_norm|batch_=128'
	$(PY) tests/cuda_on_host/machine_model.py $(subst {wheel_tag},*,$(BUILD_DIR)) --json build/machine-model.json

lint: $(ENVIRONMENT) ## Style and types of Python, style of C++ and CUDA, spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(PYTHON),,$(VENV)/bin/)clang-format --dry-run -Werror $(NATIVE)
	$(if $(PYTHON),,$(VENV)/bin/)codespell

docs: $(DOCS_ENVIRONMENT) ## The site, in site/: open site/index.html, no server needed
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build --strict --quiet

bench: $(PACKAGE) ## Against torch and the memory's limit; BENCH=layers BENCH_ARGS="--filter LayerNorm" for some
	set -e; for benchmark in $(BENCH); do $(PY) benchmarks/$$benchmark.py --out $(RESULTS) $(BENCH_ARGS); done

wheels: ## Wheels and a source distribution in dist/, tried in empty environments; WHEELS="3.11" for some
	$(or $(PYTHON),$(BASE_PYTHON)) .ci/wheels.py --torch '$(TORCH)' --cuda $(ONEPASS_CUDA) $(WHEELS)

clean: ## Remove what was built; the virtual environment stays
	rm -rf build dist site demo.png .pytest_cache .mypy_cache .ruff_cache .hypothesis python/onepass/_C*.so
	find python tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# On a machine with a GPU, torch with CUDA, nvcc, pybind11, scikit-build-core, CMake and pytest; no network is used. Ends
# within 8 minutes: a part that runs out of its time is stopped and what it has found so far is printed and saved. While the
# tests run, the kernels are built with other constants as well, and then measured; benchmarks/tune.py chooses.
GPU_SITE := build/gpu-site
GPU_VARIANTS := build/gpu-variants
GPU_ARCHS ?= native
GPU_TEST_SECONDS ?= 105
GPU_BENCH_SECONDS ?= 100
gpu: $(ENVIRONMENT) ## Build for this machine's GPU, test and benchmark on it
	rm -rf $(GPU_SITE) $(GPU_VARIANTS)
	timeout --kill-after=5 110 $(PIP) install --no-index --no-build-isolation --no-deps --target $(GPU_SITE) \
	  --config-settings=build-dir=build/gpu-{wheel_tag} --config-settings=cmake.define.ONEPASS_CUDA=ON \
	  --config-settings=cmake.define.ONEPASS_CUDA_ARCHS=$(GPU_ARCHS) --config-settings=cmake.define.ONEPASS_TUNING= .
	@export PYTHONPATH=$(abspath $(GPU_SITE)) PYTHONUNBUFFERED=1; result=0; \
	part() { timeout --signal=INT --kill-after=5 "$$@" || result=$$?; }; \
	part 15 $(PY) -m onepass; \
	timeout --kill-after=5 $(GPU_TEST_SECONDS) $(PY) benchmarks/gpu_variants.py $(GPU_VARIANTS) --build --archs $(GPU_ARCHS) & \
	part $(GPU_TEST_SECONDS) $(PY) -m pytest -q -m cuda_kernels -k 'not compute_sanitizer' \
	  --continue-on-collection-errors $(PYTEST_ARGS) tests/test_gpu.py tests/cuda_on_host tests/test_*.py; \
	wait; \
	part $$(($(GPU_BENCH_SECONDS) + 5)) $(PY) benchmarks/gpu.py --no-compile --seconds 0.4 --budget $(GPU_BENCH_SECONDS) \
	  --out $(RESULTS) $(BENCH_ARGS); \
	part 55 $(PY) benchmarks/gpu_variants.py $(GPU_VARIANTS) --seconds 45 --out $(RESULTS); \
	part 60 $(PY) -m pytest -q -k compute_sanitizer tests/test_gpu.py; \
	exit $$result

# ---------------------------------------------------------------------------------------------------- the environment

# What pyproject.toml asks for at build and run time and in every extra, without building the package; --only EXTRA: in that
# extra alone.
define REQUIREMENTS
import importlib, shutil, sys
toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
with open("pyproject.toml", "rb") as file:
    pyproject = toml.load(file)
project, extras = pyproject["project"], pyproject["project"]["optional-dependencies"]
chosen = [extra for name, extra in extras.items() if name in (sys.argv[1:] or extras)]
tools = [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
groups = [pyproject["build-system"]["requires"], project["dependencies"], tools] if "--only" not in sys.argv else []
print(*(need for group in [*groups, *chosen] for need in group if not need.startswith("onepass")), sep="\n")
endef
export REQUIREMENTS

$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)

$(VENV)/.dependencies-installed$(FOR): pyproject.toml Makefile | $(VENV)/bin/python
	@echo "downloading torch and what pyproject.toml names: some minutes at first"
	$(PIP) install '$(TORCH)'
	$(PY) -c "$$REQUIREMENTS" $(EXTRAS) > $(VENV)/requirements.txt
	$(PIP) install '$(TORCH)' -r $(VENV)/requirements.txt
	touch $@

$(DOCS_VENV)/.dependencies-installed: pyproject.toml Makefile
	$(BASE_PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_PY) -c "$$REQUIREMENTS" --only docs > $(DOCS_VENV)/requirements.txt
	$(DOCS_PY) -m pip --disable-pip-version-check --quiet install -r $(DOCS_VENV)/requirements.txt
	touch $@

$(PACKAGE): $(SOURCES) $(ENVIRONMENT)
	@echo "building the kernels: some minutes at first"
	$(PIP) install $(INSTALL) $(BUILD_FLAGS) --config-settings=cmake.define.ONEPASS_WERROR=ON \
	  --config-settings=cmake.define.ONEPASS_CUDA=$(ONEPASS_CUDA) .
	touch $@
