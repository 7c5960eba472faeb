# `make run` generates an answer with a real model; `make test` runs the tests. Both set up everything they need.
PYTHON ?= python3
PROMPT ?= Give me three tips for a good night's sleep.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

SOURCES := $(shell find csrc build_support -name __pycache__ -prune -o -type f -print) CMakeLists.txt setup.py pyproject.toml

.PHONY: run chat test gpu-test lint format hip info clean
run: $(VENV)/.built
	$(BIN)/flashdecpp generate --model demo --chat "$(PROMPT)"

chat: $(VENV)/.built
	$(BIN)/flashdecpp chat --model demo

info: $(VENV)/.built
	$(BIN)/flashdecpp info

# One process per core, at most eight because each may take two gigabytes, and each on one thread.
test: $(VENV)/.built $(VENV)/.test-tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

gpu-test: $(VENV)/.built $(VENV)/.test-tools
	$(BIN)/python -m pytest -m gpu

# Builds the library for AMD GPUs on a machine without ROCm. With ROCm installed, `pip install .` builds it.
hip: $(VENV)/.packages
	csrc/hip/toolchain.sh build/hip-toolchain
	$(BIN)/cmake -S . -B build/hip -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DFLASHDECPP_OUTPUT=$(CURDIR)/flashdecpp -DFLASHDECPP_PYTHON=OFF \
	  -DFLASHDECPP_HIP=ON -DFLASHDECPP_HIP_TOOLCHAIN=$(CURDIR)/build/hip-toolchain $(HIP_OPTIONS)
	$(BIN)/cmake --build build/hip --target flashdecpp_hip

CXX_FILES = $$(git ls-files csrc "tests/*.h" "tests/*.cpp" | grep -v -E "\.(py|sh)$$")

lint: $(VENV)/.lint-tools
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.lint-tools
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

$(VENV)/.packages: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "flashdecpp: $(PYTHON) was not found; install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flashdecpp: Python 3.10 or newer is needed")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "flashdecpp: Python's venv is missing (Debian: apt install python3-venv)"; exit 1; }
	@command -v $(or $(CXX),c++) >/dev/null || { echo "flashdecpp: no C++ compiler was found (Debian: apt install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt 'setuptools>=77' 'pybind11>=2.12' 'cmake>=3.25' ninja torch
	@touch $@

# setup.py shows the compiler's progress, which pip hides; the install that follows finds everything built.
$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(PIP) install -c constraints.txt --no-build-isolation --quiet -e '.[runner]'
	@touch $@

# After the build, but not again after every build.
$(VENV)/.test-tools: $(VENV)/.packages | $(VENV)/.built
	$(PIP) install -c constraints.txt --no-build-isolation --quiet -e '.[test]'
	@touch $@

$(VENV)/.lint-tools: $(VENV)/.packages
	$(PIP) install -c constraints.txt --quiet ruff clang-format mypy
	@touch $@

clean:
	rm -rf build $(VENV) flashdecpp/lib flashdecpp/_C*.so *.egg-info
