PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
INSTALLED := $(VENV)/.installed-$(VERSION)
DEV := $(VENV)/.installed-dev

# For evidence, predictor and publish; no MODEL is the demo model
export MODEL ?=
export REPO ?=
OUT ?= build/evidence
export MINUTES ?= 10
TRAIN ?=
EVAL ?=
BENCH ?=
LONGBENCH ?= --tasks qasper,hotpotqa,gov_report --limit 20
FF := $(BIN)/mlx_fastforward
WITH = $${MODEL:+--model "$$MODEL"}

CHECKS := build/checks
# a quarter of the bytes: few colours
SMALL := $(BIN)/python -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).convert("RGB").quantize(64).save(sys.argv[2], optimize=True)'

.PHONY: demo test test-page lint format pictures picture-chat picture-bench picture-eval venv python results evidence predictor longbench publish wheel-test release-version workflows clean

demo: $(INSTALLED)
	$(BIN)/mlx_fastforward demo
	@echo "(first: source $(BIN)/activate)"

test: $(DEV)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# the server's page in the system's chromium; make test skips it without playwright
test-page: $(DEV)
	@command -v chromium google-chrome >/dev/null || { echo "make: test-page needs chromium or google-chrome" >&2; exit 1; }
	$(BIN)/python -m pip install -qq -e '.[browser]'
	$(BIN)/python -m pytest -q tests/test_server_page.py

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
	[ -z "$(wildcard results/*-*.json)" ] || $(FF) bench report $(wildcard results/*-*.json) --html build/report.html

# a predictor file for MODEL, and what it does: speed, answers, what each sparsity costs
evidence: predictor
	$(FF) eval $(WITH) --predictor $(OUT)/predictor $(EVAL) --json $(OUT)/eval.json --png $(OUT)/eval.png
	$(FF) bench $(WITH) --predictor $(OUT)/predictor $(BENCH) --save $(OUT)/result.json --png $(OUT)/bench.png
	$(FF) bench report $(OUT)/result.json --html $(OUT)/report.html --markdown $(OUT)/report.md

predictor: $(INSTALLED)
	mkdir -p $(OUT)
	$(FF) doctor $(WITH)
	$(FF) train $(WITH) --minutes "$$MINUTES" $(TRAIN) --out $(OUT)/predictor --overwrite

longbench: $(INSTALLED)
	$(BIN)/python -m pip install -qq -e '.[eval]'
	$(FF) eval $(WITH) --predictor $(OUT)/predictor --longbench $(LONGBENCH) --json $(OUT)/longbench.json

publish: $(INSTALLED)
	$(FF) upload --path $(OUT)/predictor --upload-repo "$$REPO"

wheel-test:
	.ci/wheel-test $(PYTHON)

# a tag that is not the package's version publishes nothing
release-version:
	@grep -qx '__version__ = "'"$${GITHUB_REF_NAME#v}"'"' mlx_fastforward/version.py || \
		{ echo "make: the tag is $$GITHUB_REF_NAME, expected v and what mlx_fastforward/version.py says" >&2; exit 1; }

workflows: $(CHECKS)/.installed
	$(CHECKS)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(CHECKS)/bin/zizmor --offline --pedantic .github/workflows

$(CHECKS)/.installed: Makefile
	$(PYTHON) -m venv $(CHECKS)
	$(CHECKS)/bin/python -m pip install -qq check-jsonschema zizmor
	touch $@

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

# the README's: real runs, their figures are this machine's
pictures: picture-chat picture-bench picture-eval

picture-chat: $(INSTALLED)
	$(BIN)/python -m mlx_fastforward.bench.studies.chat_picture docs/chat.svg

picture-bench: $(INSTALLED)
	mkdir -p build
	$(FF) bench --random llama-3.2-1b --layers 4 -n 3 $(BENCH) --json build/bench.json --png build/bench.png
	$(SMALL) build/bench.png docs/bench.png

picture-eval: $(INSTALLED)
	mkdir -p build
	$(FF) eval --dtype float32 --sparsities 0.5 --prompts 10 $(EVAL) --json build/eval.json --png build/eval.png
	$(SMALL) build/eval.png docs/eval.png

clean:
	rm -rf $(VENV) build dist *.egg-info
