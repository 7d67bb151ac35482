# Two commands matter: `make finetune` and `make test`. Both set up what they need in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# auto builds the CUDA kernels where nvcc is found; 0 the CPU module alone; 1 insists
export SUBZERO_BUILD_CUDA ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(abspath $(BIN)):$(PATH)

CXX_FILES := $(foreach suffix,h cpp cu cuh inl,'csrc/*.$(suffix)' 'tests/emulator/*.$(suffix)')
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
# Where there is no GPU, the CUDA code is compiled to see that it compiles: one chip of six serves.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
$(VENV)/.train: export CMAKE_CUDA_ARCHITECTURES ?= 90a-real
endif

.PHONY: help finetune test test-gpu sanitize lint format bench wheel clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

finetune: $(VENV)/.train  ## fine-tune SmolLM2-135M on movie-review sentences, from nothing to a report
	$(BIN)/python -m subzero.demo

# one thread a worker: workers fill the cores, and more threads than cores make each test slower
# and the build is refused where a hot CUDA kernel spills registers
test: export CMAKE_CUDA_COMPILER_LAUNCHER = $(abspath $(BIN))/python;$(CURDIR)/csrc/cuda/no_spills.py
test: $(VENV)/.dev lint  ## everything CI runs: lint, types, the whole CPU suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test-gpu: $(VENV)/.dev  ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

# memcheck knows the ends of a tensor only if that is an allocation of its own; torch's kernels, of
# which each test runs many, are not looked at
SANITIZER ?= compute-sanitizer
SANITIZE := $(SANITIZER) --error-exitcode 1 --report-api-errors no --kernel-name kernel_substring=subzero
SMALL := $(BIN)/python -m pytest -q -m sanitize tests/test_native_cuda_small.py

sanitize: $(VENV)/.dev  ## every CUDA kernel under compute-sanitizer: memcheck, then racecheck
	$(BIN)/python -c "from subzero_kernels.backends import cuda; ok, why = cuda.available(); exit(None if ok else why)"
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool memcheck $(SMALL)
	$(SANITIZE) --tool racecheck $(SMALL)

lint: $(VENV)/.dev  ## ruff, mypy and clang-format, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(CXX_FILES))

format: $(VENV)/.dev  ## rewrite all sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(CXX_FILES))

bench: $(VENV)/.train  ## perturb_many_ over SmolLM2-135M against addmm_ and the eager line
	$(BIN)/python benchmarks/bench_perturb_cpu.py

wheel: $(VENV)/.train-packages  ## the wheel in dist/: for six GPUs where there is nvcc, below 25 MB
	rm -rf dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist
	@test -z "$$(find dist -name '*.whl' -size +25000k)" || { echo "larger than 25 MB" >&2; exit 1; }

clean:  ## remove the environment and all build products
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info subzero_kernels/_native*.so

# Stamps: packages are installed when their pins change, the native module is built when its sources do.

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train-packages: requirements/train.txt requirements/build.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -r requirements/train.txt
	@touch $@

$(VENV)/.train: $(VENV)/.train-packages $(NATIVE)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.train requirements/dev.txt
	$(BIN)/python -m pip install -q -r requirements/dev.txt
	@touch $@
