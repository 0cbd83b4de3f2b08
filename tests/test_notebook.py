"""The notebook runs whole, and what is stored in it, and quoted in the README, comes from one clean run."""

import inspect
import json
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import distill_utils as du

ROOT = Path(__file__).parent.parent
SMALL = {
    "KNOWN_ITERATIONS": 4, "UNKNOWN_ITERATIONS": 3, "OWN_ITERATIONS": 20, "TEST_NETWORKS": 2, "LIVE_NETWORKS": 2,
    "FULL_EPOCHS": 0, "KNOWN_AGAIN_ITERATIONS": 2, "UNKNOWN_AGAIN_ITERATIONS": 2, "RECIPE_ITERATIONS": 2,
}  # fmt: skip


def execute(tmp_path, cells=slice(None), extra="", **parameters) -> nbformat.NotebookNode:
    """Runs the notebook's cells with other parameters, writing nothing outside `tmp_path`."""
    book = nbformat.read(ROOT / "distill.ipynb", as_version=4)
    (tagged,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters = {"FIGURES": str(tmp_path / "figures"), "DISTILLED": str(tmp_path / "distilled"), **parameters}
    for name, value in parameters.items():
        assert re.search(rf"^{name} = ", tagged.source, re.MULTILINE), f"no parameter is called {name}"
        tagged.source += f"\n{name} = {value!r}"
    tagged.source += f"\n{extra}"
    book.cells = book.cells[cells]
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    return book


def output_of(book) -> str:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)


def test_the_whole_notebook_runs_on_mnist(tmp_path, mnist_root):
    book = execute(tmp_path, DATA_ROOT=str(Path(mnist_root).resolve()), DEVICE="cpu", **SMALL)
    text = output_of(book)
    assert "MNIST train" in text
    assert re.search(r"RuntimeError: .*not have been used in the graph", text)
    assert "Warning" not in text
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"claim.png", "unknown_images.png", "results.md"} <= written
    assert {path.name for path in (tmp_path / "distilled").iterdir()} == {"known.safetensors", "unknown.safetensors"}


def test_without_mnist_the_notebook_goes_on_with_digits_and_says_so(tmp_path):
    """Up to the first figure; MNIST's download is made to fail as it does without a network."""
    no_network = "def fail(self): raise RuntimeError('no network')\ntorchvision.datasets.MNIST.download = fail"
    text = output_of(execute(tmp_path, slice(10), no_network, DATA_ROOT=str(tmp_path), **SMALL))
    assert text.count("MNIST is not in root=") == 1
    assert "everything below runs on scikit-learn digits" in text
    assert "scikit-learn digits train" in text


@pytest.fixture(scope="module")
def stored() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "distill.ipynb", as_version=4)


def test_stored_outputs_come_from_one_run_top_to_bottom(stored):
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    text = json.dumps([cell.get("outputs", []) for cell in stored.cells])
    assert "Warning" not in text
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert os.path.getsize(ROOT / "distill.ipynb") < 2_000_000


def test_the_sources_shown_are_the_modules(stored):
    text = output_of(stored)
    for piece in (
        du.LeNet,
        du.unroll,
        du.DistilledSet.schedule,
        du.DistilledSet.decoded,
        du.tiled,
        du.Pool,
        du.outer_loss,
        du.outer_gradient,
        du.one_of,
        du.relabel,
    ):
        assert inspect.getsource(piece) in text, f"{piece.__name__} has changed since the notebook was run"


def test_the_readme_quotes_the_stored_run(stored):
    results = (ROOT / "figures" / "results.md").read_text().strip()
    assert results in (ROOT / "README.md").read_text()
    assert results in output_of(stored)


def test_the_readmes_python_runs_as_it_stands(mnist_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(Path(mnist_root).resolve())
    (tmp_path / "distilled").symlink_to(ROOT / "distilled")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippets
    names = {}
    for snippet in snippets:
        exec(snippet, names)
