"""Tables, figures and cards: every accuracy in them is computed from the tables of results."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torchvision
from matplotlib.figure import Figure
from torch import Tensor

import distill_utils as du
from study import runs
from study.experiments.ablation import EXPERIMENTS as ABLATION
from study.experiments.ablation import LEFT_OUT, TECHNIQUES
from study.experiments.paper import DISTILLED_FOR, INITIALIZATIONS, SWEEPS, sweep_name
from study.experiments.protocols import UNDISTILLED, label_robust_score
from study.experiments.sets import (
    AUGMENTED,
    BEFORE,
    CONTROLS,
    DECODED,
    DECODED_ROWS,
    DISTILLED,
    GENERAL,
    RECIPES,
    RIVAL_NETWORKS,
    RIVALS,
    SCHEDULED,
    TEACHERS,
    TRANSFERRED,
    protocol,
)  # fmt: skip
from study.methods.architectures import TESTED_ON
from study.methods.decoders import stored_floats
from study.records import RESULTS, Results, Study, read_metadata


def draw_images(panels: dict[str, Tensor], *, columns: int = 10) -> Figure:
    """Titled grids of images [..., c, h, w], normalized, side by side; -2 is drawn black, 4 white."""
    options = {"nrow": columns, "normalize": True, "value_range": (-2, 4), "pad_value": 0.5}
    grids = [
        torchvision.utils.make_grid(images.detach().cpu().flatten(0, -4), **options)
        for images in panels.values()
    ]
    # inches, for a width of 4.5
    height = 0.6 + max(4.5 * grid.shape[1] / grid.shape[2] for grid in grids)
    figure, axes = plt.subplots(
        1, len(grids), figsize=(4.5 * len(grids), height), squeeze=False, layout="constrained"
    )
    for axis, title, grid in zip(axes.flat, panels, grids, strict=True):
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize="medium")
        axis.axis("off")
    return figure


def markdown_table(head: list[str], rows: list[list]) -> str:
    """Column names and rows as a table in Markdown, without the columns that are empty throughout."""
    filled = [any(str(row[place]) for row in rows) for place in range(len(head))]
    lines = [list(itertools.compress(line, filled)) for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ----------------------------------------------------------------------------------------------------------- the paper
def reported(part: str) -> list[dict[str, str]]:
    """Published accuracies; the paper's, each with the experiment and the row here that stand beside it."""
    return pd.read_csv(RESULTS / part / "reported.csv", keep_default_na=False, dtype=str).to_dict(
        "records"
    )


def paper_table(results: Results, *experiments: str) -> str:
    """The paper's accuracies beside those here, of all experiments or of those whose names begin so."""
    rows = []
    for line in reported("paper"):
        if line["experiment"].startswith(experiments or ""):
            sets, found = (
                find(line["experiment"], line["row"]) for find in (results.values, results.pooled)
            )
            comparable = line["reported"][:1].isdigit()  # not of other data
            difference = (
                f"{found.mean - float(line['reported'].split()[0]):+.1f}" if comparable else ""
            )
            rows.append(
                [
                    line["title"],
                    line["reported"],
                    found,
                    difference,
                    describe_sets(sets),
                    line["note"],
                ]
            )
    head = [
        "experiment",
        "paper, as reported (%)",
        "here",
        "difference",
        "measured on",
        "what is different here",
    ]
    return markdown_table(head, rows)


def describe_sets(sets: list[list[float]]) -> str:
    """How many sets and networks there are, and how far apart the sets are."""
    networks, means = len(sets[0]), [statistics.mean(values) for values in sets]
    if len(sets) == 1:
        return f"{networks} network{'s' * (networks > 1)}"
    if networks == 1:
        return f"{len(sets)} sets, one test each"
    return f"{len(sets)} sets, {networks} networks each; means {min(means):.1f} to {max(means):.1f}"


def draw_baselines(results: Results) -> Figure:
    """Distilled images and undistilled baselines, mean ± std, beside the paper's accuracies."""
    lines = [
        line
        for line in reported("paper")
        if line["experiment"].startswith(("random-", "baselines"))
    ][::-1]
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for place, line in enumerate(lines):
        found, distilled = (
            results.pooled(line["experiment"], line["row"]),
            "random-" in line["experiment"],
        )
        axis.barh(place, found.mean, xerr=found.std, color="C0" if distilled else "0.7", capsize=3)
        if line["reported"]:
            mean, std = map(float, line["reported"].split(" ± "))
            axis.errorbar(mean, place + 0.2, xerr=std, fmt="D", color="C3", mfc="white", capsize=3)
    axis.errorbar([], [], fmt="D", color="C3", mfc="white", label="paper, as reported")
    for color, label in {"C0": "distilled", "0.7": "undistilled baseline"}.items():
        axis.barh([0], [0], color=color, label=label)
    titles = [line["title"].split("100 images, ")[-1].removeprefix("baseline: ") for line in lines]
    axis.set_yticks(range(len(lines)), titles)
    axis.set(xlabel="test accuracy (%), mean ± std over networks", xlim=(0, 100))
    figure.suptitle(
        "LeNet on MNIST, unseen initializations: up to fifty updates on 100 images (class means: 10)"
    )
    axis.legend(loc="lower left")
    return figure


