"""Tables, figures and cards are computed from the stored results."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import distill_utils as du
from study import __main__ as command
from study import report
from study.experiments import ablation, paper
from study.experiments import sets as best_sets
from study.records import RESULTS, TABLES, Results

DISTILLED = Path(du.__file__).with_name("distilled")
OLD_WORDS = r"unknown|known init\w*|tiles?|tiled|retrain\w*|as distilled|learned labels|in company"
OLD_WORDS = rf"(?i)\b({OLD_WORDS}|shaken|coarse)\b"


def write_results(folder: Path, accuracies: list[tuple]) -> Results:
    folder.mkdir(parents=True)
    table = pd.DataFrame(accuracies, columns=TABLES["accuracies"])
    table.to_csv(folder / "accuracies.csv", index=False)
    return Results(folder)


def test_a_table_leaves_out_columns_that_are_empty_throughout():
    rows = [["ten", "", 81.9], ["hundred", "", ""]]
    table = report.markdown_table(["set", "reported", "here"], rows)
    assert table == "| set | here |\n| --- | --- |\n| ten | 81.9 |\n| hundred |  |"


def test_the_table_is_computed_from_the_stored_accuracies(tmp_path):
    values = {0: (80.0, 82.0), 1: (84.0, 86.0)}
    lines = [
        (f"random-noise-seed{seed}", "unseen initializations", 0, network, value)
        for seed, pair in values.items()
        for network, value in enumerate(pair)
    ]
    results = write_results(tmp_path / "paper", lines)
    table = report.paper_table(results, "random-noise").splitlines()
    (line,) = [line for line in table if "from noise" in line]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:5] == ["79.5 ± 8.1", "83.0 ± 2.6%", "+3.5"]
    assert cells[5] == "2 sets, 2 networks each; means 81.0 to 85.0"
    message = "no 'fixed initialization' of 'fixed-10'; run python -m study paper"
    with pytest.raises(ValueError, match=message):
        report.paper_table(results, "fixed-10")


def test_a_name_that_begins_like_another_is_not_confused_with_it(tmp_path):
    values = {"fixed-10-seed0": 90.0, "fixed-100-seed0": 50}
    lines = [(name, "fixed initialization", 0, 0, value) for name, value in values.items()]
    assert write_results(tmp_path / "paper", lines).values("fixed-10", "fixed") == [[90.0]]


@pytest.mark.parametrize("part", command.PARTS)
def test_the_stored_reports_are_those_of_the_stored_results(part):
    results = Results(RESULTS / part)
    assert set(results.runs.experiment) == set(results.accuracies.experiment)
    missing = set(command.PARTS[part]) ^ set(results.runs.experiment)
    assert all(re.search("^controls-|-seed[0-9]$", name) for name in missing)  # which take hours
    assert set(results.sets.experiment) <= set(results.runs.experiment)
    text = (results.folder / "summary.md").read_text()
    for table in report.tables(part, results):
        assert table in text
    assert not re.search(OLD_WORDS, text)
    for draw in report.FIGURES[part]:
        width, _ = draw(results).get_size_inches()
        picture = plt.imread(results.folder / f"{draw.__name__.removeprefix('draw_')}.png")
        assert picture.shape[1] == pytest.approx(150 * width, abs=1)
        plt.close("all")


def test_every_stored_accuracy_is_there():
    tables = {part: Results(RESULTS / part).accuracies for part in command.PARTS}
    others = {part: ~table.experiment.str.startswith("controls-") for part, table in tables.items()}
    counts = {part: each.sum() for part, each in others.items()}
    assert counts == {"paper": 7466, "ablation": 1500, "best": 2485}


def test_every_stored_set_of_the_paper_loads():
    results = Results(RESULTS / "paper")
    files = {path.name for path in results.folder.glob("*.safetensors")}
    assert set(results.sets.file) == files
    for line in results.sets.drop_duplicates("file").itertuples():
        assert results.load_set(line.experiment, line.row, number=line.set).updates > 0


def test_a_stored_set_trains_networks_as_stored(mnist_root):
    """The first two of the two hundred networks behind a main accuracy, trained and tested again."""
    results = Results(RESULTS / "paper")
    distilled = results.load_set("random-real-seed0", "unseen initializations")
    mnist = du.load_mnist(mnist_root, device="cpu")
    found = du.evaluate(distilled, mnist.test, du.LeNet, networks=2).values
    stored = results.values("random-real-seed0", "unseen initializations")
    assert found.tolist() == pytest.approx(stored[0][:2], abs=0.5)


@pytest.mark.parametrize("name", [*best_sets.RECIPES, *best_sets.DECODED])
def test_a_card_says_what_a_user_wants_to_know(name):
    results = Results(RESULTS / "best")
    text = report.card(name, DISTILLED / f"{name}.safetensors", results)
    assert text == (DISTILLED / f"{name}.md").read_text(), "run python -m study --report"
    first_screen, program, rest = re.split(r"```(?:python\n)?", text)
    assert first_screen.startswith(f"# {name}\n")
    for wanted in ("from scratch", "normalization", "pixel range", "augmentation", "seed 0", "outer loop",
                   "**(intended use)**", f"python -m study best --only {name}"):  # fmt: skip
        assert wanted in first_screen
    title, control = report.strongest_control(results, name)
    assert f"**{results.pooled(name, report.main_row(name))}** (n=" in first_screen
    reached = f"The best control with undistilled images reaches {control} ({title}, n="
    assert reached in first_screen
    assert str(control) in rest
    assert f'du.load("{name}")' in program
    assert "seed 10000" in rest
    if name in best_sets.DECODED:
        assert report.decoded_table(results, name) in rest
    else:
        assert "learned schedule" in first_screen
        assert "k-means centers, true labels" in rest
    assert not re.search(OLD_WORDS, text)
    compile(program, name, "exec")


def test_other_seeds_do_not_change_a_card(tmp_path):
    name, row = "mnist-ipc1-mf2-50updates", "learned schedule"
    lines = [(name, row, 0, 0, 90.0), (f"{name}-seed1", row, 0, 0, 80.0)]
    results = write_results(tmp_path / "best", lines)
    assert results.pooled(name, row).mean == 85
    assert results.without_seeds().pooled(name, row).mean == 90
    assert report.counted(results, name, row) == "85.0 ± 7.1% (n=2×1)"


def test_the_lead_of_a_decoded_set_is_over_the_best_control_of_any_experiment():
    results, name = Results(RESULTS / "best"), "mnist-ipc10-compressed"
    found = report.elsewhere(results, name, "ConvNet-3, instance norm")
    titles = ("random real images", "k-means centers")
    rows = [f"ConvNet-3, instance norm, {title}, plain" for title in titles]
    transferred = [results.pooled("transfer-mnist-ipc10-mf2-scratch", row) for row in rows]
    assert found.mean == max(each.mean for each in transferred)
    table = report.decoded_table(results, name).splitlines()
    (line,) = [line for line in table if "ConvNet-3" in line and "plain" in line]
    distilled = results.pooled(name, "ConvNet-3, instance norm, decoded, soft labels, plain")
    assert f"| {found} | {distilled.mean - found.mean:+.1f} |" in line
    assert report.elsewhere(results, "mnist-ipc50-compressed", "LeNet") == ""


def test_the_headline_has_controls():
    table = report.headline_table(Results(RESULTS / "paper"), Results(RESULTS / "best"))
    assert "| 95.1 ± 0.6% (random real images, soft labels, n=5) | 97.0 ± 0.3% (n=5) |" in table
    control = "79.9 ± 4.6% (k-means centers, n=50)"
    assert f"| 79.5 ± 8.1 (Wang et al.) | {control} | 83.2 ± 1.8% (n=3×200) |" in table
    for line in table.splitlines()[2:]:
        assert line.count(" ± ") >= line.count("n=") == 2, "each has a control"
    text = RESULTS.parents[1].joinpath("README.md").read_text()
    assert table in text, "run python -m study --report"


def test_gains_add_up_from_random_real_images_to_the_distilled_set():
    for part in ("paper", "best"):
        for line in report.gains_table(Results(RESULTS / part)).splitlines()[2:]:
            name, first, *gains, last = (cell.strip() for cell in line.strip("|").split("|"))
            assert float(first) + sum(map(float, gains)) == pytest.approx(float(last), abs=0.3)
            images, constant = "random real images", "true labels, constant step size"
            stored = report.control_accuracies(Results(RESULTS / part), name)
            assert first == f"{stored[f'{images}, {constant}'].mean:.1f}"


def test_the_ablation_pairs_each_technique_with_its_absence():
    pair = ("add-to-best-none", "leave-one-out-adam")
    assert report.with_and_without("adam", "add-to-best") == pair
    assert report.with_and_without("adam", "add-one") == ("add-one-adam", "add-one-none")
    assert report.with_and_without("momentum", "add-to-best") is None
    table = report.ablation_table(Results(RESULTS / "ablation"), "adam")
    one, best = "60.1 ± 8.3% | 62.8 ± 7.5% | +2.7 | 26", "78.3 ± 2.7% | 85.2 ± 1.6% | +6.9 | 27"
    assert f"| inner Adam | {one} | {best} |" in table
    assert set(ablation.LEFT_OUT) <= set(ablation.TECHNIQUES)
    assert not set(paper.EXPERIMENTS) & {*ablation.EXPERIMENTS, *best_sets.EXPERIMENTS}


def test_pictures_are_drawn_and_titled(toy):
    images, _ = du.initialize(toy, "real", steps=2)
    figure = report.draw_images({"first": images, "last": images.requires_grad_()}, columns=3)
    assert [axis.get_title() for axis in figure.axes] == ["first", "last"]
    assert all(len(axis.get_images()) == 1 for axis in figure.axes)
