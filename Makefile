# Everything happens in $(VENV); the first target that needs it makes it.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# hundreds of Pythons are started: without kept bytecode each compiles all that it imports
unexport PYTHONDONTWRITEBYTECODE
# a process per core; a file's tests stay together, for they share what is slow to make
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test fast check lint types docs dist audit mutants faults study gpu-check base-model clean

demo: $(VENV)/installed        ## the quickstart, from SFT to report
	$(BIN)/salsa run recipes/quickstart.yaml

test: $(VENV)/installed        ## every test
	$(PYTEST)

fast: $(VENV)/installed        ## the tests that take seconds
	$(PYTEST) -m "not slow"

check: lint types docs test    ## what CI runs

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy

docs: $(VENV)/installed        ## these pages in dist/site, links checked; seconds
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

dist: $(VENV)/installed        ## wheel and sdist, and the wheel tried in an environment of its own
	scripts/check_wheel.sh $(BIN)/python

audit: $(VENV)/installed       ## known holes in what constraints.txt pins; needs a network, fails where it has none
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

mutants: $(VENV)/installed     ## do the fast tests notice a broken line? hours; goes on where it stopped
	$(BIN)/python -m pip install --quiet cosmic-ray==8.7.0
	$(BIN)/python scripts/mutants.py

faults: $(VENV)/installed      ## the table of faults in docs/how-to/cluster.md, from a test run that injects them
	$(BIN)/python -m pytest -p tests.fault_table -m fault --fault-table docs/how-to/cluster.md

study: $(VENV)/installed       ## docs/study-plan.md, a night on two cores; goes on where it stopped
	$(BIN)/salsa sweep recipes/study/forecast.yaml
	$(BIN)/salsa sweep recipes/study/rl.yaml
	$(BIN)/salsa sweep recipes/study/landscape.yaml
	$(BIN)/salsa sweep recipes/study/grid.yaml
	$(BIN)/salsa sweep recipes/study/controls.yaml

gpu-check: $(VENV)/installed   ## on a machine with a GPU: does everything run there, and how fast? one JSON
	$(BIN)/python benchmarks/gpu_check.py

base-model: $(VENV)/installed  ## train the embedded base model again (about an hour)
	$(BIN)/python scripts/make_base_model.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("salsa-rlhf needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[demo,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
