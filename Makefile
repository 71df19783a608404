# Each target sets up what it needs in .venv and is quick the second time. Modules are compiled when first imported: most of
# the 19,000 that pip would compile, for more than a minute, never are.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what is compiled when first imported is kept for the dozens of processes that follow
unexport PYTHONDONTWRITEBYTECODE
EXAMPLES := examples/ecg:examples/forecast:examples/protein

.PHONY: demo test lint bench docs test-matrix clean

demo: $(VENV)/.demo
	$(BIN)/mambaseq demo --out runs/demo

test: $(VENV)/.dev
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/mypy & types=$$!; \
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && PYTHONPATH=$(EXAMPLES) $(BIN)/lint-imports; others=$$?; \
	wait $$types && exit $$others

bench: $(VENV)/.dev
	$(BIN)/pip install -q --no-compile -e '.[eval]'
	$(BIN)/python benchmarks/cpu.py

# the documentation's site, into site/
docs: $(VENV)/.demo
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# the oldest dependencies on the oldest Python, the newest on the newest
test-matrix:
	bash tests/matrix.sh

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "mambaseq needs Python 3.11 to 3.13; run make with PYTHON=python3.12, say."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -e .
	touch $@

# which is more than .demo's: where neither is there yet, all is installed at once
$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -e '.[dev]'
	touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) runs build dist site
