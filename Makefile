# make demo: train a RetNet and a Transformer, each with its tuned rate, generate, compare in a report.
# make test: the test suite; with COVERAGE=90 also the lines of retnet/ that it runs, at least 90 %.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-all check format clean

demo: $(VENV)/.installed
	$(PY) train.py configs/tiny.yaml train.learning_rate=8e-2
	$(PY) train.py configs/tiny.yaml train.learning_rate=1e-2 model.mixer=attention
	printf 'class Parser:\n    def __init__(self' | $(PY) generate.py runs/tiny-retention - --temperature 0.7
	$(PY) compare.py runs/tiny-retention runs/tiny-attention --quick --report runs/report

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow and not gpu and not browser" $(if $(COVERAGE),--cov=retnet --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE))

test-all: $(VENV)/.installed-dev
	$(PY) -m pytest

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy retnet

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON ($(PYTHON)) is older than 3.11: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(PY)
	@echo "installing requirements.txt into $(VENV) (about a minute)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@
