# make demo: a picture from the model that ships with this worker. make test: lint, types and the fast tests.
# make test-all: those and all that compiles, soaks or sweeps, with coverage: what CI runs.
# make fuzz MINUTES=30 TARGETS="pictures adapters": coverage-guided fuzzing, each target for as long; all by default.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COVERAGE := --cov=handler --cov=src
PYTEST := $(BIN)/pytest -n logical --dist loadfile -q
MINUTES ?= 30

.PHONY: demo test test-all lint fuzz clean
.DELETE_ON_ERROR:

demo: $(VENV)/runtime
	MODEL_NAME=flux-shapes $(BIN)/python local_test.py --output outputs

test: lint
	$(PYTEST) -m "not slow" $(MORE) tests/

test-all:
	$(MAKE) test MORE="$(COVERAGE) --cov-report="
	$(PYTEST) -m slow $(COVERAGE) --cov-append --cov-fail-under=95 tests/

lint: $(VENV)/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint Dockerfile

fuzz: $(VENV)/fuzz
	$(BIN)/python -m fuzz $(TARGETS) --minutes $(MINUTES)

clean:
	rm -rf $(VENV) outputs

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; PYTHON=python3.x picks one"; exit 1; }
	sh scripts/venv.sh $(PYTHON) $(VENV)

$(VENV)/runtime: requirements.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/development: requirements.txt requirements-quantization.txt requirements-dev.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/runtime

$(VENV)/fuzz: requirements-fuzz.txt $(VENV)/development
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-fuzz.txt
	@touch $@
