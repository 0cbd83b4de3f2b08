"""What the stored results say: the table beside the paper's figures, and two figures of our own."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

import distill_utils as du
from checks import require
from runs import atomic_write, markdown_table
from study.experiments import ATTACKS, INITIALIZATIONS, LEARNED_ON, SWEEPS, sweep_name


@dataclass(frozen=True)
class Line:
    """A line of the summary: a row of one experiment, or of its three seeds, beside the paper's figure."""

    title: str
    experiment: str  # the name, up to "-seed" where there are several seeds
    row: str  # how the row's name begins
    reported: str = ""  # by Wang et al. 2018; for other data in brackets
    why: str = ""  # what is different here
    least: str = ""  # what this project asks of it, in percent
    aim: str = ""  # and what it hopes for

    def sets(self, results: Path) -> list[list[float]]:
        """The accuracies of the networks of each set of images; raises ValueError where there are none."""
        found = []
        for path in sorted([*results.glob(f"{self.experiment}.json"), *results.glob(f"{self.experiment}-seed?.json")]):
            rows = json.loads(path.read_text())["rows"]
            found += [values for name, row in rows.items() if name.startswith(self.row) for values in row["values"]]
        require(len(found) > 0, f"results={results}: no '{self.row}' of '{self.experiment}'; run make study")
        return found

    def result(self, results: Path) -> du.Accuracies:
        """All those accuracies."""
        return pooled(self.sets(results))


OUTER = "outer rate of 0.03 falling to 0, clipped gradients"
CONSTANT = "one constant step size, thirty updates"
LONGER = "as above, trained on for longer"
LINES = (
    Line(
        "known initialization, 10 images, 1 step × 3 epochs",
        "known-10",
        "known",
        "93.8",
        "mean of three initializations, there one",
    ),
    Line(
        "known initialization, 100 images, 10 × 3",
        "known-100",
        "known",
        "96.6",
        "mean of three initializations, there one",
    ),
    Line("unknown initializations, 100 images, 10 × 3, from noise", "unknown-noise", "unknown", "79.5 ± 8.1", OUTER),
    Line("unknown initializations, 100 images, 10 × 3, from real images", "unknown-real", "unknown", "", OUTER),
    Line("baseline: random real images", "baselines", "random", "68.6 ± 9.8", CONSTANT),
    Line(
        "baseline: best of many random draws",
        "baselines",
        "best of",
        "73.0 ± 7.6",
        "the one draw that validates best; " + CONSTANT,
    ),
    Line("baseline: k-means centers", "baselines", "k-means", "76.4 ± 9.5", CONSTANT),
    Line("baseline: class means", "baselines", "class means", "77.1 ± 2.7", "ten images; " + CONSTANT),
    Line("random real images, 100 updates", "longer-baselines", "random", why=LONGER),
    Line("k-means centers, 100 updates", "longer-baselines", "k-means", why=LONGER),
    Line("class means, 100 updates", "longer-baselines", "class means", why=LONGER),
    Line("nearest neighbours, random real images", "nearest-neighbours", "random", "71.5 ± 2.1", "twenty draws"),
    Line("nearest neighbours, k-means centers", "nearest-neighbours", "k-means", "92.2 ± 0.1", "five clusterings"),
    Line("10 images for a known initialization, on unknown ones", "known-10", "on unknown"),
    Line("100 images for a known initialization, on unknown ones", "known-100", "on unknown"),
    Line(
        "digits → MNIST: no adaptation",
        "adapt-digits-to-mnist",
        "no adaptation",
        "(USPS) 67.5 ± 3.9",
        "other digits: scikit-learn's",
    ),
    Line(
        "digits → MNIST: random real images",
        "adapt-digits-to-mnist",
        "random",
        "(USPS) 87.1 ± 2.9",
        "other digits: scikit-learn's",
    ),
    Line(
        "digits → MNIST: distilled, unknown networks",
        "adapt-digits-to-mnist",
        "distilled, u",
        "(USPS) 92.7 ± 1.4",
        "other digits: scikit-learn's",
    ),
    Line(
        "digits → MNIST: distilled, known network",
        "adapt-digits-to-mnist",
        "distilled, k",
        "(USPS) 93.2",
        "other digits: scikit-learn's",
    ),
    Line(
        "digits → MNIST: all real images",
        "adapt-digits-to-mnist",
        "all",
        "(USPS) 98.6 ± 0.5",
        "other digits: scikit-learn's",
    ),
    Line(
        "MNIST → digits: no adaptation",
        "adapt-mnist-to-digits",
        "no adaptation",
        "(USPS) 90.4 ± 3.0",
        "other digits: scikit-learn's",
    ),
    Line(
        "MNIST → digits: random real images",
        "adapt-mnist-to-digits",
        "random",
        "(USPS) 94.9 ± 0.8",
        "other digits: scikit-learn's",
    ),
    Line(
        "MNIST → digits: distilled, unknown networks",
        "adapt-mnist-to-digits",
        "distilled, u",
        "(USPS) 95.4 ± 1.8",
        "other digits: scikit-learn's",
    ),
    Line(
        "MNIST → digits: distilled, known network",
        "adapt-mnist-to-digits",
        "distilled, k",
        "(USPS) 97.9",
        "other digits: scikit-learn's",
    ),
    Line(
        "MNIST → digits: all real images",
        "adapt-mnist-to-digits",
        "all",
        "(USPS) 97.3 ± 0.3",
        "other digits: scikit-learn's",
    ),
    *(
        Line(f"attack, {source} as {target}: {title}", "attack", f"{source} as {target}, {row}")
        for source, target in ATTACKS
        for title, row in {
            "other classes before": "before, others",
            "success, unknown networks": "unknown, taken",
            "other classes, unknown networks": "unknown, others",
            "success, known network": "known, taken",
            "other classes, known network": "known, others",
        }.items()
    ),
)


