"""What the results beyond the paper say: the best sets, their controls, and other architectures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

import distill_utils as du
from runs import atomic_write, markdown_table
from study.architectures import ARCHITECTURES
from study.beyond import AUGMENTED, RECIPES, TRANSFERRED, label_robust_score
from study.ingredients import EXPERIMENTS, INGREDIENTS, WITHOUT
from study.report import Line, what_is_behind
from study.ship import SHIPPED

WANG, CONDENSATION = "79.5 ± 8.1 (Wang et al.), 82.7 ± 2.8 (soft labels)", "93.9 ± 0.6 (gradient matching, augmented)"
BEST = (
    Line("100 images, 30 updates", "best-100-in-30", "as distilled", WANG, least="85", aim="90"),
    Line("100 images of 4 tiles, 30 updates", "tiled-100-in-30", "as distilled", WANG, least="85", aim="90"),
    Line("100 images, 100 updates", "best-100-in-100", "as distilled", least="93", aim="97"),
    Line("100 images of 4 tiles, 100 updates", "tiled-100-in-100", "as distilled", least="93", aim="97"),
    Line("100 images, free retraining", "best-100-free", "retrained", CONDENSATION, least="94", aim="97"),
    Line("the same set, on ten augmented copies of each image", "augmented", "best-100-free, distilled", CONDENSATION),
    Line("100 images of 4 tiles, free retraining", "tiled-100-free", "retrained", CONDENSATION, least="94", aim="97"),
    Line("10 images, 50 updates", "best-10", "as distilled", least="85", aim="93"),
    Line("the same set, free retraining", "best-10", "retrained"),
    Line("10 images of 4 tiles, 50 updates", "tiled-10", "as distilled", least="85", aim="93"),
    Line("the same set, free retraining", "tiled-10", "retrained"),
    Line("500 images, free retraining", "best-500-free", "retrained", least="96", aim="98"),
    Line("500 images of 4 tiles, free retraining", "tiled-500-free", "retrained", least="96", aim="98"),
    Line("all real images, ordinary training", "whole-set", "ordinary"),
)
IN_SHORT = (
    Line("10 images, 3 updates, known initialization: the paper's way", "known-10", "known", "93.8"),
    Line("100 images, 30 updates, unknown initializations: the paper's way", "unknown-noise", "unknown", "79.5 ± 8.1"),
    Line("the same with learned labels and more", "best-100-in-30", "as distilled", "82.7 ± 2.8 (soft labels)"),
    Line("the same, and four tiles in each image", "tiled-100-in-30", "as distilled"),
    Line("100 images of 4 tiles, ordinary training on them", "tiled-100-free", "retrained", CONDENSATION),
    Line("500 images of 4 tiles, ordinary training on them", "tiled-500-free", "retrained"),
    Line("all images, ordinary training", "whole-set", "ordinary"),
)
CONTROLS = (
    "random real images, true labels", "random real images, learned labels", "k-means centers, true labels",
    "k-means centers, learned labels", "distilled, hard labels",
)  # fmt: skip

DD_RANKING = {
    "hard label recovery (less is better)": 1, "improvement over random (more is better)": 1,
    "label-robust score (more is better)": 2,
}  # fmt: skip
SETS = {experiment: name for name, (experiment, _) in SHIPPED.items()}  # what distilled/ calls them
KINDS = ("distilled", "random real images")  # what other architectures are trained on


def best(results: Path) -> str:
    """The best sets: accuracies as reported elsewhere and here, and the minutes each took on one thread."""
    rows = []
    for line in BEST:
        seconds = json.loads((results / f"{line.experiment}.json").read_text())["seconds"]
        behind, minutes = what_is_behind(line.sets(results)), f"{seconds / 60:.0f}"
        made = [line.title, SETS.get(line.experiment, "")]
        rows.append([*made, line.reported, line.least, line.aim, line.result(results), behind, minutes])
    head = ["LeNet, unknown initializations", "set", "as reported (%)", "at least", "aim", "here", "tested on"]
    return markdown_table([*head, "minutes"], rows)


def in_short(results: Path) -> str:
    """The main figures of the whole study, as reported elsewhere and here."""
    rows = [[line.title, line.reported, line.result(results)] for line in IN_SHORT]
    return markdown_table(["LeNet on MNIST's test images", "as reported (%)", "here"], rows)


def recipes() -> str:
    """How each of the best sets is made."""
    head = [
        "experiment", "set", "images", "steps × epochs", "inner optimizer", "differentiated through",
        "outer iterations", "networks per iteration", "real batch", "outer rate",
    ]  # fmt: skip
    rows = []
    for name, recipe in RECIPES.items():
        tiles, shown = recipe.get("tiles", 1) ** 2, 10 * recipe["steps"] * recipe["per_class"]
        optimizer = recipe["inner"].get("optimizer", f"SGD, momentum {recipe['inner'].get('momentum')}")
        through = f"{recipe['window']} updates, pool of {recipe['pool']}" if "window" in recipe else "all updates"
        row = [name, SETS[name], f"{shown // tiles}, as {shown} tiles" if tiles > 1 else shown]
        row += [f"{recipe['steps']} × {recipe['epochs']}", optimizer, through, recipe["iterations"]]
        row += [recipe.get("networks", 1), recipe["batch_size"], recipe.get("learning_rate", 0.03)]
        rows.append(row)
    return markdown_table(head, rows)


def controls(results: Path) -> str:
    """Free retraining on the best sets and on what they must be held against, and DD-Ranking's scores of them."""
    names = list(RECIPES)
    found = {
        row: [Line("", name, row).result(results) for name in names]
        for row in ("retrained", *(f"control, {title}" for title in CONTROLS))
    }
    rows = [[row.removeprefix("control, "), *values] for row, values in found.items()]
    for kind in ("distilled", "random real images", "k-means centers"):
        found_augmented = [
            Line("", "augmented", f"{name}, {kind}").result(results) if name in AUGMENTED else "" for name in names
        ]
        rows.append([f"ten augmented copies of each image: {kind}", *found_augmented])
    real = Line("", "whole-set", "ordinary").result(results).mean
    scores = [
        label_robust_score(distilled.mean, hard_labels.mean, random.mean, real)
        for distilled, hard_labels, random in zip(
            found["retrained"], found["control, distilled, hard labels"],
            found["control, random real images, learned labels"], strict=True,
        )
    ]  # fmt: skip
    for place, (title, digits) in enumerate(DD_RANKING.items()):
        rows.append([f"DD-Ranking: {title}", *(f"{score[place]:.{digits}f}" for score in scores)])
    shown = [10 * recipe["steps"] * recipe["per_class"] for recipe in RECIPES.values()]
    rows.append(["updates in 300 epochs", *(300 * math.ceil(images / 256) for images in shown)])
    return markdown_table(["free retraining", *(SETS[name] for name in names)], rows)


