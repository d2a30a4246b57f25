PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: demo test test-page lint format clean

demo: $(INSTALLED)
	$(BIN)/mlx_fastforward demo
	@echo "(first: source $(BIN)/activate)"

test: $(DEV)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# the server's page in the system's chromium; make test skips it without playwright
test-page: $(DEV)
	$(BIN)/python -m pip install -qq -e '.[browser]'
	$(BIN)/python -m pytest -q tests/test_server_page.py

lint: $(DEV)
	$(BIN)/black --check -q .
	$(BIN)/isort --check -q .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/isort -q .
	$(BIN)/black -q .

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
