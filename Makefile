# make notebook         run the tutorial; the executed copy and all that it makes go to out/
# make lab              open the tutorial in JupyterLab
# make tutorial-seeds   for maintainers: run the tutorial from five seeds, for the table that its test reads
# make test             lint, then every test
# make test-device      test the device named by DEVICE, as DEVICE=cuda, and print what the method costs there
# make study            every experiment that study/results does not hold yet
# make study-notebooks  run the two notebooks of the study into out/
# make export           the distilled sets as Parquet files and tensors, for use without this project
# make benchmark        time the meta-gradient beside other ways to compute it; about 15 minutes
# make release          for maintainers: refresh the stored outputs, figures, tables and cards in the repository
#
# Each makes .venv first where it is missing, with what it needs and no more. MNIST is looked for in the folder DATA_ROOT
# (default: data) and downloaded there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_NOTEBOOK := $(BIN)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.record_timing=False --output-dir out
export PYTHONPATH := $(CURDIR)

.PHONY: notebook lab tutorial-seeds test test-device study study-notebooks export benchmark release clean

notebook: $(VENV)/installed
	$(RUN_NOTEBOOK) distill.ipynb
	@echo "The executed notebook is out/distill.ipynb, with figures and sets beside it."

lab: $(VENV)/installed
	$(BIN)/jupyter lab distill.ipynb

tutorial-seeds: $(VENV)/installed
	for seed in 0 1 2 3 4; do SEED=$$seed OUT=out/seed-$$seed $(RUN_NOTEBOOK) --output seed-$$seed distill.ipynb; done
	head -1 out/seed-0/verdict.csv > tests/tutorial_seeds.csv
	tail -q -n +2 out/seed-[0-4]/verdict.csv >> tests/tutorial_seeds.csv

test: $(VENV)/complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-device: $(VENV)/complete
	DEVICE=$(or $(DEVICE),auto) $(BIN)/python -m pytest -q -s -k device tests/test_devices.py study/tests/test_truncation.py

study: $(VENV)/complete
	$(BIN)/python -m study

study-notebooks: $(VENV)/complete
	$(RUN_NOTEBOOK) study/paper.ipynb
	$(RUN_NOTEBOOK) study/beyond.ipynb

export: $(VENV)/complete
	$(BIN)/python -m study.export out/export

benchmark: $(VENV)/complete
	$(BIN)/python -m pip install --quiet --requirement study/benchmark/requirements.txt
	$(BIN)/python -m study.benchmark.benchmark

release: notebook study-notebooks
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams out/distill.ipynb out/paper.ipynb out/beyond.ipynb
	cp out/distill.ipynb distill.ipynb
	cp out/paper.ipynb out/beyond.ipynb study/
	cp out/evolution.gif figures/
	$(BIN)/python -m study.results

clean:
	rm -rf $(VENV) out

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/complete: $(VENV)/installed pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[study,test]"
	touch $@
