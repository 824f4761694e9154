# make serve   a language model on this machine, its KV cache in TurboQuant format
# make test    every test this machine can run
# make report  load test, results page and the README's pictures
#
# All build .venv first; it needs Python 3.11 or later with venv, and package downloads.

PYTHON ?= python3
PORT ?= 8000
KV_CACHE_DTYPE ?= turboquant
# Further arguments for `vllm serve`, and for pytest.
SERVE_ARGS ?=
TEST_ARGS ?=
# Which vLLM to install: auto (by nvidia-smi), cpu or cuda.
DEVICE ?= auto
# Where pip finds torch's CPU build: auto (PyTorch's own index if it answers), none, or a URL.
TORCH_INDEX ?= auto
# The load test: parameter files in deploy/load/, the model (the demo model if empty), where results go, and how often each is run.
LOAD ?= $(if $(shell command -v nvidia-smi),card,cpu)
MODEL ?=
LOAD_RESULTS ?= load-results
LOAD_RUNS ?= 1
# The version whose Python code the tests read, whatever is installed.
VLLM_UNPACKED := 0.33.0

VENV := .venv
BIN := $(VENV)/bin
UNPACKED := $(VENV)/vllm-0.33
TYPES := $(VENV)/types

# vLLM compiles parts of its sampler on first use. Without a C++ compiler that kills the engine.
ifeq ($(shell command -v c++ || command -v g++),)
export TORCH_COMPILE_DISABLE := 1
endif

.PHONY: serve test test-quick load report figures dist setup demo-model lint typecheck format clean

serve: setup
	@$(BIN)/python deploy/serve.py --port $(PORT) --kv-cache-dtype $(KV_CACHE_DTYPE) $(SERVE_ARGS)

# Engines on a card take all of it, so they run one by one; those on a CPU start on one core.
test: setup demo-model $(UNPACKED)/.complete
ifeq ($(strip $(TEST_ARGS)),)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not server and not gpu"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "server and not gpu"
	$(BIN)/python -m pytest -m gpu
else
	$(BIN)/python -m pytest $(TEST_ARGS)
endif

# Without the tests that start an engine.
test-quick: setup $(UNPACKED)/.complete
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not server and not gpu" $(TEST_ARGS)

setup: $(VENV)/.project

demo-model: setup
	@$(BIN)/python -m vllm_turboquant.demo

# Each stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.vllm: deploy/install.py deploy/cpu/vllm-metadata/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python deploy/install.py --device $(DEVICE) --torch-index "$(TORCH_INDEX)"
	@touch $@

$(VENV)/.project: $(VENV)/.vllm pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo,test,dev]'
	@touch $@

$(UNPACKED)/.complete: $(VENV)/.vllm deploy/unpack_vllm.py
	$(BIN)/python deploy/unpack_vllm.py $(VLLM_UNPACKED) $(UNPACKED)
	@touch $@

# vLLM's own sweep: servers of several KV cache dtypes one after the other, each under several loads.
LOAD_DIR = $(LOAD_RESULTS)/$(LOAD)
SWEEP = VLLM_PLUGINS=turboquant $(BIN)/vllm bench sweep
$(VENV)/.bench: $(VENV)/.project
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[bench]'
	@touch $@

load: $(VENV)/.bench demo-model
	rm -rf $(LOAD_DIR)
	model="$(MODEL)"; [ -n "$$model" ] || model=$$($(BIN)/python -m vllm_turboquant.demo | tail -1); \
	$(if $(filter cpu,$(LOAD)),TORCH_COMPILE_DISABLE=1) $(SWEEP) serve \
	    --serve-cmd "$(BIN)/vllm serve $$model --port $(PORT)" \
	    --bench-cmd "$(BIN)/vllm bench serve --model $$model --port $(PORT) --dataset-name random --ignore-eos --seed 0" \
	    --serve-params deploy/load/$(LOAD)/serve.json --bench-params deploy/load/$(LOAD)/bench.json \
	    --output-dir $(LOAD_RESULTS) --experiment-name $(LOAD) --num-runs $(LOAD_RUNS) --server-ready-timeout 900
	$(BIN)/python deploy/load/report.py $(LOAD_DIR)

$(LOAD_DIR)/summary.csv:
	$(MAKE) load

# Every picture and page: the README's, and the load test's, which is run if it has not been.
report: figures $(LOAD_DIR)/summary.csv
	for figure in output_throughput median_ttft_ms median_tpot_ms; do \
	    $(SWEEP) plot $(LOAD_DIR) --var-x max_concurrency --var-y $$figure --curve-by kv_cache_dtype --fig-name $$figure \
	        --fig-dpi 120 || exit 1; \
	done
	$(SWEEP) plot_pareto $(LOAD_DIR) --label-by kv_cache_dtype,max_concurrency
	$(BIN)/python deploy/load/report.py $(LOAD_DIR)

# README tables and pictures, out of the rows in tests/bench/results/ and the registry tests/kinds/.
figures: $(VENV)/.bench
	$(BIN)/python -m tests.support
	$(BIN)/python -m tests.bench.figures

# Sdist and the wheel built from it, as they are released.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

lint: setup typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy finds packages by folder, and kernels/ lies elsewhere than it is installed: show mypy the
# installed shape, out of links.
typecheck: setup
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/vllm_turboquant
	@ln -s $(CURDIR)/vllm_turboquant/*.py $(CURDIR)/vllm_turboquant/evaluation $(CURDIR)/kernels $(TYPES)/vllm_turboquant/
	cd $(TYPES) && ../bin/mypy --config-file ../../pyproject.toml -p vllm_turboquant

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
