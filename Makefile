# Every target prepares what it needs: an environment of its own in .venv, rebuilt only when its recipe changes.
# `make PYTHON=/path/to/python3.11` picks the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
# Processes of `make test`.
WORKERS ?= 2
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help check format test test-all comfy-test ui-test demo table stale ablation report bench pico mutants versions fuzz

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check: $(READY) ## formatting and lint
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

format: $(READY) ## reformat, and repair what lint can repair
	$(RUN) -m ruff check --fix --exit-zero --quiet .
	$(RUN) -m ruff format .

test: $(READY) ## the tests, without the slow ones, in WORKERS=2 processes
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile

test-all: $(READY) ## all tests, with the optional torchao and onnxruntime
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[int8,ruler]'
	$(RUN) -m pytest -m ""

comfy-test: $(READY) ## the nodes in a real ComfyUI: COMFYUI_DIR=/path/to/it, COMFYUI_PYTHON=/its/python
	$(RUN) -m pytest tests/comfy -m "" -rs

# The newest page is a package of the environment. A second version of it cannot be one: ComfyUI v0.8.0's lies beside them.
FRONTEND := $(VENV)/frontend-v0.8.0

ui-test: $(READY) ## workflows, help and search in ComfyUI's own page, in /usr/bin/chromium; screenshots in out/ui
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[ui]'
	test -f $(FRONTEND)/comfyui_frontend_package/static/index.html || $(RUN) -m pip install --quiet --no-deps --target $(FRONTEND) comfyui-frontend-package==1.35.9
	$(RUN) -m pytest tests/ui -m ui

demo: $(READY) ## prompts become images with the embedded models: out/demo.png
	$(RUN) -m dcdd_core.cli demo --out out/demo.png

# Published tables name the commit that they were measured at.
COMMIT = --commit $$(git describe --always --dirty --abbrev=7 --exclude="*")

RULER = $(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[ruler]'

table: $(READY) ## measure the embedded models where code or weights changed: docs/results.md and their card; with the optional onnxruntime
	$(RULER)
	$(RUN) -m dcdd_pico.results_table --bf16 $(COMMIT) --into docs/results.md dcdd_pico/weights/README.md
	$(RUN) -m dcdd_pico.guided_table --bf16 $(COMMIT) --into docs/results.md
	$(RUN) -m dcdd_pico.progressive_table --bf16 $(COMMIT) --into docs/results.md
	$(RUN) -m dcdd_pico.llamagen_table --bf16 $(COMMIT) --into docs/results.md

stale: $(READY) ## list the published tables that were measured with other code or weights; fails if there are any
	$(RUN) -m dcdd_pico.results_table --stale

ablation: $(READY) ## train the nine decoders of Table 4, for `make table` and `make report`
	$(RUN) -m dcdd_pico.ablation --compile

report: ablation ## the paper's tables on the embedded models, with plots: docs/report.md; with the optional onnxruntime
	$(RULER)
	$(RUN) -m dcdd_pico.paper_report --bf16 $(COMMIT)

bench: $(READY) ## speed and memory against the plain ways: docs/bench.md, docs/growth.png; with the optional torchao
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[int8]'
	$(RUN) -m benchmarks --out docs/bench.md

mutants: $(READY) ## mutation testing: docs/mutants.md; hours, MODULES="method/lcdm frechet" takes some of them; with the optional cosmic-ray
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[mutants]'
	nice -n 15 $(RUN) tools/mutants.py $(MODULES)

versions: $(READY) ## oldest and newest torch, transformers, diffusers, numpy and Python, an environment each: docs/versions.md; gigabytes, ROW="oldest" takes some
	$(RUN) tools/versions.py $(if $(ROW),--row "$(ROW)")

fuzz: $(READY) ## 2,000 damaged files and wrong options for every loader and command; failing inputs go to out/fuzz
	$(RUN) -m tests.fuzz --count 2000

pico: $(READY) ## train the embedded models again, from nothing, and measure them; with the optional onnxruntime
	$(RULER)
	$(RUN) -m dcdd_pico.build --compile

# torch comes first and alone, so that nothing that depends on it can choose another build of it.
$(READY): pyproject.toml constraints.txt
	@test -x $(RUN) || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("constraints.txt needs Python >= 3.11, this is %s: make PYTHON=..." % sys.version.split()[0])'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt $$(grep -E '^(setuptools|torch)==' constraints.txt)
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,train,eval]'
	@touch $@
