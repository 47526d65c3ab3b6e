# make demo: a picture from the model that ships with this worker. make web: its page, at http://127.0.0.1:8080.
# make test: lint, types and the fast tests.
# make test-all: those and all that compiles, soaks or sweeps, with coverage: what CI runs.
# make fuzz MINUTES=30 TARGETS="pictures adapters": coverage-guided fuzzing, each target for as long; all by default.
# make lock: requirements*.txt into locked/; UPGRADE=--upgrade takes the newest of what they leave open.
# make licences: LICENCES.md. make audit: known vulnerabilities of what is locked.
# make docs: what README, docs/ and .runpod/ repeat of the code and of the results. make pictures: the examples' pictures and the screenshots anew.
# make release VERSION=1.2.3: what is unreleased becomes that version, as a commit and a tag; nothing is pushed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COVERAGE := --cov=handler --cov=client --cov=src --cov=web
PYTEST := $(BIN)/pytest -n logical --dist loadfile --no-loadscope-reorder -q
MINUTES ?= 30

.PHONY: demo web test test-all lint fuzz lock licences audit docs pictures release clean
.DELETE_ON_ERROR:

demo: $(VENV)/runtime
	MODEL_NAME=flux-shapes $(BIN)/python local_test.py --output outputs
	@echo "make web opens the page for it, at http://127.0.0.1:8080"

web: $(VENV)/runtime
	MODEL_NAME=$${MODEL_NAME:-flux-shapes} $(BIN)/python web.py --open

test: lint
	$(PYTEST) -m "not slow" $(MORE) tests/

# One more than there are cores: much of what is slow waits for other processes.
test-all:
	$(MAKE) test MORE="$(COVERAGE) --cov-report="
	$(PYTEST) -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) -m slow $(COVERAGE) --cov-append --cov-fail-under=95 tests/

lint: $(VENV)/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint Dockerfile

fuzz: $(VENV)/fuzz
	$(BIN)/python -m fuzz $(TARGETS) --minutes $(MINUTES)

lock: $(VENV)/supply
	$(BIN)/python -m scripts.lock $(UPGRADE)

licences: | $(BIN)/pip
	$(BIN)/python -m scripts.licences

audit: $(VENV)/supply
	for name in torch cuda runtime quantization; do \
		$(BIN)/pip-audit --strict --disable-pip --require-hashes --no-deps --requirement locked/$$name.txt || exit 1; \
	done

docs: $(VENV)/development
	$(BIN)/python -m scripts.docs

pictures: $(VENV)/development
	$(BIN)/python -m scripts.examples
	$(BIN)/python -m scripts.screenshots

release:
	$(PYTHON) -m scripts.release "$(VERSION)"

clean:
	rm -rf $(VENV) outputs

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; PYTHON=python3.x picks one"; exit 1; }
	sh scripts/venv.sh $(PYTHON) $(VENV)

# A stamp for each file of locked/: what a machine has, held against its hashes.
RUNTIME := locked/torch.txt locked/cuda.txt locked/runtime.txt

$(VENV)/runtime: $(RUNTIME) scripts/install.sh | $(BIN)/pip
	sh scripts/install.sh $(BIN) runtime
	@touch $@

$(VENV)/development: $(RUNTIME) locked/quantization.txt locked/development.txt scripts/install.sh | $(BIN)/pip
	sh scripts/install.sh $(BIN) runtime quantization development
	@touch $@ $(VENV)/runtime

$(VENV)/fuzz: locked/fuzz.txt $(VENV)/development
	sh scripts/install.sh $(BIN) fuzz
	@touch $@

$(VENV)/supply: locked/supply.txt scripts/install.sh | $(BIN)/pip
	sh scripts/install.sh $(BIN) supply
	@touch $@
