# The one door.  `make` lists what is behind it; every target installs what it needs.

PYTHON ?= python3
BIN    := .venv/bin
CORE   := .venv/.core
READY  := .venv/.ready
TORCH_READY := .venv/.torch
MINDSPORE := .venv-mindspore/.ready
LOCK   := requirements
TRANSFORMERS := $(patsubst $(LOCK)/transformers-%.txt,.venv-transformers/%/.ready,$(wildcard $(LOCK)/transformers-*.txt))
MEGATRON := $(patsubst $(LOCK)/megatron-%.txt,.venv-megatron/%/.ready,$(wildcard $(LOCK)/megatron-*.txt))

# Parts of torch's CUDA build that `import torch` does without on a machine without a GPU: 1.6 GB of 5.
# The others are linked by libtorch.so itself and cannot be left out.
TORCH_UNUSED := triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cusolver nvidia-nvjitlink nvidia-nvtx nvidia-cuda-cccl

export UV_HTTP_TIMEOUT ?= 300
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup mindspore megatron transformers demo test e2e cluster cluster-down images push tiny check layers format golden bench lock crds helm chart clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## install what `make check` and most tests need, locked and hashed, into .venv

# Three sets of packages in one .venv, each a superset of the one before: core (the converter, for the demo), test, dev (with torch).
# `--without-pip` and the outer pip: Debian ships python3 without ensurepip.
.venv/bin/uv: $(LOCK)/bootstrap.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"ckpt2pt needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@echo "installing uv and hatchling into .venv (18 MB to download)"
	@$(PYTHON) -m venv --clear --without-pip .venv
	@$(PYTHON) -m pip --python $(BIN)/python install --quiet --require-hashes -r $(LOCK)/bootstrap.txt
	@touch $@

SYNC     = $(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes
EDITABLE = $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .

$(CORE): pyproject.toml .venv/bin/uv $(LOCK)/core.txt
	@test -e $(READY) || echo "installing the converter into .venv: numpy, rich and a few small packages (18 MB to download)"
	@test -e $(READY) || { $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r $(LOCK)/core.txt && $(EDITABLE); }
	@test ! -e $(READY) || $(MAKE) --no-print-directory $(READY)
	@touch $@

$(READY): pyproject.toml .venv/bin/uv $(LOCK)/test.txt
	@test -e $(TORCH_READY) || echo "installing the tests' and the operator's packages into .venv (150 MB to download, 560 MB on disk; torch is not among them)"
	@test -e $(TORCH_READY) || { $(SYNC) $(LOCK)/test.txt && $(EDITABLE); }
	@test ! -e $(TORCH_READY) || $(MAKE) --no-print-directory $(TORCH_READY)
	@touch $@

$(TORCH_READY): pyproject.toml .venv/bin/uv $(LOCK)/dev.txt
	@echo "installing torch into .venv: the CUDA build, as PyPI has no other (2.5 GB to download, 4 GB on disk)"
	@$(SYNC) $(LOCK)/dev.txt && $(EDITABLE)
	@touch $@ $(READY)

mindspore: $(MINDSPORE) ## real mindspore, which judges our files and runs the hook, in .venv-mindspore

$(MINDSPORE): $(TORCH_READY) $(LOCK)/mindspore.txt $(LOCK)/mindformers.txt
	@test -x .venv-mindspore/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-mindspore
	$(BIN)/uv pip sync --quiet --python .venv-mindspore/bin/python --require-hashes $(LOCK)/mindspore.txt
	$(BIN)/uv pip install --quiet --python .venv-mindspore/bin/python --no-deps --require-hashes -r $(LOCK)/mindformers.txt
	@touch $@

megatron: $(MEGATRON) ## code of Megatron-LM, which judges our files, in .venv-megatron: a folder for each release

# The interpreter and torch are those of .venv.  Wheels are for one Python each (0.8 to 0.16 for 3.11, newer ones for 3.12); what is
# imported of them is Python code that runs on any.
.venv-megatron/%/.ready: $(LOCK)/megatron-%.txt $(TORCH_READY)
	@echo "installing megatron-core $* into .venv-megatron (3 MB to download)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --python-version $(if $(filter 0.8.% 0.12.% 0.15.% 0.16.%,$*),3.11,3.12) \
	  --no-deps --no-build --require-hashes --target $(@D) -r $<
	@touch $@

transformers: $(TRANSFORMERS) ## transformers of Hugging Face, 4 and 5, which judge our files, in .venv-transformers: a folder for each release

.venv-transformers/%/.ready: $(LOCK)/transformers-%.txt $(TORCH_READY)
	@echo "installing transformers $* into .venv-transformers (35 MB to download)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build --require-hashes --target $(@D) -r $<
	@touch $@

demo: $(if $(TORCH),$(TORCH_READY),$(CORE)) ## build a checkpoint of more than 1 GB, convert it, verify it; TORCH=1: with real torch
	$(BIN)/python examples/demo.py $(if $(TORCH),--reader torch)

RUN_TESTS = $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(READY) ## the whole suite but the end-to-end tests: what needs no torch first, then the judges that are torch itself
	$(RUN_TESTS) -m "not torch and not e2e and not mindspore and not megatron and not transformers" $(ARGS)
	@$(MAKE) --no-print-directory judges

.PHONY: judges
judges: $(TORCH_READY) ## the tests in which real torch reads what we write
	$(RUN_TESTS) -m "torch and not e2e and not mindspore and not megatron and not transformers" $(ARGS)

.PHONY: test-mindspore
test-mindspore: $(MINDSPORE) ## files that we write, loaded by real mindspore
	$(BIN)/pytest -m mindspore tests/judges $(ARGS)

.PHONY: test-megatron
test-megatron: $(MEGATRON) ## results that we write, loaded by Megatron-LM 0.8 to 0.19 on the CPU
	$(BIN)/pytest -m megatron tests/judges $(ARGS)

.PHONY: test-transformers
test-transformers: $(TRANSFORMERS) .venv-megatron/0.19.2/.ready ## transformers 4.57 and 5 on the CPU: they load our results, and Megatron-LM computes what they said
	$(BIN)/pytest -m transformers tests/judges $(ARGS)

e2e: $(TORCH_READY) helm ## the program end to end: as it is installed, the chart as helm renders it, a real Kubernetes
	$(BIN)/pytest -m e2e $(ARGS)

HARNESS = PYTHONPATH=tests/cluster $(BIN)/python -m harness

cluster: $(READY) ## bring up a real Kubernetes on this machine and leave it running
	@$(HARNESS) up

cluster-down: $(READY) ## end it: its processes, mounts, bridges, rules and files
	@$(HARNESS) down

images: $(READY) ## build both images with buildah and give them to the cluster, if it runs
	@$(HARNESS) images

# What the chart names: <registry>/<repository>:<appVersion>.  BUILD_FLAGS and PUSH_FLAGS are further words for buildah, whose
# older versions (as Debian 12's) do not know BUILDPLATFORM in a FROM.
VERSION     := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
PLATFORMS   ?= linux/amd64,linux/arm64
BASE        = $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE))

