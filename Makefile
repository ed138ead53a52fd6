# make demo    install what is needed and run the whole path on the embedded checkpoint: export, build, profile, stream
# make test    install the development tools and run the tests, in JOBS=2 processes
# make slow    the tests that take longer, after make test; half an hour at most
# make check   lint and types
# make docs    write docs/commands.md and docs/messages.md again from the program
# make mutants plant mistakes in MODULE=aapt_deploy/x.py, or on the lines that differ from BASE=main, and see which the tests find
# make bench   measure speed and memory, one JSON record in docs/measurements/
# make plugins compile the CUDA kernels with nvcc, where there is one, into build/plugins; not needed: they are compiled at first use
# make wheel   build the wheel into dist/
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test slow check docs mutants bench plugins wheel clean

demo: $(VENV)/demo.stamp
	$(BIN)/aapt demo --out demo

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu"

slow: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not gpu"

check: $(VENV)/dev.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/dev.stamp
	$(BIN)/python -m tests.support.pages

BASE ?= main

mutants: $(VENV)/mutants.stamp
	$(BIN)/python bench/mutants.py $(if $(MODULE),--module $(MODULE),--changed $(BASE))

bench: $(VENV)/dev.stamp
	$(BIN)/python bench/cpu.py

NVCC ?= nvcc
KERNELS := plugins/block_causal_attention/block_causal_attention.cu

plugins:
	@command -v $(NVCC) >/dev/null || { echo "error: '$(NVCC)' is not on the path" >&2; \
	    echo "hint: name one with make plugins NVCC=/path/to/nvcc, or do without: NVRTC compiles the kernels at first use" >&2; exit 5; }
	@mkdir -p build/plugins
	for dim in 128 64; do $(NVCC) -std=c++17 -arch=sm_90a -cubin -Xptxas -v,-warn-spills -DAAPT_HEAD_DIM=$$dim $(KERNELS) \
	    -o build/plugins/block_causal_attention-d$$dim.cubin || exit 1; done

wheel: $(VENV)/dev.stamp
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# Installs are pinned. Where pip finds no CPU build of torch it takes the CUDA one, with gigabytes of packages; on a machine without a GPU, set
# PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds first.
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: '$(PYTHON)' is not Python 3.11 or newer" >&2; \
	    echo "hint: name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[export]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(INSTALL) -e '.[export,fp8,train,cuda,text,dev]'
	@touch $@

$(VENV)/mutants.stamp: $(VENV)/dev.stamp
	$(INSTALL) -e '.[mutants]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo
