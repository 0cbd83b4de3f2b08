"""The notebook runs whole and writes into its own folder; what is stored in it comes from one clean run; the README's
Python runs as it stands."""

import ast
import inspect
import json
import math
import re
from pathlib import Path

import higher
import nbclient
import nbformat
import pytest
import torch

import distill_utils as du
from tests.conftest import FEWER_IMAGES, NO_NETWORK

ROOT = Path(du.__file__).parent
NOTEBOOK = ROOT / "distill.ipynb"


def parameters_cell(book) -> nbformat.NotebookNode:
    (tagged,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    return tagged


def small_parameters(source: str) -> dict:
    """Tiny values for the parameters that say how long something takes."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.endswith(("ITERATIONS", "NETWORKS")):
                found[name] = 2
            elif name.endswith("EPOCHS"):
                found[name] = 1
    return found


def execute(out: Path, *, extra: str = "", **parameters) -> nbformat.NotebookNode:
    """Runs the notebook with other parameters."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    tagged = parameters_cell(book)
    parameters = {"OUT": str(out), "DEVICE": "cpu", **small_parameters(tagged.source), **parameters}
    for name in parameters:
        assert re.search(rf"^{name} = ", tagged.source, re.MULTILINE), f"no parameter is called {name}"
    # In place of the assignments, so that what follows from a parameter follows from the new value.
    for name, value in parameters.items():
        line = re.compile(rf"^{name} = .*$", re.MULTILINE)
        new = f"{name} = Path({value!r})" if "Path(" in line.search(tagged.source).group() else f"{name} = {value!r}"
        tagged.source = line.sub(lambda _, new=new: new, tagged.source)
    tagged.source += f"\n{extra}"
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    return book


def output_of(book) -> str:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)


def tracked_files() -> dict[Path, tuple[int, int]]:
    """Sizes and times of the files that a run must not touch."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name in ("distilled", "figures", "study")]
    files = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()}


def test_the_whole_notebook_runs_on_mnist_and_writes_only_into_its_folder(tmp_path, mnist_root):
    before = tracked_files()
    book = execute(tmp_path / "out", extra=FEWER_IMAGES, DATA_ROOT=mnist_root)
    text = output_of(book)
    assert "MNIST" in text
    assert "Warning" not in text
    assert list((tmp_path / "out").rglob("*.png")), "figures"
    for path in (sets := list((tmp_path / "out").rglob("*.safetensors"))):
        du.DistilledSet.load(path)
    assert sets
    after = tracked_files()
    assert sorted(map(str, after)) == sorted(map(str, before))
    assert [str(path) for path in before if after[path] != before[path]] == []


def test_without_mnist_the_notebook_uses_digits_and_says_so_in_every_table_and_figure(tmp_path):
    run = execute(tmp_path / "out", extra=NO_NETWORK, DATA_ROOT=str(tmp_path / "nothing"))
    text = output_of(run)
    assert "MNIST is missing or damaged" in text
    assert "Continuing on scikit-learn digits" in text
    outputs = [output.get("data", {}) for cell in run.cells for output in cell.get("outputs", [])]
    tables = [data["text/markdown"] for data in outputs if "text/markdown" in data]
    assert len(tables) > 3
    for block in tables:
        assert "digits" in block.splitlines()[0]
        assert "MNIST" not in block
        assert "reported" not in block
    assert not (tmp_path / "nothing").exists()


def test_algorithm_1_as_the_notebook_writes_it_is_that_of_the_module(toy, smooth):
    """Runs the notebook's own cells, and the module without what it adds: clipping and a decay."""
    names = {"torch": torch, "F": torch.nn.functional, "higher": higher, "du": du}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if re.match(r"def (inner_loop|algorithm_1)\(", cell.source):
            exec(cell.source, names)
    theirs = du.DistilledSet(*du.init_from_noise(toy, steps=2), epochs=2, step_size=0.1)
    x_tilde, rho = (tensor.detach().clone().requires_grad_() for tensor in (theirs.images, theirs.raw_step_sizes))
    losses = names["algorithm_1"](x_tilde, theirs.labels, rho, toy.train, smooth, T=5, alpha=0.03, seed=3)
    flat = {"iterations": 10**9, "learning_rate": 0.03, "clip": math.inf, "seed": 3}
    run = du.Distillation(theirs, toy, smooth, **flat)
    for _ in range(5):
        run.apply_gradient(run.compute_gradient())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(run.history.loss), rtol=1e-6, atol=0)
    torch.testing.assert_close(x_tilde, theirs.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(rho, theirs.raw_step_sizes, rtol=0, atol=1e-6)
    assert (x_tilde - du.init_from_noise(toy, steps=2)[0]).abs().max() > 0.05


@pytest.fixture(scope="module")
def stored() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_stored_outputs_come_from_one_run_top_to_bottom(stored):
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output.output_type for cell in stored.cells for output in cell.get("outputs", [])}
    assert "error" not in kinds
    text = json.dumps([cell.get("outputs", []) for cell in stored.cells])
    assert "Warning" not in text
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


def test_the_notebook_is_short_and_light(stored):
    assert len(stored.cells) <= 75
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_the_stored_parameters_are_the_defaults_of_a_full_run(stored):
    source = parameters_cell(stored).source
    assert re.search(r'^DEVICE = "auto"', source, re.MULTILINE)
    assert re.search(r"^OUT = ", source, re.MULTILINE)
    assert "/" not in re.search(r"^OUT = (.*?)(#|$)", source, re.MULTILINE).group(1), "a folder beside the notebook"


def test_source_shown_in_the_notebook_is_the_modules(stored):
    """Every output that shows a function or class of the module shows its present source."""
    shown = re.findall(r"^(?:@[^\n]*\n)*(?:def|class) (\w+)[(:]", output_of(stored), re.MULTILINE)
    for name in shown:
        if hasattr(du, name):
            source = inspect.getsource(getattr(du, name)).strip()
            assert source in output_of(stored), f"{name} has changed since the notebook was run"


def readme_snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_python_runs_as_it_stands(mnist_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(mnist_root)
    names = {}
    for snippet in readme_snippets():
        exec(compile(snippet, "README.md", "exec"), names)
    printed = re.search(r"(\d+\.\d)%", capsys.readouterr().out)
    assert float(printed.group(1)) > 90


def test_the_readme_links_to_files_that_are_there():
    for name in ("README.md", "distilled/README.md", "study/README.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not link.startswith(("http", "mailto")):
                assert ((ROOT / name).parent / link).exists(), f"{name}: {link}"
