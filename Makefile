# make demo: train a RetNet and a Transformer, each with its tuned rate, generate, compare in a report.
# make test: the test suite; with COVERAGE=90 also the lines of retnet/ that it runs, at least 90 %.
# make test-newest: the same with the newest libraries that can be had.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

NEWEST := .venv-newest
TORCH ?= $(shell grep ^torch constraints.txt)
TESTS ?= tests

.PHONY: demo test test-all test-newest check format clean

demo: $(VENV)/.installed
	$(PY) train.py configs/tiny.yaml
	$(PY) train.py configs/tiny.yaml model.mixer=attention train.learning_rate=5e-3
	printf 'class Parser:\n    def __init__(self' | $(PY) generate.py runs/tiny-retention - --temperature 0.7
	$(PY) compare.py runs/tiny-retention runs/tiny-attention --quick --report runs/report

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow and not gpu and not browser" $(if $(COVERAGE),--cov=retnet --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE))

test-all: $(VENV)/.installed-dev
	$(PY) -m pytest

# without the upper bounds of our ranges, whose own test is left out; torch alone, gigabytes, stays
# that of constraints.txt (make test-newest TORCH=torch TESTS=tests/model)
test-newest:
	$(call check_python)
	$(PYTHON) -m venv $(NEWEST)
	grep -hvE '^(#|-r|torch[^a-z]|$$)' requirements.txt requirements-dev.txt | sed 's/[<>=].*//' > $(NEWEST)/newest.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-r $(NEWEST)/newest.txt '$(TORCH)'
	$(NEWEST)/bin/python -m pip list | grep -iE "^($$(paste -sd'|' $(NEWEST)/newest.txt)|torch) "
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 -m "not slow and not gpu and not browser" $(TESTS) \
		--deselect tests/test_versions.py::test_what_is_installed_is_no_reason_to_warn

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy retnet

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

define check_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON ($(PYTHON)) is older than 3.11: make PYTHON=python3.11 ..." >&2; exit 2; }
endef

$(PY):
	$(call check_python)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(PY)
	@echo "installing requirements.txt into $(VENV) (about a minute)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@
