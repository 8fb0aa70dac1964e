# make setup | book | test | lint | bench | clean     each target does its own set-up, in .venv
# DEVICE=cuda SCALE=full make book                    the chapters at full size on a GPU
# make bench BENCH="-k delta --length 4096"           a slice of the benchmarks
# make bench DEVICE=cuda                              the kernels on a GPU, beside flash-linear-attention

PYTHON ?= python3
DEVICE ?= cpu
SCALE  ?= smoke
JOBS   ?= 2

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
READY  := $(VENV)/.ready

.PHONY: setup book test lint bench clean

setup: $(READY)

# torch comes first and alone: with it present, nothing that needs torch pulls another build of it.
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' requirements.lock)"
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

book: $(READY)
	$(BIN)/python book/execute.py --scale $(SCALE) --device $(DEVICE) --jobs $(JOBS)
	$(BIN)/python book/build.py

# One thread a worker: threads of several workers on the same cores wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All of it on the CPU, some ten minutes; the record takes the old one's place when it is whole. A slice stays in _build,
# or on a GPU in the terminal.
bench: $(READY)
ifeq ($(DEVICE),cuda)
	$(BIN)/python -m benchmarks.cuda $(BENCH)
else
	mkdir -p _build
	$(BIN)/python -m pytest -c benchmarks/pytest.ini benchmarks --benchmark-json=_build/ops.cpu.json $(BENCH)
	$(if $(BENCH),,mv _build/ops.cpu.json benchmarks/results/)
	$(if $(BENCH),,$(BIN)/python -m benchmarks.training)
endif

clean:
	rm -rf _build notebooks/*.ipynb .mypy_cache .pytest_cache .ruff_cache