def draw_what_matters(results: Results) -> Figure:
    """Test accuracy against the number of steps, epochs and images, and for other initializations."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharey=True)
    titles = [
        "one step with all images, or many with few",
        "length of training",
        "number of images",
    ]
    labels = [
        "steps that share 100 images",
        "epochs of 10 steps with 10 images",
        "images, in thirty updates of ten",
    ]
    curves = [
        (axes[0, 0], "three epochs", lambda steps, per_class, epochs: steps),
        (axes[0, 0], "thirty updates", lambda steps, per_class, epochs: steps),
        (axes[0, 1], "epochs", lambda steps, per_class, epochs: epochs),
        (axes[1, 0], "images", lambda steps, per_class, epochs: 10 * steps * per_class),
    ]
    for axis, name, across in curves:
        found = [
            results.pooled(sweep_name(*point), "unseen initializations") for point in SWEEPS[name]
        ]
        draw_points(
            axis.errorbar, [across(*point) for point in SWEEPS[name]], found, marker="o", label=name
        )
        axis.set(xscale="log")
        axis.set_xticks(
            [across(*point) for point in SWEEPS[name]], [across(*point) for point in SWEEPS[name]]
        )
        axis.minorticks_off()
    for axis, title, label in zip(axes.flat, titles, labels, strict=False):
        axis.set(title=title, xlabel=label)
    for shift, source in zip((-0.2, 0.2), DISTILLED_FOR, strict=True):
        found = [
            results.pooled("initializations", f"for {source}, on {title}")
            for title in INITIALIZATIONS
        ]
        places = [place + shift for place in range(len(found))]
        draw_points(axes[1, 1].bar, places, found, width=0.4, label=f"distilled for {source}")
    axes[1, 1].set_xticks(
        range(len(INITIALIZATIONS)), [name.replace(" ", "\n", 1) for name in INITIALIZATIONS]
    )
    axes[1, 1].set(
        xlabel="tested on", title="other distributions of initial weights", ylim=(0, 100)
    )
    axes[0, 0].legend(loc="lower right")
    axes[1, 1].legend(loc="upper center", ncols=2, fontsize="small")
    figure.supylabel("test accuracy (%)")
    figure.suptitle(
        "LeNet on MNIST, unseen initializations: mean ± std over networks, one distillation each"
    )
    return figure


def draw_points(draw: Callable, places: list[float], found: list[du.Accuracies], **options) -> None:
    """Means and standard deviations by a method of an axis."""
    draw(
        places,
        [each.mean for each in found],
        yerr=[each.std for each in found],
        capsize=3,
        **options,
    )


CONTROLLED = {  # experiments with controls of their schedules, and the rows of their own accuracies
    "fixed-10": "fixed initialization", "random-noise": "unseen initializations",
    **dict.fromkeys(SCHEDULED, "learned schedule"),
}  # fmt: skip


def main_row(name: str) -> str:
    """The row of the accuracy that an experiment is made for."""
    if name in CONTROLLED:
        return CONTROLLED[name]
    return (
        f"LeNet, {DECODED_ROWS[0]}, plain"
        if name in DECODED and name not in DISTILLED
        else protocol(name)
    )


def control_accuracies(results: Results, name: str) -> dict[str, du.Accuracies]:
    """What undistilled images reach under the protocol that a set is made for, by images, labels and schedule."""
    if name in DECODED and name not in DISTILLED:
        return {title: results.pooled(name, f"LeNet, {title}, plain") for title in DECODED_ROWS[2:]}
    scratch = name.endswith("-scratch")
    experiment, kind = (name, "control: ") if scratch else (f"controls-{name}", "")
    rows = (
        results.find(experiment)
        .row.str.replace("(?<=constant step size).*", "", regex=True)
        .unique()
    )
    rows = [
        row.removeprefix(kind)
        for row in rows
        if row.startswith(tuple(kind + images for images in (*UNDISTILLED, BEFORE)))
    ]
    return {row: results.pooled(experiment, kind + row) for row in rows}


def strongest_control(results: Results, name: str) -> tuple[str, du.Accuracies]:
    """Of all controls of a set, the one with the highest mean; an empty name and text where none was measured."""
    return max(
        control_accuracies(results, name).items(), key=lambda item: item[1].mean, default=("", "")
    )


def schedules_table(results: Results) -> str:
    """Learned schedules, and undistilled images under as many updates of the same inner optimizer."""
    rows, columns = {}, {}
    for experiment in CONTROLLED:
        for title, found in control_accuracies(results, experiment).items():
            images, labels, schedule = title.split(", ")
            learned = schedule.startswith("step sizes")
            cells = (
                {schedule: found, "best labels": labels}
                if learned
                else {f"{schedule}, {labels}": found}
            )
            rows.setdefault((experiment, images), {}).update(cells)
            columns |= dict.fromkeys(cells)
    constant = [column for column in columns if column.startswith("constant")]
    columns = [*constant, *(column for column in columns if column not in constant)]
    lines = []
    for (experiment, images), cells in rows.items():
        distilled = results.pooled(experiment, CONTROLLED[experiment])
        lines.append(
            [experiment, distilled, images, *(cells.get(column, "") for column in columns)]
        )
    return markdown_table(["updates as in", "distilled", "undistilled images", *columns], lines)


def gains_table(results: Results) -> str:
    """Where accuracy comes from: one ingredient after another, from random real images with true labels and a constant
    step size to the distilled set."""
    rows = []
    for experiment, row in CONTROLLED.items():
        found = {
            title: each.mean for title, each in control_accuracies(results, experiment).items()
        }
        if not found:
            continue
        kmeans = {title: mean for title, mean in found.items() if title.startswith("k-means")}
        constant = "true labels, constant step size"
        ladder = [
            found[f"random real images, {constant}"], found[f"k-means centers, {constant}"],
            max(mean for title, mean in kmeans.items() if "constant" in title), max(kmeans.values()),
            results.pooled(experiment, row).mean,
        ]  # fmt: skip
        gains = [f"{after - before:+.1f}" for before, after in itertools.pairwise(ladder)]
        rows.append([experiment, f"{ladder[0]:.1f}", *gains, f"{ladder[-1]:.1f}"])
    head = [
        "updates as in",
        "random real images",
        "k-means centers",
        "their labels",
        "their step sizes",
    ]
    return markdown_table([*head, "distillation", "distilled set"], rows)


# -------------------------------------------------------------------------------------------------------- the ablation
def with_and_without(name: str, kind: str) -> tuple[str, str] | None:
    """The experiments with a technique and without it, in the paper's or the best method; None if there are none."""
    if kind == "add-to-best" and name in LEFT_OUT:
        return "add-to-best-none", f"leave-one-out-{name}"
    pair = f"{kind}-{name}", f"{kind}-none"
    return pair if pair[0] in ABLATION else None


