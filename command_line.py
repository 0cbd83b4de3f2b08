"""The command line: `python -m distill_utils`, or `torchrun -m distill_utils` for several processes."""

import argparse
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

import distill_utils as du
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
    parser.add_argument("--data-root", default="data", help="where the dataset lies, or is downloaded to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--start", default="real", choices=["real", "noise"], help="what the images are at first")
    parser.add_argument("--known", type=int, metavar="seed", help="distil for the one initialization of this seed")
    parser.add_argument("--test-networks", type=int, default=100, help="networks behind the test accuracy")
    for function in (du.noise_start, du.DistilledSet, du.distill):
        add_options(parser, function)
    return vars(parser.parse_args())


def run_command(given: dict) -> None:
    """Distils, and in the first process writes and tests the set."""

    def chosen(function: Callable) -> dict:
        return {option.name: given[option.name] for option in options_of(function)}

    device, local_rank = du.pick_device(given["device"]), int(os.environ.get("LOCAL_RANK", 0))
    several = "LOCAL_RANK" in os.environ  # which torchrun sets
    if several:
        if device.type == "cuda":
            torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank) if device.type == "cuda" else torch.device("cpu")
        dist.init_process_group()
        if local_rank > 0:  # one process of each machine downloads what is missing, the others wait
            dist.barrier()
    if given["dataset"] == "digits":
        dataset = du.load_digits(device=device)
    else:
        dataset = du.load_torchvision(given["dataset"], given["data_root"], device=device)
    if several and local_rank == 0:
        dist.barrier()
    start = {"real": du.real_start, "noise": du.noise_start}[given["start"]]
    distilled = du.DistilledSet(*start(dataset, **chosen(start)), **chosen(du.DistilledSet))
    known = given["known"] is not None
    make_network = du.fixed_initialization(du.LeNet, seed=given["known"]) if known else du.LeNet
    done = len(du.distill(distilled, dataset, make_network, **chosen(du.distill)).loss)
    rank, processes = process_rank()
    if rank == 0:
        runner = f"torchrun --nproc-per-node={processes}" if several else "python"
        command = shlex.join([*runner.split(), "-m", "distill_utils", *sys.argv[1:]])
        distilled.save(given["output"], dataset=dataset, network="LeNet", seed=given["seed"], command=command)
        if done < given["iterations"]:  # no time for a test: torchrun ends interrupted processes after 30 seconds
            print(f"{given['output']}: interrupted after {done} of {given['iterations']} iterations")
        else:
            result = du.evaluate(distilled, dataset.test, make_network, networks=1 if known else given["test_networks"])
            print(f"{given['output']}: {result} of the test set after {done} iterations")
    if several:
        dist.destroy_process_group()


def main() -> None:
    try:
        run_command(command_line())
    except (ValueError, FloatingPointError, du.DatasetUnavailable) as error:
        sys.exit(f"error: {error}")
