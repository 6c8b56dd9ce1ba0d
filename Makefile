# make demo, make test, make lint: each sets itself up in a private .venv, from python3, pip and make alone.
#
# Everything installed is pinned in constraints/ and comes in stages, each with a stamp in the venv, so that a second
# run installs nothing. The demo needs the library and the application; lint adds its tools; the tests add torch and
# PEFT, which they take as oracles. torch comes before what depends on it, at its pinned version, and nothing that a
# user runs needs it. CUDA's own packages are left to jax's ranges: torch's and jax's pins of them may differ.

PYTHON ?= python3
ACCELERATOR ?= cpu
WORKERS ?= 2
ROUNDS ?= 9

ifneq ($(filter-out cpu cuda13 tpu,$(ACCELERATOR)),)
$(error ACCELERATOR=$(ACCELERATOR) is not known; choose cpu, cuda13 or tpu)
endif

comma := ,

# Caches lie in the checkout: the home folder is neither read nor written.
CACHE := $(CURDIR)/.cache
export HF_HOME := $(CACHE)/huggingface
export JAX_COMPILATION_CACHE_DIR := $(CACHE)/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0.1
export MPLCONFIGDIR := $(CACHE)/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PINS_OF := import sys; print("constraints/py311.txt" if sys.version_info[:2] == (3, 11) else "constraints/py312.txt")
PINS := $(shell $(or $(wildcard .venv/bin/python),$(PYTHON)) -c '$(PINS_OF)' 2>/dev/null)
TORCH := $(shell grep '^torch==' $(PINS) /dev/null | cut -d: -f2)

# Where the suite runs on Python 3.11 it runs a second time, without torch, on the jax that only Python 3.12 has. A
# pyenv shim answers to python3.12 without having one behind it, so every candidate is run.
PY312 := $(if $(TORCH),$(shell for python in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python; do \
	if "$$python" -c "" 2>/dev/null; then command -v "$$python"; break; fi; done))

# Constraints from the environment bind what builds the package too, which those of -c do not.
install = PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) $(@D)/bin/python -m pip install -qq --no-input
pytest = -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help demo demo-chat eval test test-meshes lint format bench speed clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1:	/p' Makefile | expand -t 14

demo: .venv/.app-$(ACCELERATOR)  ## fine-tune a real encoder four ways, compare and export (ACCELERATOR=cuda13 or tpu)
	@.venv/bin/python -m train demo

demo-chat: .venv/.app-$(ACCELERATOR)  ## tune a small chat model by LoRA and MELoRA, and let it answer
	@.venv/bin/python -m train demo-chat

eval: .venv/.eval-$(ACCELERATOR)  ## install lm-eval beside the application, for python -m train eval

test: .venv/.test $(if $(PY312),.venv312/.test)  ## the suite, then its torch-free part on the newest jax if there is a Python 3.12
	.venv/bin/python $(pytest) $(if $(TORCH),,-m "not parity")
	$(if $(PY312),.venv312/bin/python $(pytest) -m "not parity",@echo "This was the only run: there is no second Python for another jax.")

test-meshes: .venv/.test  ## every mesh, full fine-tuning and four processes on simulated devices: two minutes with warm caches
	EXHAUSTIVE=1 .venv/bin/python $(pytest) -m exhaustive

lint: .venv/.lint  ## format, style, types and import contracts
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports --cache-dir .cache/import-linter

format: .venv/.lint  ## put the sources into the house's format
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/.app-$(ACCELERATOR)  ## step times of MELoRA, LoRA and the frozen model
	@.venv/bin/python -m train bench

# Each result is written as soon as it is there. Of a sweep over n and r, every combination takes turns with the limit.
speed = .venv/bin/python -m train bench --rounds $(ROUNDS) --out results/speed
minis := --sweep n=1,4,8,16,32 r=1,8
flat = .venv/bin/python -m train bench --rounds $$((3 * $(ROUNDS))) --targets all-linear --sweep n=1,32 r=1,8 \
	--out results/speed

speed: .venv/.test  ## the tables of results/speed.md: more than half an hour with ROUNDS=3
	$(speed)/minilm.json --title "MiniLM"
	$(speed)/minilm-minis.json --title "MiniLM, n and r" $(minis)
	$(speed)/minilm-all.json --title "MiniLM, n and r, all linear layers" --targets all-linear $(minis)
	$(speed)/smollm2.json --task causal-lm --title "SmolLM2-135M"
	$(speed)/smollm2-minis.json --task causal-lm --title "SmolLM2-135M, n and r" $(minis)
	$(speed)/smollm2-all.json --task causal-lm --title "SmolLM2-135M, n and r, all linear layers" --targets all-linear $(minis)
	$(flat)/minilm-flat.json --title "MiniLM, n=1 and n=32, all linear layers"
	$(flat)/smollm2-flat.json --task causal-lm --title "SmolLM2-135M, n=1 and n=32, all linear layers"
	$(speed)/tokens.json --title "Tokens a step" --sweep n=8 r=1,8 tokens=256,1024,4096 width=384 depth=2
	$(speed)/width.json --title "Width" --sweep n=8 r=1,8 width=128,256,512,1024 depth=2
	$(speed)/depth.json --title "Depth" --sweep n=8 r=1,8 depth=2,4,8
	$(speed)/compile.json --title "Compiling" --compile-depths 2 8 32
	.venv/bin/python -m train bench --page results/speed.md

clean:  ## remove the venvs and caches; runs/ stays
	rm -rf .venv .venv312 .cache build dist

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), not Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.app-%: .venv/.created $(PINS) pyproject.toml
	@echo "Installing the library and the application into .venv ($(PINS)): about two minutes the first time"
	@$(install) -e ".[train$(addprefix $(comma),$(filter-out cpu,$*))]"
	@touch $@

.venv/.eval-%: .venv/.app-%
	@echo "Installing lm-eval into .venv ($(PINS)): about one minute the first time"
	@$(install) -e ".[train,eval$(addprefix $(comma),$(filter-out cpu,$*))]"
	@touch $@

.venv/.lint: .venv/.created $(PINS) pyproject.toml
	@echo "Installing the linters into .venv ($(PINS)): about two minutes the first time"
	@$(install) -e ".[train,eval,tensorboard,lint]"
	@touch $@

.venv/.test: .venv/.created $(PINS) pyproject.toml
	@echo "Installing the test tools$(addprefix $(comma) ,$(TORCH)) into .venv ($(PINS)): about three minutes the first time"
	@$(if $(TORCH),$(install) $(TORCH))
	@$(install) -e ".[train,tensorboard,test$(if $(TORCH),$(comma)parity)]"
	@touch $@

.venv312/.test: PINS = constraints/py312.txt
.venv312/.test: constraints/py312.txt pyproject.toml
	@echo "Installing the test tools into .venv312 ($(PINS)): about two minutes the first time"
	@$(PY312) -m venv .venv312
	@$(install) -e ".[train,tensorboard,test]"
	@touch $@