def ablation_table(results: Results, *names: str) -> str:
    """What each technique adds, or those named, to the paper's method and to the best one, on validation images."""
    rows = []
    for name in names or TECHNIQUES:
        row = [TECHNIQUES[name][0]]
        for pair in (with_and_without(name, kind) for kind in ("add-one", "add-to-best")):
            if pair is None:
                row += ["", "", "", ""]
                continue
            found, without = (results.pooled(each, "validation") for each in pair)
            row += [without, found, f"{found.mean - without.mean:+.1f}"]
            row.append(f"{results.run(pair[0]).distillation_seconds:.0f}")
        rows.append(row)
    columns = ["without", "with", "gain", "seconds"]
    head = [
        "technique",
        *(
            f"{method}: {column}"
            for method in ("paper's method", "best method")
            for column in columns
        ),
    ]
    return markdown_table(head, rows)


def draw_ablation(results: Results) -> Figure:
    """The gains as bars, with their standard errors over networks, which are the same with and without."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4.4), layout="constrained", sharex=True, sharey=True
    )
    names = [name for name in TECHNIQUES if name != "none"][::-1]
    for axis, kind in zip(axes, ("add-one", "add-to-best"), strict=True):
        for place, name in enumerate(names):
            if pair := with_and_without(name, kind):
                found, without = (results.pooled(each, "validation").values for each in pair)
                gains = du.Accuracies(found - without)
                axis.barh(
                    place,
                    gains.mean,
                    xerr=gains.std / len(gains.values) ** 0.5,
                    capsize=3,
                    color="C0",
                )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="gain in validation accuracy (points)")
    axes[0].set_yticks(range(len(names)), [TECHNIQUES[name][0].partition(",")[0] for name in names])
    axes[0].set_title("paper's method (noise, fixed labels, SGD) with it", fontsize="medium")
    axes[1].set_title("best method (k-means, soft labels, Adam) with it", fontsize="medium")
    return figure


# -------------------------------------------------------------------------------------------------------- the best sets
KINDS = ("distilled", *UNDISTILLED)  # what other architectures train on


def counted(results: Results, experiment: str, row: str) -> str:
    """An accuracy and the networks behind it: n=100, or n=3×100 where three sets were distilled."""
    sets = results.values(experiment, row)
    count = f"{len(sets)}×{len(sets[0])}" if len(sets) > 1 else f"{len(sets[0])}"
    return f"{results.pooled(experiment, row)} (n={count})"


def count_images(name: str) -> tuple[int, int]:
    """The images of a set: stored, and as networks see them."""
    recipe = RECIPES[name]
    seen = 10 * recipe["steps"] * recipe["per_class"]
    return seen // recipe.get("factor", 1) ** 2, seen


def best_table(results: Results) -> str:
    """The accuracies of the best sets by both protocols, and the minutes that each experiment took."""
    rows = []
    for name, recipe in RECIPES.items():
        shown = {row: counted(results, name, row) for row in ("learned schedule", "from scratch")}
        shown[protocol(name)] = f"**{shown[protocol(name)]}**"
        minutes = f"{results.run(name).seconds / 60:.0f}"
        sets = describe_sets(results.values(name, protocol(name)))
        rows.append(
            [
                name,
                *count_images(name),
                recipe["steps"] * recipe["epochs"],
                *shown.values(),
                sets,
                minutes,
            ]
        )
    head = ["set", "images stored", "as seen", "updates", "learned schedule", "from scratch"]
    return markdown_table([*head, "what it is made for, measured on", "minutes"], rows)


def recipe_table() -> str:
    """How each of the best sets is made."""
    rows = []
    for name, recipe in RECIPES.items():
        optimizer = recipe["inner"].get(
            "optimizer", f"SGD, momentum {recipe['inner'].get('momentum')}"
        )
        pool = (
            f"{recipe['window']} updates, network pool of {recipe['pool']}"
            if "pool" in recipe
            else "all updates"
        )
        outer = [recipe["iterations"], recipe.get("networks", 1), recipe["batch_size"]]
        row = [name, f"{recipe['steps']} × {recipe['epochs']}", optimizer, pool, *outer]
        rows.append([*row, recipe.get("learning_rate", 0.03)])
    head = [
        "set",
        "steps × epochs",
        "inner optimizer",
        "differentiated through",
        "outer iterations",
    ]
    return markdown_table([*head, "networks per iteration", "real batch", "learning rate"], rows)


def controls_table(results: Results) -> str:
    """Training from scratch on the best sets and on their controls, with DD-Ranking's scores (Li et al. 2025)."""
    rows = []
    for name in RECIPES:
        real = results.pooled("whole-set", name.partition("-")[0]).mean
        distilled = results.pooled(name, "from scratch")
        controls = {title: results.pooled(name, f"control: {title}") for title in CONTROLS}
        hard, random = (
            controls[f"{title} labels"].mean
            for title in ("distilled images, hard", "random real images, soft")
        )
        recovery, improvement, score = label_robust_score(distilled.mean, hard, random, real)
        rows.append(
            [
                name,
                distilled,
                *controls.values(),
                f"{recovery:.1f}",
                f"{improvement:.1f}",
                f"{score:.2f}",
            ]
        )
    scores = [
        "hard label recovery (less is better)",
        "improvement over random",
        "label-robust score",
    ]
    return markdown_table(["set", "distilled", *CONTROLS, *scores], rows)


