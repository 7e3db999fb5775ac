# Two commands do everything from a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled when imported: compiling all of torch and transformers takes longer than installing them. Imports must then
# be allowed to keep what they compile.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
JOBS ?= 2

.PHONY: demo test lint types unit browser stress docs dist wheel versions format clean
demo: $(VENV)/cli.done
	$(BIN)/flatmin compare --log-sharpness 3 --look 21

test: lint types unit

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.done
	$(BIN)/mypy

# One thread a worker: two workers on two cores, without fighting over them.
unit: $(VENV)/dev.done browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

# The report is tested in a real browser. Where Debian's cannot be had, those tests are skipped and say so.
browser:
	@if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver) >/dev/null 2>&1 \
		|| echo 'chromium could not be installed: the tests in a browser are skipped'; fi

# Kills of the command, in six uses, at random moments; fails if anything is wrong afterwards.
KILLS ?= 120
stress: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kills.py --kills $(KILLS) --out benchmarks/results/kills.json

# The site, into site/: a link that leads nowhere is an error. It opens from the disk.
docs: $(VENV)/dev.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What is uploaded: a source archive and a wheel, checked as the index checks them.
dist: $(VENV)/bin/python
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

# The wheel in an empty environment: it imports, trains, compares, and its types are seen.
wheel: dist
	.ci/wheel

# What each torch has that the package admits, against what flatmin uses: reads their sources, and installs none.
versions: $(VENV)/dev.done
	$(BIN)/python .ci/torch_versions.py 2.6.0 2.7.1 2.8.0 2.9.1 2.10.0 2.11.0 2.12.0 2.13.0 2.14.1

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flatmin needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a range would admit a newer build of several gigabytes.
$(VENV)/cli.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[cli,report]'
	touch $@

# timm apart, for its torchvision: others would use it as soon as they find it. Where it cannot be had, its tests are
# skipped and say so.
$(VENV)/dev.done: $(VENV)/cli.done
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/timm timm torchvision \
		|| echo 'timm could not be installed: its tests are skipped'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
