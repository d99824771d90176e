# `make help` lists the targets. PYTHON picks the interpreter that the virtual environment is made with.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv install quickstart test test-slow lint docs docs-pages peers consumers pretrain

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(BIN)/python ## create .venv

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('medsam2 needs Python 3.11 or newer; try make PYTHON=python3.12 venv') if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv .venv

install: $(INSTALLED) ## install the package into .venv, editable, with the pinned versions

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

quickstart: install ## generated cases -> shards -> fine-tune -> evaluate -> export, about ten minutes on two cores
	$(BIN)/python -m medsam2.demo.quickstart

test: install ## the test suite, in WORKERS processes (2)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

test-slow: install ## the test suite with the slow tests
	$(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile

lint: install ## ruff, mypy, the layers, and the links of README.md and docs/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/rumdl check README.md docs

docs: docs-pages ## the documentation as a site, links checked: build/docs/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]" -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

docs-pages: install ## the pages and pictures of docs/ that are made from the code
	$(BIN)/python docs/reference/configuration.py
	$(BIN)/python docs/figures/house.py

peers: install ## what benchmarks compare with, beside the package and never installed: build/peers (needs the network once)
	rm -rf build/peers
	$(BIN)/python -m pip download --quiet --dest build/peers sam2==1.1.0 --no-deps --no-binary sam2 --no-build-isolation
	tar -xzf build/peers/sam2-1.1.0.tar.gz -C build/peers
	$(BIN)/python -m pip install --quiet --target build/peers/site --no-deps tensordict==0.10.0 pyvers==0.1.0

consumers: install ## programs that open our exports, for tests/consumers, beside the package: build/consumers (needs the network once)
	rm -rf build/consumers
	for list in tests/consumers/requirements/*.txt; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
			--target build/consumers/$$(basename $$list .txt) -r $$list || exit 1; \
	done

pretrain: install ## make the shipped nano checkpoint again: cases, shards, training (an hour and a half on two cores)
	$(BIN)/medsam2 demo cases runs/pretrain/cases --without wall --cases 600 --seed 1000
	$(BIN)/medsam2 prepare runs/pretrain/cases --out runs/pretrain/shards --split 0.97,0.03
	PYTHON=$(BIN)/python recipes/pretrain_nano/run.sh runs/pretrain/shards runs/pretrain/run
	$(BIN)/python -m medsam2.export.shipped runs/pretrain/run/polish