def augmented_table(results: Results) -> str:
    """The same with augmentation."""
    found = [counted(results, "augmented", f"{AUGMENTED}, {title}") for title in KINDS]
    return markdown_table(["augmented in every update", *KINDS], [[AUGMENTED, *found]])


def transfer_table(results: Results, name: str = TRANSFERRED[0]) -> str:
    """Other architectures trained from scratch on a set and on its controls, and the lead over the better control.

    Empty where none was measured.
    """
    experiment, rows = f"transfer-{name}", []
    stored = set(results.find(experiment).row)
    for architecture, kind in itertools.product(TESTED_ON, ("plain", "real statistics")):
        if f"{architecture}, {KINDS[0]}, {kind}" in stored:
            found = [
                results.pooled(experiment, f"{architecture}, {title}, {kind}") for title in KINDS
            ]
            lead = found[0].mean - max(each.mean for each in found[1:])
            rows.append([architecture, kind, *found, f"{lead:+.1f}"])
    return markdown_table(["network", "training", *KINDS, "lead"], rows) if rows else ""


def decoded_table(results: Results, *names: str) -> str:
    """Architectures trained from scratch on decoded sets and on random real images as multi-formation, and the lead
    over the best control, of other experiments too; the labels of both come from one teacher, or are true."""
    rows = []
    for name, architecture, way in itertools.product(
        names or DECODED, GENERAL, ("plain", "augmented")
    ):
        row, *others = (f"{architecture}, {title}, {way}" for title in DECODED_ROWS)
        stored = set(results.find(name).row)
        if row in stored:
            found = [
                results.pooled(name, each) if each in stored else "" for each in (row, *others)
            ]
            found.append(elsewhere(results, name, architecture))
            # what a set was before distillation
            controls = found[1:] if name in DISTILLED else found[2:]
            lead = found[0].mean - max(each.mean for each in controls if each)
            sets = results.values(name, row)
            networks = f"{len(sets)}×{len(sets[0])}" if len(sets) > 1 else len(sets[0])
            rows.append([name, architecture, way, *found, f"{lead:+.1f}", networks])
    return markdown_table(
        ["set", "network", "training", *DECODED_ROWS, ELSEWHERE, "lead", "networks"], rows
    )


