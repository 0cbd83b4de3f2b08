"""What the results beyond the paper say: the best sets, their controls, and other architectures."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from runs import atomic_write, markdown_table
from study.architectures import ARCHITECTURES
from study.beyond import AUGMENTED, RECIPES, label_robust_score
from study.ingredients import EXPERIMENTS, INGREDIENTS
from study.report import Line, what_is_behind

BEST = (
    Line(
        "100 images, 30 updates", "best-100-in-30", "as distilled", "79.5 ± 8.1 (Wang et al.), 82.7 ± 2.8 (soft labels)"
    ),
    Line("100 images, 100 updates", "best-100-in-100", "as distilled"),
    Line("100 images, 300 updates on all of them", "best-100-free", "as distilled"),
    Line("100 images, free retraining", "best-100-free", "retrained"),
    Line(
        "the same, on ten augmented copies of each image",
        "augmented",
        "best-100-free",
        "93.9 ± 0.6 (gradient matching, whose code augments too)",
    ),
    Line("10 images, 50 updates", "best-10", "as distilled"),
    Line("10 images, free retraining", "best-10", "retrained"),
    Line("500 images, free retraining", "best-500-free", "retrained"),
    Line("all real images, ordinary training", "whole-set", "ordinary"),
)
CONTROLS = (
    "random real images, true labels", "random real images, learned labels", "k-means centers, true labels",
    "k-means centers, learned labels", "distilled, hard labels",
)  # fmt: skip

KINDS = ("distilled", "random real images")  # what other architectures are trained on


def best(results: Path) -> str:
    """The best sets: accuracies as reported elsewhere and here, and the minutes each took on one thread."""
    rows = []
    for line in BEST:
        seconds = json.loads((results / f"{line.experiment}.json").read_text())["seconds"]
        found = line.sets(results)
        rows.append([line.title, line.reported, line.result(results), what_is_behind(found), f"{seconds / 60:.0f}"])
    return markdown_table(["LeNet, unknown initializations", "as reported (%)", "here", "behind it", "minutes"], rows)


def controls(results: Path) -> str:
    """Free retraining on the best sets and on what they must be held against, and DD-Ranking's scores of them."""
    names = list(RECIPES)
    found = {
        row: [Line("", name, row).result(results) for name in names]
        for row in ("retrained", *(f"control, {title}" for title in CONTROLS))
    }
    rows = [[row.removeprefix("control, "), *values] for row, values in found.items()]
    rows.append(
        ["retrained, ten augmented copies of each image"]
        + [Line("", "augmented", name).result(results) if name in AUGMENTED else "" for name in names]
    )
    real = Line("", "whole-set", "ordinary").result(results).mean
    scores = [
        label_robust_score(distilled.mean, hard_labels.mean, random.mean, real)
        for distilled, hard_labels, random in zip(
            found["retrained"], found["control, distilled, hard labels"],
            found["control, random real images, learned labels"], strict=True,
        )
    ]  # fmt: skip
    for place, title in enumerate(("hard label recovery", "improvement over random", "label-robust score")):
        digits = 2 if title.endswith("score") else 1
        rows.append([f"DD-Ranking: {title}", *(f"{score[place]:.{digits}f}" for score in scores)])
    return markdown_table(["free retraining", *names], rows)


def transfer(results: Path) -> str:
    """Networks that nothing was distilled for, retrained freely on a set and on as many real images."""
    names = [path.stem for path in sorted(results.glob("architectures-*.json"))]
    rows = [
        [
            architecture,
            *(Line("", name, f"{architecture}, {title}").result(results) for name in names for title in KINDS),
        ]
        for architecture in ARCHITECTURES
    ]
    head = [f"{name.removeprefix('architectures-')} images: {title}" for name in names for title in KINDS]
    return markdown_table(["network", *head], rows)


TITLE = """# Beyond the paper

Written by `python -m study beyond`: LeNet on MNIST, test accuracy in percent, mean ± standard deviation over networks
that no image has met before. *As distilled*: with the learned order and step sizes. *Free retraining*: on images and
labels alone, by SGD at 0.01 with momentum 0.9, in shuffled batches of up to 256, 300 epochs, without augmentation.
Minutes are those of one thread, tests included."""


def ingredients(results: Path, *names: str) -> str:
    """What each ingredient adds, or those named, alone and in company, on validation images."""
    rows = []
    for name, (title, _) in INGREDIENTS.items():
        if names and name not in ("nothing", *names):
            continue
        row = [title]
        for company in ("alone", "together"):
            if f"{company}-{name}" in EXPERIMENTS:
                found, first = (
                    Line("", f"{company}-{each}", "validation").result(results) for each in (name, "nothing")
                )
                seconds = Line("", f"{company}-{name}", "seconds").result(results).mean
                row += [str(found), f"{found.mean - first.mean:+.1f}", f"{seconds:.0f}"]
        rows.append(row + [""] * (7 - len(row)))
    company = "with k-means start, learned labels and inner Adam"
    return markdown_table(["ingredient", "alone", "gain", "seconds", company, "gain", "seconds"], rows)


def draw_ingredients(results: Path) -> Figure:
    """The same as bars."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
    for axis, company in zip(axes, ("alone", "together"), strict=True):
        names = [name for name in INGREDIENTS if f"{company}-{name}" in EXPERIMENTS][::-1]
        found = [Line("", f"{company}-{name}", "validation").result(results) for name in names]
        axis.barh(range(len(names)), [each.mean for each in found], xerr=[each.std for each in found], capsize=3)
        axis.axvline(found[-1].mean, color="C3", linestyle=":")
        axis.set_yticks(range(len(names)), [INGREDIENTS[name][0].partition(",")[0] for name in names])
        axis.set(xlabel="validation accuracy (%)", xlim=(40, 95))
    axes[0].set_title("alone: noise, fixed labels, inner SGD")
    axes[1].set_title("in company: k-means, learned labels, Adam")
    figure.suptitle("100 images, 30 updates, 100 outer iterations: mean ± std over networks, one distillation each")
    return figure


def report_beyond(results: Path) -> None:
    """Writes what lies beyond the paper."""
    parts = {
        "The best sets": best(results),
        "Ingredients": ingredients(results), "Controls": controls(results), "Other architectures": transfer(results)
    }  # fmt: skip
    text = "\n\n".join([TITLE, *(f"## {title}\n\n{table}" for title, table in parts.items())])
    with atomic_write(results / "beyond.md") as partial_file:
        partial_file.write_text(f"{text}\n")
    draw_ingredients(results).savefig(results / "ingredients.png", dpi=110)
