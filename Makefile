# The one door.  `make` lists what is behind it; every target installs what it needs.

PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
MINDSPORE := .venv-mindspore/.ready
LOCK   := requirements

# Parts of torch's CUDA build that `import torch` does without on a machine without a GPU: 1.6 GB of 5.
# The others are linked by libtorch.so itself and cannot be left out.
TORCH_UNUSED := triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cusolver nvidia-nvjitlink nvidia-nvtx nvidia-cuda-cccl

export UV_HTTP_TIMEOUT ?= 300
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup mindspore demo test e2e cluster cluster-down images tiny check layers format golden bench lock crds helm chart clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## install everything, locked and hashed, into .venv

# `--without-pip` and the outer pip: Debian ships python3 without ensurepip.
$(READY): pyproject.toml $(LOCK)/bootstrap.txt $(LOCK)/dev.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip .venv
	@test -x $(BIN)/uv || $(PYTHON) -m pip --python $(BIN)/python install --quiet --require-hashes -r $(LOCK)/bootstrap.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(LOCK)/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

mindspore: $(MINDSPORE) ## real mindspore, which judges our files and runs the hook, in .venv-mindspore

$(MINDSPORE): $(READY) $(LOCK)/mindspore.txt
	@test -x .venv-mindspore/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-mindspore
	$(BIN)/uv pip sync --quiet --python .venv-mindspore/bin/python --require-hashes $(LOCK)/mindspore.txt
	@touch $@

demo: $(READY) ## build a checkpoint of more than 1 GB, convert it, verify it with torch
	$(BIN)/python examples/demo.py

test: $(READY) ## the whole suite but the end-to-end tests
	$(BIN)/pytest -m "not e2e and not mindspore" --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

.PHONY: test-mindspore
test-mindspore: $(MINDSPORE) ## files that we write, loaded by real mindspore
	$(BIN)/pytest -m mindspore tests/judges $(ARGS)

e2e: $(READY) helm ## the program end to end: as it is installed, the chart as helm renders it, a real Kubernetes
	$(BIN)/pytest -m e2e $(ARGS)

HARNESS = PYTHONPATH=tests/cluster $(BIN)/python -m harness

cluster: $(READY) ## bring up a real Kubernetes on this machine and leave it running
	@$(HARNESS) up

cluster-down: $(READY) ## end it: its processes, mounts, bridges, rules and files
	@$(HARNESS) down

images: $(READY) ## build both images with buildah and give them to the cluster, if it runs
	@$(HARNESS) images

tiny: $(READY) ## ten seconds: one small checkpoint converted and read by torch
	$(BIN)/pytest -q tests/e2e/test_tiny.py

check: $(READY) layers ## what CI checks besides the tests: ruff, mypy, pyright, imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright

layers: $(READY) ## the import rules of docs/architecture.md
	$(BIN)/lint-imports

format: $(READY) ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

golden: $(READY) ## rewrite the golden texts, then show what changed
	GOLDEN=update $(BIN)/pytest -q -m "not e2e and not mindspore"
	GOLDEN=update $(BIN)/pytest -q tests/charts
	git diff --stat -- tests/golden

bench: $(READY) ## measure against cp and the reference's method; results in benchmarks/results
	$(BIN)/python benchmarks/run.py

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
          --no-emit-find-links --custom-compile-command "make lock"

lock: $(READY) ## resolve the requirements anew (UPGRADE=1 takes newer versions)
	printf 'uv\nhatchling>=1.27\n' | $(COMPILE) $(if $(UPGRADE),--upgrade) - -o $(LOCK)/bootstrap.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml -o $(LOCK)/core.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --extra operator -o $(LOCK)/operator.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --extra torch --extra operator --group dev $(TORCH_UNUSED:%=--no-emit-package %) -o $(LOCK)/dev.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --extra mindspore -o $(LOCK)/mindspore.txt

crds: ## copy the CRD into the chart
	cp crds/*.yaml charts/ckpt2pt/files/crds/

helm: $(READY) ## build helm 3, helm 4 and helm-docs into the cache; says so where there is no Go
	$(BIN)/python tests/support/helm.py

chart: $(READY) crds helm ## the chart's copy of the CRD, its README and its schema, from their sources
	"$${XDG_CACHE_HOME:-$$HOME/.cache}"/ckpt2pt/helm-docs-*/helm-docs --chart-search-root charts --log-level warning
	GOLDEN=update $(BIN)/pytest -q tests/charts/test_chart.py -k worker_defaults

clean: ## remove what make and the tests made, .venv included
	rm -rf .venv .venv-mindspore build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