ELSEWHERE = "best control of other experiments, plain"


def elsewhere(results: Results, name: str, architecture: str) -> du.Accuracies | str:
    """The best control of the same storage, from scratch and not augmented, that other experiments have; or nothing."""
    transfer, own = f"transfer-{name.replace('compressed', 'mf2-scratch')}", f"controls-{name}"
    wanted = {(transfer, f"{architecture}, {title}, plain") for title in UNDISTILLED}
    wanted.add((own, f"{architecture}, {BEFORE}, soft labels, plain"))
    there = [results.pooled(*pair) for pair in wanted if pair[1] in set(results.find(pair[0]).row)]
    return max(there, key=lambda each: each.mean, default="")


def rivals_table(results: Results) -> str:
    """Whole images distilled by three methods, with one network and tested on two."""
    stored, rows = set(results.runs.experiment), []
    for name, options in RIVALS.items():
        if name not in stored:
            continue
        seconds = f"{results.run(name).distillation_seconds:.0f}"
        found = [counted(results, name, title) for title in RIVAL_NETWORKS]
        rows.append([options["per_class"], options["network"], options["method"], *found, seconds])
    tested = [f"tested on {title}" for title in RIVAL_NETWORKS]
    return markdown_table(["images per class", "made with", "method", *tested, "seconds"], rows)


def reported_table(results: Results) -> str:
    """What others report for 1, 10 and 50 images per class, with network and protocol, and the sets here that are
    trained from scratch."""
    rows = [list(line.values()) for line in reported("best")]
    counts = ("1", "10", "50")
    for form, protocol_here in (("", "whole images"), ("-mf2", "multi-formation")):
        names = [f"mnist-ipc{count}{form}-scratch" for count in counts]
        found = [
            counted(results, name, "from scratch") if name in RECIPES else "" for name in names
        ]
        rows.append(
            ["MNIST", "here", "LeNet", *found, f"from scratch; {protocol_here}", "measured here"]
        )
    names = ("mnist-ipc1-decoded-50updates", "mnist-ipc10-compressed", "mnist-ipc50-compressed")
    found = [counted(results, name, f"LeNet, {DECODED_ROWS[0]}, plain") for name in names]
    rows.append(
        ["MNIST", "here", "LeNet", *found, "from scratch by Adam; compressed", "measured here"]
    )
    images = [f"{count} image{'s' * (count != '1')} per class" for count in counts]
    return markdown_table(["dataset", "method", "network", *images, "protocol", "source"], rows)


def headline_table(paper: Results, best: Results) -> str:
    """The main accuracies beside published ones and the strongest undistilled images that are used in the same way."""

    def beside(results: Results, name: str) -> list:
        title, accuracies = strongest_control(results, name)
        title = title if title in DECODED_ROWS else title.partition(",")[0]
        control = f"{accuracies} ({title}, n={len(accuracies.values)})" if title else ""
        return [control, counted(results, name, main_row(name))]

    rows = [
        [
            "10, fixed initialization",
            "3 updates of SGD",
            "93.8 (Wang et al.)",
            *beside(paper, "fixed-10"),
        ],
        ["100", "30 updates of SGD", "79.5 ± 8.1 (Wang et al.)", *beside(paper, "random-noise")],
        [
            "100",
            "30 updates of Adam",
            "82.7 ± 2.8† (Sucholutsky and Schonlau)",
            *beside(best, "mnist-ipc10-30updates"),
        ],
        [
            "100, multi-formation",
            "100 updates of Adam",
            "",
            *beside(best, "mnist-ipc10-mf2-100updates"),
        ],
        [
            "storage of 10, decoded",
            "50 updates of Adam",
            IDC.format("94.2"),
            *beside(best, "mnist-ipc1-decoded-50updates"),
        ],
        [
            "100",
            "from scratch",
            "93.9 ± 0.6† (Zhao et al., augmented)",
            *beside(best, "mnist-ipc10-scratch"),
        ],
        [
            "storage of 100, compressed",
            "from scratch, Adam",
            IDC.format("98.4"),
            *beside(best, "mnist-ipc10-compressed"),
        ],
        [
            "storage of 500, compressed",
            "from scratch, Adam",
            IDC.format("99.1"),
            *beside(best, "mnist-ipc50-compressed"),
        ],
        [
            "storage of 100, compressed, Fashion-MNIST",
            "from scratch, Adam",
            IDC.format("86.0"),
            *beside(best, "fashion-ipc10-compressed"),
        ],
    ]
    return markdown_table(
        ["stored images", "training", "reported (%)", "best control", "this project"], rows
    )


