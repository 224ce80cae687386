"""Time and memory to build layers, each in a fresh process: python -m benchmarks.construction.

Imports are not counted. Modes: warm (escnn has its bases on disk) and cold (its cache on disk is empty, and so is
equiconv's), with initialised weights or without (..._no_init).
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.cases import CASES

from .machine import ROOT
from .table import number
from .timing import Measurement, paired_ratios, percentile

MODES = ("warm", "warm_no_init", "cold", "cold_no_init")
METHODS = ("escnn", "equiconv")
REPEATS = 5
# What is built by default: the layers that escnn takes longest for, and those where it is quick.
SUBJECTS = {
    "c8_16_k5": MODES, "d8_16_k5": ("cold_no_init", "warm_no_init"), "d16_16_k5": ("cold_no_init", "warm_no_init"),
    "octahedral_1_k5": ("cold_no_init", "warm_no_init"), "icosahedral_1_k5": ("cold_no_init", "warm_no_init"),
    "so3_16_k3": ("cold_no_init", "warm_no_init"), "d8_64_k5": ("cold", "warm"), "wrn28_10": ("cold",),
}
app = typer.Typer(add_completion=False)


def cases():
    """The cases among SUBJECTS."""
    return [CASES[name] for name in SUBJECTS if name in CASES]


class Failed(Exception):
    """A layer was not built, or not in time."""


@dataclass(frozen=True)
class Construction(Measurement):
    """Seconds of each process for the modules; for the field types, at the median; and its largest memory, in MB."""
    types_s: float = 0.0
    peak_mb: float = 0.0


def measure(name, methods, mode, budget_s=60, timeout_s=300):
    """{method: Construction}, one process per sample, methods in turn. Raises Failed.

    name  a case, or a network of benchmarks.networks

    There are REPEATS samples, or as many as fit into the budget.
    """
    start = time.perf_counter()
    found = {method: [] for method in methods}
    initialize = not mode.endswith("no_init")
    with tempfile.TemporaryDirectory() as folder:
        escnn = _copy_of_escnn(folder) if mode.startswith("cold") else None
        if escnn is None:
            for method in methods:
                _build_in_process(name, method, initialize, timeout_s)  # fills the caches
        for done in range(REPEATS):
            if done and time.perf_counter() - start > budget_s:
                break
            for method in methods:
                found[method].append(_build_in_process(name, method, initialize, timeout_s, escnn))
    return {method: Construction(tuple(v["seconds"] for v in values),
                                 types_s=percentile([v["types_s"] for v in values], 50),
                                 peak_mb=max(v["peak_mb"] for v in values)) for method, values in found.items()}


def _copy_of_escnn(folder):
    """escnn keeps its cache on disk in its own folder: a copy of it in `folder`, without."""
    source = Path(util.find_spec("escnn").origin).parent
    copy = Path(folder) / "escnn"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("_cache", "__pycache__"))
    return copy


def _build_in_process(name, method, initialize, timeout_s, escnn=None):
    command = [sys.executable, "-m", "benchmarks.build_once", name, method, str(int(initialize))]
    path, environment = [str(ROOT)], {key: value for key, value in os.environ.items() if key != "EQUICONV_CACHE"}
    if escnn is not None:
        path.insert(0, str(escnn.parent))
        shutil.rmtree(escnn / "group" / "_cache", ignore_errors=True)
    environment["PYTHONPATH"] = os.pathsep.join(path)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Failed(f"more than {timeout_s} s") from None
    if done.returncode != 0:
        raise Failed((done.stderr.strip().splitlines() or ["no message"])[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    assert escnn is None or Path(found["escnn"]).is_relative_to(escnn), "the copy was not imported"
    return found


@app.command()
def main(
    case: Annotated[list[str], typer.Option(help="A case, or wrn28_10. Default: a choice of layers.")] = (),
    mode: Annotated[list[str], typer.Option(help=", ".join(MODES))] = (),
    method: Annotated[list[str], typer.Option(help=", ".join(METHODS))] = METHODS,
    budget: Annotated[float, typer.Option(help="Seconds of sampling for each mode of each case.")] = 30.0,
    timeout: Annotated[float, typer.Option(help="Seconds that one process may take.")] = 1800.0,
):
    """Builds layers in processes of their own, with escnn and with equiconv."""
    if unknown := set(mode) - set(MODES) | set(method) - set(METHODS):
        raise typer.BadParameter(f"mode must be one of {', '.join(MODES)} and method one of {', '.join(METHODS)}, got "
                                 f"{', '.join(unknown)}")
    table = Table()
    for header in ("layer", "mode", "method", "seconds", "escnn / it", "peak MB", "field types, s"):
        table.add_column(header, justify="left" if header in ("layer", "mode", "method") else "right")
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name in case or SUBJECTS:
        for which in mode or SUBJECTS.get(name, MODES):
            try:
                found = measure(name, method, which, budget, timeout)
            except Failed as error:
                console.print(f"{name}, {which}: {error}")
                continue
            for key, built in found.items():
                ratio = percentile(paired_ratios(found["escnn"], built), 50) if "escnn" in found else None
                table.add_row(name, which, key, number(percentile(built.samples, 50)), number(ratio),
                              number(built.peak_mb), number(built.types_s))
            console.print(f"{name}, {which}: " + ", ".join(
                f"{key} {number(percentile(built.samples, 50))} s" for key, built in found.items()))
    console.print(table)


if __name__ == "__main__":
    app()
