"""Tables, cards and the README are computed from the one table of measurements."""

import re
from itertools import product

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import distill_utils as du
from study.__main__ import EXPERIMENTS
from study.experiments.experiment import KEY, RESULTS, ROOT, WHAT, add_rows, read_table
from study.results import (
    SHIPPED,
    Results,
    beside_reported,
    card,
    control_rows,
    count,
    draw_accuracy_per_byte,
    headline,
    lead,
    main_rows,
    replace_table,
    sets_table,
    strongest,
    summarize,
)


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


def test_a_lead_is_over_the_seeds_that_both_have_or_over_networks():
    rows = pd.DataFrame({"seed": [0, 0, 1, 1], "network": "a", "value": [80.0, 82, 90, 92]})
    control = pd.DataFrame({"seed": [0, 1, 2], "network": "a", "value": [78.0, 84, 0]})
    assert lead(rows, control) == pytest.approx((5, 2))  # 3 and 7 points
    kinds = pd.DataFrame({"seed": 0, "network": ["a", "a", "b"], "value": [70.0, 74, 60]})
    assert lead(kinds, kinds.assign(value=[70, 70, 54])) == pytest.approx((4, 2))  # 2 and 6
    assert lead(rows[:2], kinds[:2]) == pytest.approx((9, (2 / 2 + 8 / 2) ** 0.5))
    with pytest.raises(ValueError, match="no seed of the rows"):
        lead(rows, control[2:])


def test_the_figure_has_kilobytes_and_means_in_which_networks_count_alike(tmp_path):
    common = {"images": "real", "labels": "true", "training": "from scratch by Adam"}
    values = {"LeNet": [70, 74], "ViT": [50], "GRU over rows": [60, 60, 60]}
    for seed in (0, 1):
        real = [common | {"network": n, "value": v + seed} for n, vs in values.items() for v in vs]
        real.append(common | {"metric": "bytes", "value": 7990})
        stored = {"network": "LeNet", "images": "all real", "labels": "true", "value": 98}
        stored = [stored, stored | {"metric": "bytes", "value": 246_824}]
        for name, rows in {"mnist-8kB-real": real, "mnist-networks": stored}.items():
            key = {"experiment": name, "seed": seed}
            usual = dict.fromkeys(WHAT, "") | {"metric": "accuracy"} | key
            add_rows(tmp_path, {"measurements": [usual | row for row in rows], "runs": [key]})
    axes = Figure().subplots(1, 2)
    draw_accuracy_per_byte(Results(tmp_path), axes)
    drawn = [[bars[0].get_xydata().ravel().tolist() for bars in axis.containers] for axis in axes]
    assert drawn == [[[7.99, 72.5], [246.824, 98]], [[7.99, 55.5]]]


def test_every_stored_row_belongs_to_an_experiment_a_commit_and_a_set_that_loads():
    results, runs = Results(), read_table(RESULTS, "runs")
    assert set(results.measurements.experiment) <= set(EXPERIMENTS)
    pairs = [set(map(tuple, table[KEY].values)) for table in (results.measurements, runs)]
    assert pairs[0] == pairs[1]
    assert runs.commit.str.fullmatch("[0-9a-f]{7,}").all(), "some code was not committed"
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


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_is_that_of_the_stored_results(name):
    text = card(name, Results())
    assert text == (ROOT / "distilled" / f"{name}.md").read_text(), "run python -m study.results"


@pytest.mark.parametrize(("folder", "make_table"), [("", headline), ("distilled", sets_table)])
def test_the_readmes_have_the_tables_of_the_stored_results(folder, make_table):
    table = make_table(Results()).to_markdown(index=False)
    assert table in (ROOT / folder / "README.md").read_text(), "run python -m study.results"
    assert table.count("(n=") == 2 * (len(table.splitlines()) - 2), "each has a control"


def test_a_table_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before <!-- a -->\n\n<!-- end of a --> after")
    for table in ("an old one", "a new one"):
        replace_table(path, "a", pd.DataFrame({table: [1]}))
    table = pd.DataFrame({"a new one": [1]}).to_markdown(index=False)
    assert path.read_text() == f"before <!-- a -->\n\n{table}\n\n<!-- end of a --> after"


@pytest.mark.parametrize("name", ["fixed-10", "random-noise", *SHIPPED])
def test_a_control_is_undistilled_and_the_strongest_of_its_training(name):
    results = Results()
    rows, main = control_rows(results, name), main_rows(results, name)
    assert set(rows.training) == set(main.training)
    assert "distilled" not in set(rows.images)
    best = rows.groupby(["images", "labels", "step_sizes"]).value.mean().max()
    assert strongest(rows).value.mean() == pytest.approx(best)


def test_the_documented_example_prints_the_main_result(capsys):
    readme = (ROOT / "study" / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], {})
    table = beside_reported(Results(), "random-real").here
    assert table.iloc[0].startswith(capsys.readouterr().out.strip("%\n"))
