PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
INSTALLED := $(VENV)/.installed-$(VERSION)
DEV := $(VENV)/.installed-dev

.PHONY: demo test lint format picture clean venv python

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

venv: $(INSTALLED)

# one line before anything is made: Apple's own Python is 3.9
python:
	@case "$(VERSION)" in \
	"") echo "make: $(PYTHON) is no Python; name one of 3.10 or newer: make demo PYTHON=python3.12" >&2; exit 1;; \
	[012].*|3.[0-9].*) echo "make: Python 3.10 or newer is needed, $(PYTHON) is $(VERSION):" \
		"make demo PYTHON=python3.12, or get one with uv: uv python install 3.12" >&2; exit 1;; \
	esac

# a venv of another Python is made anew
$(INSTALLED): pyproject.toml | python
	@[ ! -d $(VENV) ] || [ -e $@ ] || rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq -e .
	touch $@

$(DEV): $(INSTALLED)
	$(BIN)/python -m pip install -qq -e '.[dev]'
	touch $@

# the chat at the top of the README: a real run, its figures are this machine's
picture: $(INSTALLED)
	$(BIN)/python -m mlx_fastforward.bench.studies.chat_picture docs/chat.svg

clean:
	rm -rf $(VENV) build *.egg-info
