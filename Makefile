# Every target sets up what it needs: a fresh clone and Python 3.11 to 3.13 are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: setup demo test image-test check lint bench drill deploy lock clean

setup: $(STAMP)

# The lock holds every package with its hashes; pip refuses anything else. --no-deps: there is nothing to resolve, and pip before
# 24 would look past the lock for a package that another one wants with an extra, as soon as a newer release of it is out.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "Proctor needs Python 3.11 to 3.13; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 1; }
	@began=$$(date +%s); set -e; \
	echo "Setting up $(VENV) (about 1.5 minutes, once)"; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(PIP) install --no-deps --require-hashes -r requirements.lock; \
	$(PIP) install --no-deps --no-build-isolation --editable .; \
	.ci/restic $(BIN); \
	.ci/pgbouncer; \
	touch $(STAMP); echo "Set-up took $$(($$(date +%s) - began)) s"

# A real evaluation, end to end, on this machine.
demo: setup
	@$(BIN)/proctor demo

test: setup
	$(BIN)/python -m pytest

# The container image, built for real and run: some 3 minutes. It takes root, and Debian's buildah and debootstrap.
image-test: setup
	@{ command -v buildah && command -v debootstrap; } >/dev/null \
	  || { apt-get -qq update && apt-get -qq install --yes --no-install-recommends buildah debootstrap; } \
	  || echo "apt could not install buildah and debootstrap here."
	$(BIN)/python -m pytest -m image -n 0 -s tests/deploy/test_image.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

bench: setup
	$(BIN)/python -m tests.benchmarks

drill: setup
	$(BIN)/python -m tests.drills chaos --seconds 600

# By `gcloud run deploy`, with flags that say what service.yaml says; deploy.env says where to. IMAGE: which, else the newest.
deploy: setup
	@$(BIN)/proctor deploy $(IMAGE)

# Addresses stay out of the lock: it must install from whatever index a machine uses.
lock: setup
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --annotation-style line --all-extras \
	  --quiet pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
