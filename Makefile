# `make` alone prints the targets. Every target makes its own environment first (.venv, by scripts/install.sh).
#
#   PYTHON=python3.12        the interpreter the environment is made from (3.11 or newer)
#   PIP_FLAGS="..."          more options for pip install
#   MARLIN_GPTQ_KERNEL=      auto (compile the kernel if a compiler is found) | require | off
#   MARLIN_GPTQ_ARCHS=90a    compile for these GPU architectures only
#   SYSTEM_PYTHON=1          keep the packages of PYTHON (its torch above all), install nothing else: no network needed
#   SLOW=1                   make test: the slow tests too

PYTHON ?= python3
PIP_FLAGS ?=
MARLIN_GPTQ_KERNEL ?= auto
MARLIN_GPTQ_ARCHS ?=
SYSTEM_PYTHON ?=
SLOW ?=
export PYTHON PIP_FLAGS MARLIN_GPTQ_KERNEL SYSTEM_PYTHON
ifneq ($(MARLIN_GPTQ_ARCHS),)
export MARLIN_GPTQ_ARCHS
endif

# Threads that wait give their core away: on a machine with other work the demo's took 36 s, not 54 s (one run each).
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

VENV := $(if $(SYSTEM_PYTHON),.venv-system,.venv)
export VENV
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SETTINGS := $(VENV)/.settings
SOURCES := $(shell find kernel/csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu lint bench reproduce clean FORCE

help: ## print this list
	@echo "marlin-gptq: quantize Llama models to 4 bits, and measure them with a CUDA kernel. Targets:"
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@sed -nE 's/^#(   [A-Z_]+=.*)/\1/p' Makefile

install: $(INSTALLED) ## make the environment and compile the kernel (the other targets do it by themselves)
	@echo "installed in $(VENV)"

demo: $(INSTALLED) ## quantize examples/tiny-llama and print both perplexities (under 2 minutes on 2 cores)
	@$(BIN)/python scripts/demo.py

test: $(INSTALLED) ## the tests that need no GPU (SLOW=1: the slow ones too)
	$(BIN)/python -m pytest -m "not gpu" -n auto --maxprocesses 4 $(if $(SLOW),--slow)

test-gpu: $(INSTALLED) ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu --slow

lint: $(INSTALLED) .typing ## ruff, mypy, and the compiler's log: no spills, no serialised wgmma
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if $(BIN)/python scripts/kernel_status.py --quiet; then set -x; $(BIN)/python scripts/check_build_log.py build/install.log; \
	else echo "build log: not checked, the kernel is not compiled here"; fi

bench: $(INSTALLED) ## time the kernel (needs an NVIDIA GPU)
	$(BIN)/python scripts/bench_kernel.py

reproduce: $(INSTALLED) ## measure every figure of the README's table again
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/reproduce.sh

clean: ## remove the environments and everything that was built
	rm -rf .venv .venv-system .typing build dist .pytest_cache .mypy_cache .ruff_cache

# Installed again when the sources of the kernel, the pins or the settings above change; Python files need nothing.
$(INSTALLED): pyproject.toml constraints.txt scripts/install.sh CMakeLists.txt $(SOURCES) $(SETTINGS)
	@bash scripts/install.sh
	@touch $@

$(SETTINGS): FORCE
	@mkdir -p $(VENV)
	@echo "$(PYTHON) $(PIP_FLAGS) $(MARLIN_GPTQ_KERNEL) $(MARLIN_GPTQ_ARCHS)" | cmp -s - $@ \
	|| echo "$(PYTHON) $(PIP_FLAGS) $(MARLIN_GPTQ_KERNEL) $(MARLIN_GPTQ_ARCHS)" > $@

# mypy cannot follow the mapping of pyproject.toml (kernel/ installs as marlin_gptq/kernel): links show it the result.
.typing: FORCE
	@rm -rf .typing && mkdir -p .typing/marlin_gptq
	@for part in marlin_gptq/* kernel cli eval; do ln -s "../../$$part" ".typing/marlin_gptq/$$(basename $$part)"; done
