# Everything is installed in $(VENV).  Only `make test` as root changes the system: it installs Debian packages and starts
# the backends' daemons (tests/machine).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
ARGS ?=
SUITE ?= trixie
IMAGE ?= agent-dispatcher
VERSION = $(shell sed -n 's/^    version="\(.*\)",$$/\1/p' setup.py)
# Compiled at the installation where a C compiler is found (docs/adr/0010).
COMPILED = $(wildcard $(addprefix dispatcher/proxy/edge/,http/*.py routing/*.py net/*.py))

.PHONY: help demo test check gallery bench docs deb image clean machine test-release

help:
	@echo 'make demo    try it: two users, each with an instance of a small app, in your browser'
	@echo 'make test    all tests; as root it first installs and starts their requirements'
	@echo 'make test-release SUITE=trixie   the package on a whole machine of that Debian or Ubuntu release, as root'
	@echo 'make check   style, types and unit tests, in under a minute'
	@echo 'make gallery try all apps of examples/gallery in Chromium (installs 3 GB into .cache)'
	@echo 'make bench   run the benchmarks; see bench/RESULTS.md'
	@echo 'make docs    build the documentation as a site, in build/site/'
	@echo 'make deb     build a package for this Debian or Ubuntu release, in dist/'
	@echo 'make image   build a container image of manager and proxy, for packaging/container/compose.yml'
	@echo 'make clean   remove generated files'

demo: $(VENV)/.demo
	@$(BIN)/dispatcher demo $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff check --isolated --select F tests bench examples
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -q -n 2 tests/unit $(ARGS)

test: machine $(VENV)/.test
	@VENV='$(VENV)' tests/machine/run $(ARGS)

test-release: machine $(VENV)/.test
	DISPATCHER_TEST_SUITE='$(SUITE)' $(BIN)/pytest -n0 -m 'not gallery' tests/integration/test_machine.py $(ARGS)

gallery: $(VENV)/.test
	$(BIN)/pytest -n0 -m gallery tests/browser/test_gallery.py $(ARGS)

bench: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" bench/run $(ARGS)

docs: $(VENV)/.docs
	@echo 'Building the pages (ten seconds)'
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -E -c docs . build/site
	@echo 'Open build/site/index.html'

deb:
	@packaging/build-deb $(ARGS)

image:
	docker build --file packaging/container/Dockerfile --tag '$(IMAGE):$(VERSION)' --tag '$(IMAGE):latest' \
		--build-arg VERSION='$(VERSION)' $(ARGS) .

machine:
	@tests/machine/install

$(VENV)/bin/python:
	@tests/machine/make-venv '$(PYTHON)' '$(VENV)'

$(VENV)/.demo: $(VENV)/bin/python setup.py constraints.txt $(COMPILED)
	@echo 'Installing dispatcher into $(VENV) (half a minute; up to two more while a C compiler builds the edge)'
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/bin/python setup.py constraints.txt $(COMPILED)
	@echo 'Installing dispatcher and what its tests need into $(VENV) (a minute; up to two more while a C compiler builds the edge)'
	@$(PIP) install -c constraints.txt -e ".[$$(tests/machine/extras)]"
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: $(VENV)/bin/python setup.py constraints.txt
	@echo 'Installing dispatcher and Sphinx into $(VENV) (a minute; up to two more while a C compiler builds the edge)'
	@$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf '$(VENV)' .venv-ci build dist *.egg-info *.so dispatcher/proxy/edge/*/*.so .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* .hypothesis
