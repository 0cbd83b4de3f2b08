"""The command line: `python -m distill_utils`, or `torchrun -m distill_utils` for several processes."""

import argparse
import contextlib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import distill_utils as du
from checks import require, require_positive
from runs import process_rank


def options_of(function: Callable) -> list[inspect.Parameter]:
    """The keyword-only arguments of `function`, which are its options on the command line as well."""
    return [each for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY]


def add_options(parser: argparse.ArgumentParser, function: Callable) -> None:
    """Adds the options of `function`, each explained by its line in the docstring."""
    texts = dict(re.findall(r"^ *(\w+): +(\S.*(?:\n {15,}\S.*)*)", inspect.getdoc(function), re.MULTILINE))
    for option in options_of(function):
        flag = "--" + option.name.replace("_", "-")
        kind = {"int": int, "float": float, "str": str, "bool": bool}[option.annotation.split()[0]]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        required = option.default is option.empty
        default = argparse.SUPPRESS if required else option.default
        parser.add_argument(flag, required=required, default=default, help=" ".join(texts[option.name].split()), **how)


def command_line() -> dict:
    """The options given, by name."""
    parser = argparse.ArgumentParser(
        prog="python -m distill_utils",
        description="Distil a dataset for LeNet; under torchrun, several processes do it together.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        conflict_handler="resolve",  # one --seed, for the start and for what distill draws
    )
    parser.add_argument("output", help="safetensors file to write the distilled set to")
    parser.add_argument("--dataset", default="MNIST", choices=[*du.TORCHVISION, "digits"], help="what to distil")
    data_root = os.environ.get("DATA_ROOT", "data")
    parser.add_argument("--data-root", default=data_root, help="where the dataset lies, or is downloaded to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--start", default="real", choices=STARTS, help="what the images are at first")
    parser.add_argument("--known", type=int, metavar="seed", help="distil for the one initialization of this seed")
    parser.add_argument("--test-networks", type=int, default=100, help="networks behind the test accuracy")
    for function in (du.noise_start, du.DistilledSet, du.distill):
        add_options(parser, function)
    return vars(parser.parse_args())


def run_command(given: dict) -> None:
    """Distils, and in the first process writes and tests the set."""

    def chosen(function: Callable) -> dict:
        return {option.name: given[option.name] for option in options_of(function)}

    require_positive(**{name: given[name] for name in ("test_networks", "steps", "per_class")})
    output = Path(given["output"])
    require(not output.is_dir(), f"output={output}: is a folder; name a file in it")
    output.parent.mkdir(parents=True, exist_ok=True)  # where that fails, before any work
    with several_processes(given["device"]) as device:
        dataset = load_dataset(given, device)
        start = STARTS[given["start"]]
        images, labels = du.tiled(*start(dataset, **chosen(start)), tiles=given["tiles"])
        distilled = du.DistilledSet(images, labels, **chosen(du.DistilledSet))
        known = given["known"] is not None
        make_network = du.fixed_initialization(du.LeNet, seed=given["known"]) if known else du.LeNet
        rank, processes = process_rank()

        def save() -> None:
            if rank == 0:
                runner = f"torchrun --nproc-per-node={processes}" if "LOCAL_RANK" in os.environ else "python"
                command = shlex.join([*runner.split(), "-m", "distill_utils", *sys.argv[1:]])
                distilled.save(output, dataset=dataset, network="LeNet", seed=given["seed"], command=command)

        try:
            done = len(du.distill(distilled, dataset, make_network, **chosen(du.distill)).loss)
        except FloatingPointError:
            save()  # as the last good iteration left it
            raise
        save()
        if rank > 0:
            return
        if done < given["iterations"]:  # no time for a test: torchrun ends interrupted processes after 30 seconds
            print(f"{output}: interrupted after {done} of {given['iterations']} iterations")
        else:
            result = du.evaluate(distilled, dataset.test, make_network, networks=1 if known else given["test_networks"])
            print(f"{output}: {result} of the test set after {done} iterations")


STARTS = {"real": du.real_start, "noise": du.noise_start, "k-means": du.k_means_start}


@contextlib.contextmanager
def several_processes(device: str) -> Iterator[torch.device]:
    """This process's device; under torchrun, which sets LOCAL_RANK, within a job of all processes."""
    device = du.pick_device(device)
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group()
    yield device
    dist.destroy_process_group()


def load_dataset(given: dict, device: torch.device) -> du.Dataset:
    """The dataset asked for; of several processes on a machine, one downloads what is missing, and the others wait."""
    follows = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if follows:
        dist.barrier()
    if given["dataset"] == "digits":
        dataset = du.load_digits(device=device)
    else:
        dataset = du.load_torchvision(given["dataset"], given["data_root"], device=device)
    if dist.is_initialized() and not follows:
        dist.barrier()
    return dataset


def main() -> None:
    try:
        run_command(command_line())
    except (ValueError, FloatingPointError, OSError, du.DatasetUnavailable) as error:
        sys.exit(f"error: {error}")
