# Every target sets up what it needs. A fresh machine needs Python 3.11-3.13 with pip, and make.
#
#   make run      serve the built-in model on http://127.0.0.1:8000 (ARGS="--port 9000" are passed on)
#   make test     the tests, on two processes (ARGS="tests/engine -x" are passed on)
#   make slow     the tests marked slow: many more generated cases, for minutes
#   make check    formatting, lint, layering, types, sizes, dependencies
#   make parity   the same models in transformers on torch, compared live; installs torch into .venv-peers
#   make gpu      on an NVIDIA GPU, with jax for CUDA in .venv: every family against transformers' answers, and the kernels
#   make asan     the native kernels' tests, with them built under AddressSanitizer
#   make wheel    build a wheel where there is no compiler, install it into an empty environment, and run doctor there
#   make bench    the benchmarks, against the same peers (BENCHMARKS="server" ARGS="--help" for one of them)
#   make pico     train the built-in model anew, into runs/pico
#   make fmt      format the code and fix what lint can fix
#   make clean    remove caches and builds

BIN := .venv/bin
PEERS := .venv-peers/bin
INSTALLED := .venv/.installed
PEERS_INSTALLED := .venv-peers/.installed
LLAMA_INSTALLED := .venv-llama/.installed
BENCHMARKS := bandwidth cpu_generation cpu_engines long_context server startup compile_time train_step
TORCH := torch==2.13.0
TRANSFORMERS := transformers==5.23.0
COMPRESSED_TENSORS := compressed-tensors==0.20.0
TUNING_PEERS := peft==0.19.0 trl==1.16.0
LLAMA_CPP := llama-cpp-python==0.3.36

# The newest interpreter that works here; `make PYTHON=/path/to/python3.12 test` chooses another.
PYTHON ?= $(shell tools/find-python)

.PHONY: run test slow gpu asan wheel check parity bench pico fmt constraints clean
.DELETE_ON_ERROR:

run: $(INSTALLED)
	@$(BIN)/tenfold serve $(ARGS)

# Compiling is most of what these tests do, and programs that are not optimised compile in a fraction of the time. The
# tests of bits that must be alike turn this off (tests/conftest.py); the targets below leave it off.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS := true
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow and not parity" $(ARGS)

slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "slow and not parity" --timeout 3600 $(ARGS)

gpu: export JAX_PLATFORMS := cuda
gpu: export JAX_DEFAULT_MATMUL_PRECISION := highest
gpu: export XLA_PYTHON_CLIENT_PREALLOCATE := false
gpu: export XLA_FLAGS := --xla_gpu_autotune_level=0
gpu: $(INSTALLED)
	$(BIN)/python -m pytest -n 4 -q -m "not parity" --timeout 3600 tests/models/test_parity.py \
	  tests/models/test_parity_engine.py tests/kernels/test_flash_attention.py tests/kernels/test_paged_flash_attention.py $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright
	$(BIN)/python tools/sizes.py
	$(BIN)/deptry .

parity: $(INSTALLED) $(PEERS_INSTALLED)
	$(BIN)/python -m pytest -q -m parity tests/parity $(ARGS)

asan: $(INSTALLED)
	$(call BUILD,--config-setting cmake.define.TENFOLD_ASAN=ON)
	@LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(BIN)/python -m pytest -q --capture sys --timeout 1800 \
	  $(addprefix tests/kernels/test_,matmul.py norm.py gate.py native_attention.py product.py row_attention.py) $(ARGS); \
	  status=$$?; rm -f $(INSTALLED); $(MAKE) $(INSTALLED); exit $$status

wheel: export UV_PYTHON_DOWNLOADS := never
wheel: $(INSTALLED)
	rm -rf build/wheel
	CC=false CXX=false $(BIN)/uv build -q --wheel --build-constraints constraints.txt --out-dir build/wheel .
	$(BIN)/uv venv -q --python $(BIN)/python build/wheel/venv
	$(BIN)/uv pip install -q --python build/wheel/venv/bin/python -c constraints.txt build/wheel/*.whl
	build/wheel/venv/bin/tenfold doctor

bench: $(INSTALLED) $(PEERS_INSTALLED) $(LLAMA_INSTALLED)
	@set -e; for name in $(BENCHMARKS); do echo "== bench/$$name.py"; $(BIN)/python "bench/$$name.py" $(ARGS); done

pico: $(INSTALLED)
	$(BIN)/tenfold train pico --output runs/pico $(ARGS)

fmt: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins for every supported Python at once, without the addresses of any index.
constraints: $(INSTALLED)
	$(BIN)/uv pip compile --universal --no-header --no-annotate --python-version 3.11 \
	  --extra train --extra cloud --extra hf --extra ray --group dev --upgrade pyproject.toml -o constraints.txt

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests bench tools examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python without ensurepip (Debian splits it off) makes an environment without pip, which its own pip then fills.
define make_venv
@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found on PATH. Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
@test -x $(1)/bin/python || { echo "Creating $(1) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(1) >/dev/null 2>&1 || $(PYTHON) -m venv --clear --without-pip $(1); }
endef
PIP_INTO = if $(1)/bin/python -m pip --version >/dev/null 2>&1; then $(1)/bin/python -m pip install -q $(2); else $(PYTHON) -m pip --python $(1)/bin/python install -q $(2); fi

define BUILD
@UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -e '.[train,cloud]' --group dev \
  -c constraints.txt --build-constraints constraints.txt --reinstall-package tenfold $(1)
endef

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*)
	$(call make_venv,.venv)
	@echo "Installing Tenfold and its tools into .venv"
	@$(call PIP_INTO,.venv,-c constraints.txt uv)
	$(call BUILD,)
	@touch $@

$(LLAMA_INSTALLED): Makefile
	$(call make_venv,.venv-llama)
	@echo "Building $(LLAMA_CPP) into .venv-llama; this takes minutes"
	@$(call PIP_INTO,.venv-llama,$(LLAMA_CPP))
	@touch $@

$(PEERS_INSTALLED): Makefile
	$(call make_venv,.venv-peers)
	@echo "Installing $(TORCH), $(TRANSFORMERS), $(COMPRESSED_TENSORS) and $(TUNING_PEERS) into .venv-peers"
	@$(call PIP_INTO,.venv-peers,$(TORCH) $(TRANSFORMERS) $(COMPRESSED_TENSORS) $(TUNING_PEERS))
	@touch $@
