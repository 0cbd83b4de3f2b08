# make notebook   execute distill.ipynb in place, figures included
# make lab        open it in JupyterLab
# make test       lint, then every test
# make study      every experiment, the paper's and those beyond it, that results/ does not hold yet, and their tables
# make benchmark  time it beside other ways to the same gradient, and write benchmarks/results.md
#
# Each makes .venv first where it is missing or requirements.txt is newer. MNIST is looked for in DATA_ROOT
# (default: data) and downloaded there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: notebook lab test study benchmark clean

notebook: $(VENV)/installed
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False distill.ipynb
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams distill.ipynb

lab: $(VENV)/installed
	$(BIN)/jupyter lab distill.ipynb

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

study: $(VENV)/installed
	$(BIN)/python -m study
	$(BIN)/python -m study beyond

benchmark: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --requirement benchmarks/requirements.txt
	PYTHONPATH=. $(BIN)/python benchmarks/benchmark.py

clean:
	rm -rf $(VENV) checkpoints

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
