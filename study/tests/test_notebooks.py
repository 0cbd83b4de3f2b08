"""The study's notebooks run from any folder, with MNIST or without."""

import pytest

from tests.conftest import ROOT, run_notebook, stamp_files

NOTEBOOKS = [ROOT / "study" / f"{name}.ipynb" for name in ("paper", "beyond")]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_it_runs_on_mnist_and_changes_no_file(path, tmp_path, mnist_root):
    before = stamp_files()
    assert "MNIST: 500 test images" in run_notebook(path, tmp_path, mnist_root)
    assert stamp_files() == before


@each_notebook
def test_without_mnist_it_says_so_and_shows_the_stored_results(path, tmp_path, monkeypatch):
    """In the folder where Jupyter starts it, which is not the repository's."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    text = run_notebook(path, tmp_path, folder=path.parent)
    assert "Without MNIST" in text
    assert "(n=100)" in text