push: ## build both images with buildah and push them: make push REGISTRY=registry.example.com/team
	@test -n "$(REGISTRY)" || { echo "say where to: make push REGISTRY=registry.example.com/team" >&2; exit 64; }
	@set -e; for image in operator:ckpt2pt-operator converter:ckpt2pt; do \
	  name="$(REGISTRY)/$${image#*:}:$(VERSION)"; digest=$$(mktemp); \
	  buildah manifest rm "$$name" >/dev/null 2>&1 || true; \
	  sed "s|\$${BUILDPLATFORM}|$$(buildah info --format '{{.host.os}}/{{.host.arch}}')|" Dockerfile | \
	  buildah build --file - --layers --platform $(PLATFORMS) --target "$${image%:*}" --manifest "$$name" \
	    --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) $(BASE) $(BUILD_FLAGS) .; \
	  buildah manifest push $(PUSH_FLAGS) --quiet --all --rm --digestfile "$$digest" "$$name" "docker://$$name"; \
	  echo "pushed $$name@$$(cat "$$digest")"; rm "$$digest"; \
	done

tiny: $(TORCH_READY) ## ten seconds: one small checkpoint converted and read by torch
	$(BIN)/pytest -q tests/e2e/test_tiny.py

check: $(READY) layers ## what CI checks besides the tests: ruff, mypy, pyright, imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright

layers: $(READY) ## the import rules of docs/architecture.md
	$(BIN)/lint-imports

format: $(READY) ## fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

golden: $(TORCH_READY) ## rewrite the golden texts, then show what changed
	GOLDEN=update $(BIN)/pytest -q -m "not e2e and not mindspore and not megatron and not transformers"
	GOLDEN=update $(BIN)/pytest -q tests/charts
	git diff --stat -- tests/golden

bench: $(TORCH_READY) ## measure against cp and the reference's method; results in benchmarks/results
	$(BIN)/python benchmarks/run.py

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
          --no-emit-find-links --custom-compile-command "make lock"

lock: $(READY) ## resolve the requirements anew (UPGRADE=1 takes newer versions)
	printf 'uv\nhatchling>=1.27\neditables\n' | $(COMPILE) $(if $(UPGRADE),--upgrade) - -o $(LOCK)/bootstrap.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml -o $(LOCK)/core.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --extra operator -o $(LOCK)/operator.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --extra torch --extra operator --group dev $(TORCH_UNUSED:%=--no-emit-package %) -o $(LOCK)/dev.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --extra operator --group dev --constraint $(LOCK)/dev.txt -o $(LOCK)/test.txt
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --extra mindspore -o $(LOCK)/mindspore.txt
	for version in 4.57.6 5.24.0; do printf "transformers==$$version\n" | $(COMPILE) --no-emit-package numpy - -o $(LOCK)/transformers-$$version.txt; done

crds: ## copy the CRD into the chart and the static manifests
	cp crds/*.yaml charts/ckpt2pt/files/crds/
	cp crds/*.yaml deploy/

helm: $(READY) ## build helm 3, helm 4, helm-docs, actionlint and crane into the cache; says so where there is no Go
	$(BIN)/python tests/support/helm.py

chart: $(READY) crds helm ## the copies of the CRD, the chart's README and schema, and deploy/, from their sources
	"$${XDG_CACHE_HOME:-$$HOME/.cache}"/ckpt2pt/helm-docs-*/helm-docs --chart-search-root charts --log-level warning
	GOLDEN=update $(BIN)/pytest -q tests/charts -k "worker_defaults or static_manifests"

clean: ## remove what make and the tests made, .venv included
	rm -rf .venv .venv-mindspore .venv-megatron .venv-transformers build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