def write_readme(path: Path, paper: Results, best: Results) -> None:
    """Puts the headline table into the README, between its markers."""
    before, _, rest = path.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    with runs.write_safely(path) as partial:
        partial.write_text(
            "\n\n".join([before + MARKERS[0], headline_table(paper, best), MARKERS[1] + after])
        )


IDC = "{} (Kim et al., ConvNet-3, augmented)"
MARKERS = "<!-- results -->", "<!-- end of results -->"


# --------------------------------------------------------------------------------------------------------------- cards
SCRATCH = (
    "SGD with step size 0.01 and momentum 0.9, shuffled batches of up to 256, 300 epochs, "
    "without the stored step sizes"
)
PIXELS = (
    "images, labels = distilled.decode().detach().flatten(0, 1), distilled.labels.flatten(0, 1)\n"
)
USES = {
    "learned schedule": "network = du.train_on(du.LeNet(), distilled)  # a trained copy",
    "from scratch": f"{PIXELS}"
    "network = du.LeNet()\nsgd = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)\n"
    "du.train(network, du.Split(images, labels), epochs=300, batch_size=256, optimizer=sgd)",
    "decoded": f"{PIXELS}network = du.LeNet()\nadam = torch.optim.Adam(network.parameters(), lr=1e-3)\n"
    "du.train(network, du.Split(images, labels), epochs={epochs}, batch_size=64, optimizer=adam)",
}
CARD = """# {name}

{description}
New LeNets, with initial weights not used to make the set, reach **{main}** (n={networks}) on the test images.
The best control with undistilled images reaches {control} ({title}, n={control_networks}).

{facts}

```python
{imports}

data = du.load_mnist("data", name="{dataset}", device="cpu")
distilled = du.load("{name}")
{use}
print(f"{{du.accuracy(network, data.test):.1f}}%")
```

{accuracies}
"""
ONE_SET = (
    "Accuracy on the 10,000 test images, mean ± std over new networks (drawn from seed 10000)."
)
DECODED_ACCURACIES = f"""{ONE_SET}
The images of the random real controls take the storage that the set's name counts, in multi-formation with factor 2
(four small images in each stored one); their labels come on top. From scratch, Adam's step size is chosen on validation
images for each network and kind of images, where the study tries several. All runs of a network see the same number of
images. *Augmented*: images are randomly rotated, shifted and scaled in every update. *Lead*: the difference from the
best control, before rounding; for a set distilled after decoding, what it was before is a control too."""


def card(name: str, path: Path, results: Results) -> str:
    """What a user of the shipped set in the file `path` wants to know, in Markdown."""
    metadata, distilled, decoded = read_metadata(path), du.load(path), name in DECODED
    results = results.without_seeds()  # of the shipped set, not of others
    shown, (title, control) = main_row(name), strongest_control(results, name)
    main = results.pooled(name, shown)
    described, facts = (describe_decoded if decoded else describe_distilled)(name, distilled)
    use = USES["decoded" if shown.startswith("LeNet") else shown]
    return CARD.format(
        name=name, dataset=metadata["dataset"], description=described.format(dataset=metadata["dataset"]),
        main=main, networks=len(main.values), title=title, control=control, control_networks=len(control.values),
        facts=markdown_table(["", ""], list((facts | facts_of_file(name, distilled, metadata, results)).items())),
        imports="import distill_utils as du" + "\nimport torch" * ("torch" in use),
        use=use.format(epochs=round(GENERAL["LeNet"][2] / distilled.labels[..., 0].numel())),
        accuracies=(decoded_accuracies if decoded else distilled_accuracies)(name, distilled, results),
    ).replace(" \n", "\n")  # fmt: skip


