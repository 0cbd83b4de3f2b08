"""Tables, cards and the README are computed from the one table of measurements."""

import re
from itertools import product

import pytest
import torch

import distill_utils as du
from study.__main__ import EXPERIMENTS
from study.experiments.experiment import RESULTS, ROOT, WHAT, add_rows
from study.experiments.sets import RECIPES, is_scheduled
from study.results import (
    SHIPPED,
    Results,
    card,
    control_rows,
    count,
    gains,
    headline,
    main_rows,
    strongest,
    summarize,
)

NAMES = list(SHIPPED)


@pytest.fixture
def small(tmp_path) -> Results:
    """Two seeds of an experiment, each with two networks on two kinds of images."""
    for seed in (0, 1):
        rows = [
            {**dict.fromkeys(WHAT, ""), "experiment": "e", "seed": seed, "metric": "accuracy"}
            | {"images": images, "training": "t", "value": value + 10 * seed}
            for images, value in product(("distilled", "k-means"), (80.0, 82.0))
        ]
        add_rows(tmp_path, {"measurements": rows, "runs": [{"experiment": "e", "seed": seed}]})
    return Results(tmp_path)


def test_rows_are_chosen_by_their_columns(small):
    assert small.accuracies(experiment="e", images="k-means").mean == 86
    assert len(small.rows(images=["k-means", "distilled"])) == 8
    with pytest.raises(ValueError, match=r"no rows with .*'images': 'real'.*; run python -m study"):
        small.accuracies(images="real")


def test_a_table_has_mean_deviation_and_n(small):
    rows = small.rows(experiment="e")
    values = torch.tensor([80.0, 82, 90, 92])
    cell = f"{values.mean():.1f} ± {values.std():.1f} (n=2×2)"
    assert summarize(rows, ["training"], "images").loc["t"].tolist() == [cell, cell]
    assert summarize(rows, ["images"]).index.tolist() == ["distilled", "k-means"]
    assert count(rows[(rows.seed == 0) & (rows.images == "k-means")]) == "81.0 ± 1.4 (n=2)"


def test_every_stored_row_belongs_to_an_experiment_and_names_a_set_that_loads():
    results = Results()
    assert set(results.measurements.experiment) <= set(EXPERIMENTS)
    assert not results.measurements.value.isna().any()
    shipped = {path.stem for path in (ROOT / "distilled").glob("*.safetensors")}
    stored = {path.stem for path in (RESULTS / "sets").glob("*.safetensors")}
    named = set(results.measurements.set)
    assert stored <= named
    assert all(du.load(RESULTS / "sets" / f"{name}.safetensors").updates for name in stored)
    distilled = results.rows(images="distilled", labels="distilled", step_sizes="distilled")
    assert set(distilled.set) <= stored | shipped


def test_a_stored_set_trains_networks_as_stored(mnist_root):
    """The first two of the two hundred networks behind a main accuracy, trained and tested again."""
    results, mnist = Results(), du.load_mnist(mnist_root, device="cpu")
    distilled = results.load_set("random-real")
    values = du.evaluate(distilled, mnist.test, du.LeNet, networks=2).values
    stored = results.rows(experiment="random-real", set="random-real").value[:2]
    assert values.tolist() == pytest.approx(stored.tolist(), abs=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_that_of_the_stored_results(name):
    text = card(name, Results())
    assert text == (ROOT / "distilled" / f"{name}.md").read_text(), "run python -m study.results"
    compile(text.split("```")[1].removeprefix("python\n"), name, "exec")


def test_the_readme_has_the_table_of_the_stored_results():
    table = headline(Results()).to_markdown(index=False)
    assert table in (ROOT / "README.md").read_text(), "run python -m study.results"
    assert table.count("(n=") == 2 * (len(table.splitlines()) - 2), "each has a control"


@pytest.mark.parametrize("name", ["fixed-10", "random-noise", *NAMES])
def test_a_control_is_undistilled_and_the_strongest_of_its_training(name):
    results = Results()
    rows, main = control_rows(results, name), main_rows(results, name)
    assert set(rows.training) == set(main.training)
    assert "distilled" not in set(rows.images)
    best = rows.groupby(["images", "labels", "step_sizes"]).value.mean().max()
    assert strongest(rows).value.mean() == pytest.approx(best)
    if name in filter(is_scheduled, RECIPES):
        steps = gains(results, name)
        assert steps[-1] == pytest.approx(main.value.mean())
        assert max(steps[2:4]) <= best + 1e-9


def test_the_documented_example_prints_the_main_result(capsys):
    readme = (ROOT / "study" / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], {})
    assert capsys.readouterr().out == "83.2 ± 1.8%\n"