def pooled(sets: list[list[float]]) -> du.Accuracies:
    """The accuracies of all networks of all sets of images."""
    return du.Accuracies(torch.tensor(list(itertools.chain(*sets))))


def summary(results: Path, *experiments: str) -> str:
    """The table of the paper's experiments, or of those whose names begin so: as reported, here, what is behind it."""
    rows = []
    for line in LINES:
        if line.experiment.startswith(experiments or ""):
            result = line.result(results)
            comparable = line.reported[:1].isdigit()
            difference = f"{result.mean - float(line.reported.split()[0]):+.1f}" if comparable else ""
            behind = what_is_behind(line.sets(results))
            rows.append([line.title, line.reported, str(result), difference, behind, line.why])
    head = ["experiment", "paper, as reported (%)", "here", "difference", "behind it", "why"]
    return markdown_table(head, rows)


def what_is_behind(sets: list[list[float]]) -> str:
    """How many sets of images and networks, and how far the sets are apart."""
    networks, means = len(sets[0]), [statistics.mean(values) for values in sets]
    if len(sets) == 1:
        return f"{networks} network{'s' * (networks > 1)}"
    if networks == 1:
        return f"{len(sets)} sets, one test each"
    return f"{len(sets)} sets, {networks} networks each; means {min(means):.1f} to {max(means):.1f}"


def draw_baselines(results: Path) -> Figure:
    """Distilled images beside images nothing was learned for: mean and std, and the paper's figures."""
    lines = [line for line in LINES if line.experiment.startswith(("unknown-", "baselines"))][::-1]
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for place, line in enumerate(lines):
        result = line.result(results)
        axis.barh(
            place, result.mean, 0.8, xerr=result.std, color="C0" if "unknown" in line.experiment else "0.7", capsize=3
        )
        if line.reported:
            mean, std = map(float, line.reported.split(" ± "))
            axis.errorbar(mean, place + 0.2, xerr=std, fmt="D", color="C3", mfc="white", capsize=3)
    axis.errorbar([], [], fmt="D", color="C3", mfc="white", label="paper, as reported")
    axis.barh([0], [0], color="C0", label="distilled")
    axis.barh([0], [0], color="0.7", label="not distilled")
    axis.set_yticks(range(len(lines)), [line.title.split("10 × 3, ")[-1].removeprefix("baseline: ") for line in lines])
    axis.set(xlabel="test accuracy (%), mean ± std over networks", xlim=(0, 100))
    figure.suptitle("LeNet on MNIST, unknown initializations: thirty updates on 100 images (class means: 10)")
    axis.legend(loc="lower left")
    return figure


def draw_what_matters(results: Path) -> Figure:
    """Test accuracy against the number of steps, epochs and images, and on other initializations."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")

    def curve(axis, title: str, across: Callable[[tuple[int, int, int]], int]) -> None:
        places = [across(point) for point in SWEEPS[title]]
        tested = [Line("", sweep_name(*point), "unknown").result(results) for point in SWEEPS[title]]
        axis.errorbar(
            places, [each.mean for each in tested], yerr=[each.std for each in tested], marker="o", capsize=3,
            label=title,
        )  # fmt: skip
        axis.set(xscale="log", ylabel="test accuracy (%)", ylim=(0, 100))
        axis.set_xticks(places, places)
        axis.minorticks_off()

    curve(axes[0, 0], "three epochs", lambda point: point[0])
    curve(axes[0, 0], "thirty updates", lambda point: point[0])
    axes[0, 0].set(xlabel="steps that 100 images are shared among", title="one step with all, or many with few")
    axes[0, 0].legend(loc="lower right")
    curve(axes[0, 1], "epochs", lambda point: point[2])
    axes[0, 1].set(xlabel="epochs of 10 steps", title="100 images: how long they are trained on")
    curve(axes[1, 0], "images", lambda point: 10 * point[0] * point[1])
    axes[1, 0].set(xlabel="images", title="thirty updates of ten images: how many images")
    for shift, each in zip((-0.2, 0.2), LEARNED_ON, strict=True):
        tested = [Line("", "initializations", f"for {each}, on {title}").result(results) for title in INITIALIZATIONS]
        axes[1, 1].bar(
            [place + shift for place in range(len(tested))], [one.mean for one in tested], 0.4,
            yerr=[one.std for one in tested], capsize=3, label=f"distilled for {each}",
        )  # fmt: skip
    axes[1, 1].set_xticks(range(len(INITIALIZATIONS)), [name.replace(" ", "\n", 1) for name in INITIALIZATIONS])
    axes[1, 1].set(
        xlabel="tested on", ylabel="test accuracy (%)", ylim=(0, 100), title="other distributions of weights"
    )
    axes[1, 1].legend(loc="upper center", ncols=2, fontsize="small")
    figure.suptitle("LeNet on MNIST, unknown initializations: mean ± std over networks, one distillation each")
    return figure


TITLE = """# The paper's MNIST study

Written by `make study`: test accuracy, or an attack's success rate, in percent. ± is the standard deviation over all
networks of all sets of images that are behind a figure."""


def report(results: Path) -> None:
    """Writes the summary and the two figures of a whole study."""
    with atomic_write(results / "summary.md") as partial_file:
        partial_file.write_text(f"{TITLE}\n\n{summary(results)}\n")
    for draw, name in ((draw_baselines, "baselines.png"), (draw_what_matters, "what_matters.png")):
        draw(results).savefig(results / name, dpi=110)