def describe_distilled(name: str, distilled: du.DistilledSet) -> tuple[str, dict[str, str]]:
    """A sentence on a distilled set, with a place for its dataset, and how to train on it and how it was made."""
    (stored, seen), recipe, made_for = count_images(name), RECIPES[name], protocol(name)
    factor = recipe.get("factor", 1)
    holds = f"Each stored image holds {factor} × {factor} smaller ones, so networks train on {seen} images."
    outer = (
        "iterations",
        "networks",
        "batch_size",
        "learning_rate",
        "step_size_learning_rate",
        "pool",
        "window",
    )
    uses = {"learned schedule": schedule_text(distilled), "from scratch": SCRATCH}
    return (
        f"{stored} stored images for {{dataset}} with soft labels, distilled for LeNets with random initial weights. "
        + holds * (factor > 1),
        {key: value + " **(intended use)**" * (key == made_for) for key, value in uses.items()}
        | {
            "images": f"{list(distilled.images.shape)}: steps, images, channels, height, width",
            "labels": f"{list(distilled.labels.shape)}: steps, labels, classes; learned with the images",
            "augmentation": "none, in distillation or training",
            "initialized from": "k-means centers",
            "outer loop": ", ".join(
                f"{key} {recipe[key]}" for key in outer if key in recipe
            ).replace("_", " "),
        },
    )


def describe_decoded(name: str, distilled: du.DistilledSet) -> tuple[str, dict[str, str]]:
    """The same for a decoded set."""
    options = DECODED[name]
    floats, own = stored_floats(distilled), distilled.images.numel() + distilled.labels.numel()
    several = (
        "any network and optimizer"
        if len(options["architectures"]) > 1
        else "tested only on LeNets"
    )
    scratch = f"Adam at 0.001 or 0.003, batches of 64, {GENERAL['LeNet'][2]:,} images in all for LeNet; {several}"
    start = "codes of random training images, and a decoder from an autoencoder of all of them"
    shape = list(distilled.labels.shape)
    labels = (
        f"{shape}: steps, labels, classes; predicted by {TEACHERS} LeNets trained on all images"
    )
    if outer := options.get("outer"):
        uses = {
            "learned schedule": f"{schedule_text(distilled)} **(intended use)**",
            "from scratch": scratch,
        }
        outer = ", ".join(f"{key} {value}" for key, value in outer.items()).replace("_", " ")
        labels += ", then learned"
    else:
        uses, outer = (
            {"from scratch": f"{scratch} **(intended use)**"},
            "none: no training is differentiated",
        )
    return (
        f"{distilled.labels[..., 0].numel():,} images for {{dataset}} in the storage of {options['floats'] // 784}: "
        f"a code of {distilled.images.shape[2]} floats\nand a soft label for each image, and one decoder with "
        f"{floats - own:,} weights; {floats:,} floats in all.",
        uses
        | {
            "images": f"codes {list(distilled.images.shape)}; `decode` makes images {list(distilled.decode().shape)}",
            "labels": labels,
            "augmentation": "none, except in rows marked *augmented*",
            "initialized from": start,
            "outer loop": outer,
        },
    )


def schedule_text(distilled: du.DistilledSet) -> str:
    inner = distilled.inner
    optimizer = "Adam" if inner["optimizer"] == "Adam" else f"SGD with momentum {inner['momentum']}"
    return f"{distilled.updates} updates by {optimizer}, in the stored order with the stored step sizes"


def facts_of_file(
    name: str, distilled: du.DistilledSet, metadata: dict, results: Results
) -> dict[str, str]:
    """What the file itself says, and how the set's experiment ran."""
    mean, std, run = float(metadata["mean"]), float(metadata["std"]), results.run(name)
    low, high = (float(each) * std + mean for each in distilled.decode().detach().aminmax())
    networks = f" --networks {run.networks}" if run.networks != Study.networks else ""
    return {
        "normalization": f"`(pixel - {mean:.4f}) / {std:.4f}`, pixels in 0..1; exact values are in the file's metadata",
        "pixel range": f"{low:.2f} to {high:.2f} as pixels; clip to 0..1 to look at them, not to train",
        "made by": f"`python -m study best --only {name}{networks}`, seed {metadata['seed']}, one run",
        "computed on": f"{run.machine}; {run.versions}; {run.seconds / 60:.0f} minutes, including tests",
    }


