"""The notebooks run whole, with MNIST or without; the tutorial says what the module does; stored
notebooks come from one clean run; the README's program and links hold."""

import json
import math
import re

import higher
import nbformat
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import distill_utils as du
from tests.conftest import ROOT, Smooth, make_set, run_notebook, stamp_files

NOTEBOOK = ROOT / "distill.ipynb"
STORED = [NOTEBOOK, ROOT / "study" / "paper.ipynb", ROOT / "study" / "beyond.ipynb"]


def test_the_notebook_runs_on_mnist_and_writes_only_into_its_folder(tmp_path, mnist_root):
    before = stamp_files()
    text = run_notebook(NOTEBOOK, tmp_path, mnist_root)
    assert stamp_files() == before
    assert "MNIST" in text
    assert (tmp_path / "evolution.gif").exists()
    paths = [*tmp_path.rglob("*.safetensors")]
    assert all(map(du.load, paths))
    assert paths


def test_without_mnist_the_notebook_uses_digits_and_says_so(tmp_path):
    text = run_notebook(NOTEBOOK, tmp_path)
    before, _, after = text.partition("Continuing on scikit-learn digits")
    assert "MNIST is missing or damaged" in before
    assert after.count("scikit-learn digits") > 5
    assert "MNIST" not in after
    assert "reports" not in after, "the paper's numbers are MNIST's"


def test_the_notebooks_algorithm_1_is_that_of_the_module(toy):
    """The notebook's own cells, and the module without the clipping that it adds."""
    names = {"torch": torch, "nn": nn, "F": F, "higher": higher, "du": du}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if re.match(r"def (inner_loop|algorithm_1)\(", cell.source):
            exec(cell.source, names)
    distilled, theirs, losses = make_set(toy, "noise"), make_set(toy, "noise"), []
    x_tilde, rho, labels = theirs.images, theirs.raw_step_sizes, theirs.labels
    options = {"T": 5, "alpha": 0.03, "n": 16, "seed": 3, "clip": math.inf}
    options["callback"] = lambda t, trained, loss: losses.append(loss.item())
    names["algorithm_1"](x_tilde, labels, rho, toy.train, Smooth, **options)
    options = {"iterations": 5, "batch_size": 16, "clip": math.inf, "seed": 3, "progress": False}
    history = du.distill(distilled, toy, Smooth, **options)
    assert history.loss == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(distilled.images, x_tilde, rtol=0, atol=1e-5)
    torch.testing.assert_close(distilled.raw_step_sizes, rho, rtol=0, atol=1e-5)
    assert (x_tilde - make_set(toy, "noise").images).abs().max() > 0.05


def test_what_the_notebook_claims_held_for_five_seeds():
    """`make tutorial-seeds` runs the notebook from each of five seeds and stores its verdicts."""
    table = pd.read_csv(ROOT / "tests" / "tutorial_seeds.csv").set_index("MNIST")
    fixed = table.loc["one initialization, 10 images, 3 updates"]
    hundred = table.loc["any initialization, 100 images, 30 updates"]
    forty = table.loc["any initialization, 40 small images, 50 updates"]
    assert all(sorted(rows.seed) == [0, 1, 2, 3, 4] for rows in (fixed, hundred, forty))
    assert (fixed.accuracy > fixed["its accuracy"] + 30).all(), "no control comes near"
    for rows in (hundred, forty):
        assert (rows.lead > 2 * rows["standard error"]).all()


@pytest.mark.parametrize("path", STORED[1:], ids=lambda path: path.stem)
def test_a_notebook_of_the_study_runs_with_mnist_and_without(
    path, tmp_path, mnist_root, monkeypatch
):
    before = stamp_files()
    assert "MNIST: 500 test images" in run_notebook(path, tmp_path, mnist_root)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # where Jupyter starts it from its folder
    text = run_notebook(path, tmp_path, folder=path.parent)
    assert "Without MNIST" in text
    assert "(n=" in text
    assert stamp_files() == before


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_outputs_come_from_one_clean_run(path):
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"Warning|(?<![\w.])/(home|root|tmp|work|Users)/", json.dumps(outputs))
    assert path.stat().st_size < 1_000_000, "GitHub shows no larger ones"


def test_the_readmes_program_runs_as_it_stands(mnist_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(mnist_root)
    for program in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(program, {})
    assert float(re.search(r"(\d+\.\d)%", capsys.readouterr().out)[1]) > 90


@pytest.mark.parametrize("name", ["README.md", "distilled/README.md", "study/README.md"])
def test_links_lead_to_files_that_are_there(name):
    path = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    assert not [s for s in links if ":" not in s and not (path.parent / s).exists()]
