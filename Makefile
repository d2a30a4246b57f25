PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: demo test lint format results clean

demo: $(INSTALLED)
	$(BIN)/mlx_fastforward demo
	@echo "(first: source $(BIN)/activate)"

test: $(DEV)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(DEV)
	$(BIN)/black --check -q .
	$(BIN)/isort --check -q .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/isort -q .
	$(BIN)/black -q .

# what others measured: each file against the schema, and all of them as one page
results: $(DEV)
	mkdir -p build
	$(BIN)/python -m pytest -q tests/test_results.py
	$(BIN)/mlx_fastforward bench report $(wildcard results/*-*.json) --html build/report.html

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq -e .
	touch $@

$(DEV): $(INSTALLED)
	$(BIN)/python -m pip install -qq -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