def distilled_accuracies(name: str, distilled: du.DistilledSet, results: Results) -> str:
    """The accuracies of a distilled set by both protocols, beside its controls."""
    rows = ["learned schedule", "from scratch", *(f"control: {title}" for title in CONTROLS)]
    found = [
        (row.replace("control:", "from scratch, control:"), results.pooled(name, row))
        for row in rows
    ]
    controls = (
        (row, results.pooled(f"controls-{name}", row))
        for row in results.find(f"controls-{name}").row.unique()
    )
    found += [(f"{distilled.updates} updates, control: {row}", each) for row, each in controls]
    table = markdown_table(
        ["trained", "accuracy", "networks"], [[*row, len(row[1].values)] for row in found]
    )
    warning = "This set was made for LeNet. Other architectures may do much worse; see `study/results/best/summary.md`."
    return f"{ONE_SET}\n\n{table}\n\n{warning}"


def decoded_accuracies(name: str, _: du.DistilledSet, results: Results) -> str:
    """The accuracies of a decoded set by the protocols that it was tested in, beside its controls."""
    schedule = f"{decoded_schedule(results, name)}\n\n" if name in DISTILLED else ""
    return f"{DECODED_ACCURACIES}\n\n{schedule}{decoded_table(results, name)}"


def decoded_schedule(results: Results, name: str) -> str:
    """The learned schedule of a decoded set, beside the same set before distillation and the best control of a set in
    multi-formation of as many floats and updates."""
    rows = [["learned schedule", counted(results, name, "learned schedule")]]
    title, accuracies = strongest_control(results, RIVAL_OF_DECODED)
    controls = control_accuracies(results, name) | {
        f"best control of `{RIVAL_OF_DECODED}`: {title}": accuracies
    }
    rows += [[title, f"{found} (n={len(found.values)})"] for title, found in controls.items()]
    return markdown_table(["LeNet, 50 updates by Adam", "test accuracy"], rows)


RIVAL_OF_DECODED = "mnist-ipc1-mf2-50updates"


# ------------------------------------------------------------------------------------------------------------- reports
HEADS = {
    "paper": """# The paper's MNIST experiments

Test accuracy, or the success rate of an attack, in percent: mean ± standard deviation over networks of all sets.""",
    "ablation": """# Ablation of later techniques

LeNets of unseen initializations after a short distillation of 100 images for 30 updates: accuracy on validation images
in percent, mean ± standard deviation over networks. The paper's method starts from noise, with fixed labels and inner
SGD; the best one from k-means centers, with soft labels and inner Adam. Seconds are those of the distillation with the
technique, on one thread.""",
    "best": f"""# The best distilled sets

LeNet on MNIST's test images, unseen initializations: accuracy in percent, mean ± standard deviation over n networks,
of one distillation unless the table says more. Bold is what a set is made for.
*Learned schedule*: the stored order and step sizes. *From scratch*: {SCRATCH}.
Without augmentation, unless stated. Minutes are those of one thread, tests included.""",
}
FIGURES = {"paper": (draw_baselines, draw_what_matters), "ablation": (draw_ablation,), "best": ()}


def tables(part: str, results: Results) -> list[str]:
    """The tables of a part of the study, with their headings where there are several."""
    if part == "ablation":
        return [ablation_table(results)]
    schedules = {
        "Controls, learned schedule": schedules_table(results),
        "Gains, one after another (points)": gains_table(results),
    }  # fmt: skip
    found = {"Accuracies": paper_table(results), **schedules} if part == "paper" else {
        "Accuracies": best_table(results), "Recipes": recipe_table(),
        **schedules, "Controls, from scratch": controls_table(results),
        "Augmented, from scratch": augmented_table(results),
        "Decoded sets, from scratch by Adam": decoded_table(results),
        "Other architectures, from scratch by Adam": transfer_table(results),
        "Other methods, from scratch": rivals_table(results),
        "As reported by others": reported_table(results),
    }  # fmt: skip
    return [f"## {title}\n\n{table}" for title, table in found.items() if table]


def write_report(part: str, results: Results) -> None:
    """Writes the summary and the figures of a part of the study into its folder."""
    hours = f"The experiments took {results.runs.seconds.sum() / 3600:.1f} hours of one thread, tests included."
    text = [
        HEADS[part],
        f"Written by `python -m study {part}` from the tables in this folder. {hours}",
    ]
    text += tables(part, results)
    with runs.write_safely(results.folder / "summary.md") as path:
        path.write_text("\n\n".join(text) + "\n")
    for draw in FIGURES[part]:
        figure = draw(results)
        figure.savefig(results.folder / f"{draw.__name__.removeprefix('draw_')}.png", dpi=150)
        plt.close(figure)


def write_cards(folder: Path, results: Results) -> None:
    """Writes the card of each set in `folder`."""
    for name in (*RECIPES, *DECODED):
        (folder / f"{name}.md").write_text(card(name, folder / f"{name}.safetensors", results))
