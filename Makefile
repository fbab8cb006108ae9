# LIT_VENV names the environment, as for setup_env.sh.
LIT_VENV ?= .venv
export LIT_VENV
PYTHON = "$(LIT_VENV)/bin/python"
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-lvt demo-detection demo-segmentation test lint format bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: ## make the environment with everything
	@./setup_env.sh

demo: ## train, validate and plot a small LIT on real digits (classification only)
	@./setup_env.sh --core
	@./classification/demo.sh

demo-lvt: ## train a small LVT with token labels of that LIT
	@./setup_env.sh --core
	@./classification/demo.sh lvt

demo-detection: setup ## train a small Mask R-CNN on drawn scenes, measure it, draw what it finds
	@./detection/demo.sh

demo-segmentation: setup ## train a small Semantic FPN on drawn scenes, measure it, draw what it finds
	@./segmentation/demo.sh

# A test process a core, one torch thread each.
test: setup ## run all tests; ARGS="tests/classification -k dtm" runs some
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest -q -n logical --maxprocesses 8 --dist worksteal $(ARGS)

# Written by mdformat, see .mdformat.toml: lines of 100 columns.
PAGES = README.md CONTRIBUTING.md CHANGELOG.md docs detection/README.md segmentation/README.md

lint: ## check style: ruff check, ruff format, mdformat
	@./setup_env.sh --core
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mdformat --check $(PAGES)

format: ## rewrite the code and the pages in the house format
	@./setup_env.sh --core
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m mdformat $(PAGES)

bench: ## print the speed tables of this machine
	@./setup_env.sh --core
	@$(PYTHON) classification/benchmark.py dtm

clean: ## remove caches and build leftovers; environment, data and output stay
	@find . \( -name .venv -o -name .git -o -path ./data -o -path ./output \) -prune -o \
	    -type d \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name '*.egg-info' \) -prune -exec rm -rf {} +
	@rm -rf build dist
