# Two commands matter: `make serve` (set up, serve the demo model) and `make test` (set up, run the whole CPU suite).
# A fresh clone needs Python 3.11+, make and git; everything else goes into $(VENV).

PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?= demo
ARGS   ?=
SEEDS  ?= 0..9999
# Package index for torch alone. Empty: pip's own, which on Linux may bring CUDA libraries of several GB. On a machine
# without a GPU, set it to PyTorch's index of CPU wheels to save the download.
TORCH_INDEX ?=
TORCH  ?= torch>=2.11,<2.14

# For a GPU. On a machine with network the extra `cuda` goes into $(VENV), and these stay empty. Without one, PYTHON is one
# that has torch for the GPU; WHEELS is a folder that `python -m tests.gpu.prepare` filled elsewhere; SITE is where they are
# unpacked, or where everything lies already. COMMIT says what is measured where git cannot.
WHEELS ?=
SITE   ?= $(if $(WHEELS),build/site)
COMMIT ?=

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer

BIN     := $(VENV)/bin
RUN     := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev
PIP     := $(BIN)/python -m pip --disable-pip-version-check --no-input
CUDA    := $(if $(SITE),$(if $(WHEELS),$(SITE)/.unpacked),$(VENV)/.installed-cuda)
GPU_ENV := $(if $(SITE),PYTHONPATH=$(abspath $(SITE)))
GPU     := $(if $(SITE),$(PYTHON),$(BIN)/python)

.DEFAULT_GOAL := help
.PHONY: help serve test lint format bench bench-cpu peers sanitize gpu-test gpu-sanitize gpu-bench gpu-table claims observe sim fuzz clients install install-dev clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON VENV HOST PORT MODEL ARGS SEEDS TORCH_INDEX WHEELS SITE COMMIT, e.g. make serve PORT=9000 ARGS='--device-gib 4'"

serve: $(RUN) ## serve the demo model (or MODEL=...) on HOST:PORT
	@exec $(BIN)/terrace serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: $(DEV) ## run the whole CPU test suite
	$(BIN)/python -m pytest $(ARGS)

lint: $(DEV) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV) ## speed of scheduler, model and server; fails when a stated goal is missed
	$(BIN)/python -m server.bench $(ARGS)

peers: $(DEV) ## install other CPU servers, each in an environment of its own under .peers/ (ARGS=NAME for one)
	$(BIN)/python -m loadgen.peers install $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(ARGS)

bench-cpu: $(DEV) ## Terrace beside every CPU server that `make peers` installed; fails when a goal is missed
	$(BIN)/python -m loadgen.peers $(ARGS)

sanitize: $(DEV) ## tests of the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	CFLAGS='$(SANITIZE)' LDFLAGS='$(SANITIZE)' $(BIN)/python setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest tests/unit/test_native_linear.py tests/unit/test_native_attention.py \
	  tests/unit/test_native_rows.py tests/unit/test_native_sum.py tests/unit/test_cuda_copy.py tests/unit/test_cuda_tier.py \
	  tests/numeric/test_whole_step.py $(ARGS); status=$$?; \
	  $(BIN)/python setup.py -q build_ext --inplace --force && exit $$status

gpu-test: $(CUDA) ## on a GPU: that it computes, moves blocks and answers as a CPU does
	$(GPU_ENV) $(GPU) -m pytest tests/gpu tests/unit/test_cuda_*.py tests/unit/test_fp8*.py tests/unit/test_flashinfer_contract.py \
	  $(ARGS)

gpu-sanitize: $(CUDA) ## the small ones of these under compute-sanitizer, each tensor in memory of its own
	$(GPU_ENV) PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all \
	  --error-exitcode 1 $(GPU) -m pytest tests/gpu/test_operations.py tests/gpu/test_attention.py \
	  tests/gpu/test_transfers.py -k 'not graphs and not long' $(ARGS)

gpu-bench: $(CUDA) ## on a GPU: its ceilings, and the daemon's shares of them; fails when a goal is missed
	$(GPU_ENV) $(GPU) -m server.bench.gpu --save $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

gpu-table: $(DEV) ## what was measured on GPUs, of the kept results
	$(BIN)/python -m loadgen.gpu_table

claims: $(DEV) ## what the README claims of tiers, over HTTP; fails when a goal is missed
	$(BIN)/terrace bench suite $(ARGS)

observe: $(DEV) ## every query of the boards and every rule against a daemon under load, with Debian's Prometheus
	$(BIN)/python -m deploy.observe $(ARGS)

sim: $(DEV) ## nightly form: SEEDS of the simulation with faults, and long runs of the property machines
	$(BIN)/python -m server.sim --seeds $(SEEDS)
	$(BIN)/python -m pytest -m nightly --ignore=tests/e2e $(ARGS)

fuzz: $(DEV) ## nightly form: fifty thousand random HTTP bodies against a daemon
	$(BIN)/python -m pytest -m nightly tests/e2e $(ARGS)

install: $(RUN) ## set up $(VENV) to serve
install-dev: $(DEV) ## set up $(VENV) to develop

clients: $(DEV) ## clients that others wrote, each in an environment of its own under .clients/
	$(BIN)/python -m tests.clients $(ARGS)

clean: ## remove $(VENV) and caches
	rm -rf $(VENV) .clients .peers .prometheus build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Terrace needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "no venv module: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

# torch first and by itself, so that TORCH_INDEX concerns nothing else.
$(VENV)/.torch: | $(BIN)/python
	$(if $(TORCH_INDEX),PIP_INDEX_URL=$(TORCH_INDEX)) $(PIP) install '$(TORCH)'
	@touch $@

$(RUN): pyproject.toml setup.py $(wildcard server/kernels/native/*.[chi]*) | $(VENV)/.torch
	$(PIP) install -e .
	@touch $@

$(DEV): pyproject.toml setup.py $(wildcard server/kernels/native/*.[chi]*) | $(VENV)/.torch
	$(PIP) install -e '.[dev]'
	@touch $(RUN) $@

$(VENV)/.installed-cuda: $(DEV)
	$(PIP) install -e '.[dev,cuda]'
	@touch $@

ifneq ($(WHEELS),)
$(SITE)/.unpacked: $(wildcard $(WHEELS)/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(SITE) $^
	@touch $@
endif
