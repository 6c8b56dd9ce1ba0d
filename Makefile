# make demo, make test, make lint: each sets itself up in a private .venv, from python3, pip and make alone.
# make test runs the suite on one Python; make test-all what that leaves out, the suite on a second Python, and a part of
# it on the other pairs of Python and jax that pyproject.toml admits. Nothing runs twice on one Python.
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

# A pyenv shim answers to python3.12 without having one behind it, so every candidate is run.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
first_of = $(shell for python in $(1); do if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then command -v "$$python"; break; fi; done)
version_found = $(call first_of,python$(1) "$$(pyenv root 2>/dev/null)"/versions/$(1).*/bin/python)

# A python3 that is too new or too old gives way to another on the PATH; one that was asked for does not.
ifeq ($(origin PYTHON),file)
CHOSEN := $(call first_of,python3 python3.12 python3.11 python3.13 python3.14)
else
CHOSEN := $(call first_of,"$(PYTHON)")
endif

PINS_OF := import sys; print("constraints/py311.txt" if sys.version_info[:2] == (3, 11) else "constraints/py312.txt")
PINS := $(shell $(or $(wildcard .venv/bin/python),$(CHOSEN),$(PYTHON)) -c '$(PINS_OF)' 2>/dev/null)
TORCH := $(shell grep '^torch==' $(PINS) /dev/null | cut -d: -f2)

# The second Python: 3.12 with the newest jax beside 3.11 with torch, or 3.11 where the first is newer.
SECOND := $(if $(TORCH),3.12,3.11)
SECOND_PYTHON := $(call version_found,$(SECOND))
SECOND_VENV := .venv$(subst .,,$(SECOND))
SECOND_PINS := constraints/py$(subst .,,$(SECOND)).txt
SECOND_TORCH := $(if $(TORCH),,$(shell grep '^torch==' $(SECOND_PINS)))

# The other pairs: jax 0.11 on Python 3.12, and the Pythons for which the pins of 3.12 hold as well.
FIRST := $(shell $(or $(wildcard .venv/bin/python),$(CHOSEN),$(PYTHON)) -c 'import sys; print("3.%d" % sys.version_info[1])' 2>/dev/null)
PARTS := $(foreach version,3.12 $(filter-out $(FIRST),3.13 3.14),$(if $(call version_found,$(version)),.venv-$(version)-part))

# Constraints from the environment bind what builds the package too, which those of -c do not.
install = PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) $(@D)/bin/python -m pip install -qq --no-input
pytest = -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help demo demo-chat eval test test-all lint format bench speed clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1:	/p' Makefile | expand -t 14

demo: .venv/.app-$(ACCELERATOR)  ## fine-tune a real encoder four ways, compare and export (ACCELERATOR=cuda13 or tpu)
	@.venv/bin/python -m train demo

demo-chat: .venv/.app-$(ACCELERATOR)  ## tune a small chat model by LoRA and MELoRA, and let it answer
	@.venv/bin/python -m train demo-chat

eval: .venv/.eval-$(ACCELERATOR)  ## install lm-eval beside the application, for python -m train eval

test: .venv/.test  ## the suite on one Python, less what is slow: about 10 minutes on 2 cores
	.venv/bin/python $(pytest) -m "not slow$(if $(TORCH),, and not parity)"

test-all: .venv/.test $(if $(SECOND_PYTHON),$(SECOND_VENV)/.test) $(PARTS:%=%/.test)  ## what make test leaves out, the suite on a second Python, and a part on others
	.venv/bin/python $(pytest) -m "slow$(if $(TORCH),, and not parity)"
	$(if $(SECOND_PYTHON),$(SECOND_VENV)/bin/python $(pytest)$(if $(SECOND_TORCH),, -m "not parity and not once"),@echo "There is no Python $(SECOND) for a second run.")
	$(foreach part,$(PARTS),$(part)/bin/python $(pytest) -m "versions and not parity" &&) true

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
	rm -rf .venv .venv311 .venv312 .venv-3.* .cache build dist

.venv/.created:
	@if [ -z "$(CHOSEN)" ]; then \
		echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), not Python 3.11, 3.12, 3.13 or 3.14: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; fi
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); taking $(CHOSEN), $$($(CHOSEN) -V)"
	@$(CHOSEN) -m venv .venv
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

$(SECOND_VENV)/.test: PINS = $(SECOND_PINS)
$(SECOND_VENV)/.test: $(SECOND_PINS) pyproject.toml
	@echo "Installing the test tools$(addprefix $(comma) ,$(SECOND_TORCH)) into $(@D) ($(PINS)): about two minutes the first time"
	@$(SECOND_PYTHON) -m venv $(@D)
	@$(if $(SECOND_TORCH),$(install) $(SECOND_TORCH))
	@$(install) -e ".[train,tensorboard,test$(if $(SECOND_TORCH),$(comma)parity)]"
	@touch $@

.venv-3.12-part/.test: PINS = constraints/py312-jax0.11.txt
.venv-3.13-part/.test .venv-3.14-part/.test: PINS = constraints/py312.txt
.venv-3.%-part/.test: constraints/py312.txt constraints/py312-jax0.11.txt pyproject.toml
	@echo "Installing the test tools into $(@D) ($(PINS)): about two minutes the first time"
	@$(call version_found,3.$*) -m venv $(@D)
	@$(install) -e ".[train,tensorboard,test]"
	@touch $@