def transfer(results: Path) -> str:
    """Networks that nothing was distilled for, retrained freely on a set and on as many real images; LeNet first."""
    lenet = [
        Line("", name, row).result(results)
        for name in TRANSFERRED.values()
        for row in ("retrained", "control, random real images, true labels")
    ]
    rows = [["LeNet, which they are made for", *lenet]]
    for architecture in ARCHITECTURES:
        found = [Line("", name, f"{architecture}, {title}").result(results) for name in TRANSFERRED for title in KINDS]
        rows.append([architecture, *found])
    return markdown_table(
        ["network", *(f"{SETS[name]}: {title}" for name in TRANSFERRED.values() for title in KINDS)], rows
    )


TITLE = """# Beyond the paper

Written by `python -m study beyond`: LeNet on MNIST, test accuracy in percent, mean ± standard deviation over networks
that no image has met before. *As distilled*: with the learned order and step sizes. *Free retraining*: on images and
labels alone, by SGD at 0.01 with momentum 0.9, in shuffled batches of up to 256, 300 epochs, without augmentation.
Minutes are those of one thread, tests included."""


def with_and_without(name: str, company: str) -> tuple[str, str] | None:
    """The experiments with an ingredient and without it, "alone" or "together"; None where there are none.

    What belongs to the company is left out of it; anything else is added to it.
    """
    if company == "together" and name in WITHOUT:
        return "together-nothing", f"without-{name}"
    pair = f"{company}-{name}", f"{company}-nothing"
    return pair if pair[0] in EXPERIMENTS else None


def ingredients(results: Path, *names: str) -> str:
    """What each ingredient adds, or those named, alone and in company, on validation images."""
    rows = []
    for name, (title, _) in INGREDIENTS.items():
        if names and name not in ("nothing", *names):
            continue
        row = [title]
        for company in ("alone", "together"):
            if pair := with_and_without(name, company):
                found, other = (Line("", each, "validation").result(results) for each in pair)
                seconds = Line("", pair[0], "seconds").result(results).mean
                shown = f"{other} without" if company == "together" and name in WITHOUT else str(found)
                row += [shown, f"{found.mean - other.mean:+.1f}", f"{seconds:.0f}"]
        rows.append(row + [""] * (7 - len(row)))
    return markdown_table(["ingredient", "alone", "gain", "seconds", "in company", "gain", "seconds"], rows)


def draw_ingredients(results: Path) -> Figure:
    """The gains as bars, with the standard error over networks, which are the same with and without."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True, sharey=True)
    names = [name for name in INGREDIENTS if name != "nothing"][::-1]
    for axis, company in zip(axes, ("alone", "together"), strict=True):
        for place, name in enumerate(names):
            if pair := with_and_without(name, company):
                found, other = (Line("", each, "validation").result(results).values for each in pair)
                gains = found - other
                error = du.Accuracies(gains).std / len(gains) ** 0.5
                axis.barh(place, float(gains.mean()), xerr=error, capsize=3, color="C0")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="gain in validation accuracy (points)")
    axes[0].set_yticks(range(len(names)), [INGREDIENTS[name][0].partition(",")[0] for name in names])
    axes[0].set_title("alone: noise, fixed labels, inner SGD")
    axes[1].set_title("in company: k-means, learned labels, Adam")
    return figure


def report_beyond(results: Path) -> None:
    """Writes what lies beyond the paper."""
    parts = {
        "The best sets": best(results), "How they are made": recipes(),
        "Ingredients": ingredients(results), "Controls": controls(results), "Other architectures": transfer(results)
    }  # fmt: skip
    text = "\n\n".join([TITLE, *(f"## {title}\n\n{table}" for title, table in parts.items())])
    with atomic_write(results / "beyond.md") as partial_file:
        partial_file.write_text(f"{text}\n")
    draw_ingredients(results).savefig(results / "ingredients.png", dpi=110)
