# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
# tests run in as many processes, each with one thread
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope

.PHONY: demo web test slow fuzz matrix lint format docs release bench bench-check clean

# the package alone, with what it needs, says what it does from the first second on
$(VENV)/package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "kancompile needs Python 3.11 or newer, found %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@echo "making $(VENV) and installing PyTorch (CPU), ONNX and ONNX Runtime there: a few hundred MB, about a minute"
	@(while sleep 4; do echo "... $$(du -sm $(VENV) | cut -f1) MB so far"; done) & watch=$$!; \
	  { test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); } && $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable .; \
	  result=$$?; kill $$watch; exit $$result
	@touch $@

$(VENV)/installed: $(VENV)/package tests/clients/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint,examples,plots,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/clients/requirements.txt
	@touch $@

demo: $(VENV)/package
	$(BIN)/python -m examples.demo

web: $(VENV)/package
	$(BIN)/python -m examples.web.build --serve

test: $(VENV)/installed
	$(PYTEST)

slow: $(VENV)/installed
	$(PYTEST) -m slow

# changed files for every reader, up to SECONDS of processor time and INPUTS files each, and PROGRAMS of drawn networks, four recipes a
# network; goes on where logs end
SECONDS ?= 1200
INPUTS ?= 200000
PROGRAMS ?= 2000
fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing --seconds $(SECONDS) --inputs $(INPUTS) --log fuzz.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing.networks --programs $(PROGRAMS) --log fuzz-networks.json

# the oldest and the newest versions of dependencies that pyproject.toml admits, each in an environment of its own (build/matrix)
matrix:
	OMP_NUM_THREADS=1 $(PYTHON) .ci/matrix.py

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# wheel and source distribution in dist/, checked; the documentation built from the source distribution; workflows by their schema
release: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[release]'
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	rm -rf dist build/release
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	mkdir -p build/release
	tar -xf dist/kancompile-*.tar.gz -C build/release --strip-components 1
	cd build/release && $(abspath $(BIN))/python -m sphinx --fail-on-warning --quiet -b html docs docs/_build/html
	@ls -l dist

bench: $(VENV)/installed
	@test -n "$(DATA)" || { echo "usage: make bench DATA=folder  (with mnist.npz: x_train, y_train, x_test, y_test)"; exit 2; }
	$(BIN)/python -m benchmarks.latency --data $(DATA)
	$(BIN)/python -m benchmarks.limit --data $(DATA)

# fails where files of the compatibility page have grown or lost precision against benchmarks/compatibility.json and field.json
bench-check: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.compatibility --check
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.field --check

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info
