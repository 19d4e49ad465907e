# The commands of the project. Prerequisites: cargo, python3 (3.11 or later) with pip, make.
#
#   make demo         fetch what is missing, build, serve the shipped bundle, ask it twice, show what happened, stop
#   make serve        the same set-up, then serve until Ctrl-C
#   make test         the same set-up, then every test that needs no PyTorch
#   make lint         formatting, clippy, documentation, Python sources
#   make bench-reload 200 pushes under load, every answer checked, in some minutes
#   make bench        every scenario beside the floors and two peers, five rounds in some ten minutes
#   make train-setup  a virtual environment with PyTorch (6 GB)
#   make train        train and export a bundle from DATA, a MovieLens folder, into OUT
#   make train-test   the offline half's tests

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo serve test lint bench bench-reload setup build test-setup lint-setup bench-setup train-setup train train-test

PYTHON ?= python3
DATA ?= ../shared/data/ml-latest-small
OUT ?= runs/bundle

demo: setup build
	@$(PYTHON) deploy/demo.py

serve: setup build
	./target/release/midemb serve --config deploy/midemb.toml

bench: setup build bench-setup
	@.venv/bin/python benches/run.py

bench-reload: setup build .venv/.bench-installed
	@.venv/bin/python benches/reload.py

test: setup test-setup
	$(PYTHON) -m unittest discover -s tests/setup
	cargo test --quiet --locked
	cargo test --quiet --locked --lib --features loom interleavings
	@command -v prometheus > /dev/null || echo "SKIPPED: the test against a real Prometheus, as there is no binary of that name (Debian: apt-get install prometheus)"

lint: lint-setup
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --document-private-items
	.venv/bin/ruff check deploy tests models benches
	.venv/bin/ruff format --check deploy tests models benches

# Fetches what git does not hold; says nothing when all is in place.
setup:
	@$(PYTHON) deploy/fetch.py

build:
	@cargo build --release --quiet --locked

test-setup: .venv/.tests-installed
lint-setup: .venv/.lint-installed
bench-setup: .venv/.bench-installed benches/.venv-triton/.installed
train-setup: models/.venv/.installed

.venv/bin/python:
	@$(PYTHON) -m venv .venv

# The stamp is written last: a set-up that was cut off goes on where it was.
.venv/.tests-installed: tests/requirements.txt | .venv/bin/python
	@echo "installing the tests' Python client" >&2
	@.venv/bin/pip install --quiet -r $<
	@touch $@

.venv/.bench-installed: benches/requirements.txt | .venv/bin/python
	@echo "installing what the benchmark runs beside the server" >&2
	@.venv/bin/pip install --quiet -r $<
	@touch $@

benches/.venv-triton/.installed: benches/requirements-triton.txt
	@echo "installing Triton's server, the benchmark's other peer" >&2
	@[ -x benches/.venv-triton/bin/python ] || $(PYTHON) -m venv benches/.venv-triton
	@benches/.venv-triton/bin/pip install --quiet -r $<
	@touch $@

.venv/.lint-installed: tests/requirements-lint.txt | .venv/bin/python
	@.venv/bin/pip install --quiet -r $<
	@touch $@

models/.venv/.installed: models/requirements.txt
	@echo "installing PyTorch and what else training needs: 6 GB, some minutes" >&2
	@[ -x models/.venv/bin/python ] || $(PYTHON) -m venv models/.venv
	@models/.venv/bin/pip install --quiet -r $<
	@touch $@

train: setup train-setup
	cd models && .venv/bin/python -m learn all --data "$(abspath $(DATA))" --out "$(OUT)" \
		--source "$(notdir $(abspath $(DATA)))"

train-test: setup train-setup
	models/.venv/bin/python -m pytest -q models/tests
