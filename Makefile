# Everything runs in .venv, made on first use; `make PYTHON=python3.12 ...` picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
FORMATTED := $(SOURCES) $(wildcard tests/cuda_emulation/*.cpp tests/cuda_emulation/*.h)

# Peers that tests compare with, without what they ask for beyond it: one does not know this Python, one needs a GPU.
# Tests of a peer that cannot be installed are left out.
PEERS := --ignore-requires-python perceiver-io==0.11.0 fairscale==0.4.13 flash-perceiver==0.2.0

.PHONY: demo test bench lint format clean

demo: $(VENV)/installed
	$(BIN)/python -m perceiver_kernels demo $(ARGS)

# Two processes on as many cores: threads that wait for work must not spin.
test: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/linters
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(FORMATTED)

# Editable, so that tests see the sources; rebuilt when native sources or the build change.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	-$(BIN)/pip install -q --no-deps $(PEERS)
	touch $@

$(VENV)/linters: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt 'ruff==0.17.5' 'mypy==2.4.1' 'clang-format==23.1.5'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info perceiver_kernels/*.so
