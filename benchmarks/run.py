"""python -m benchmarks.run: times equiconv beside escnn and plain torch, and appends what it found to a CSV file."""
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer import Option

from . import construction, field_layers, machine, network_steps, records
from .equality import Differs
from .layers import LAYOUTS, Unavailable, equiconv_nn
from .measure import measure, measure_construction, timed
from .precision import PRECISIONS, lookup
from .registry import OPS, PRESETS, matches, select
from .table import table

MEASURED_WHOLE = {field_layers.FieldLayer: field_layers.measure, network_steps.Network: network_steps.measure}
console = Console(width=None if sys.stdout.isatty() else 160)
app = typer.Typer(add_completion=False)


@dataclass
class Run:
    """What is measured in one run, and what is known of the machine so far."""
    device: str
    layout: str
    ops: tuple
    budget_s: float
    compiled: tuple   # globs of the cases that are timed under torch.compile too
    peaks: dict = field(default_factory=dict)

    def rows(self, case, dtype):
        """Rows of one case; of its construction where dtype is None. Raises Differs."""
        if dtype is None:
            return measure_construction(case, _methods_that_build(), console.print)
        if type(case) in MEASURED_WHOLE:
            return MEASURED_WHOLE[type(case)](case, self.device, dtype, self.budget_s, timed, self.layout)
        if dtype not in self.peaks:
            self.peaks[dtype] = found = machine.measure_peaks(self.device, lookup(dtype, self.device))
            console.print(f"{dtype}: a large matrix product {found.flops_per_s * 1e-9:.0f} GFLOP/s, "
                          f"a large copy {found.bytes_per_s * 1e-9:.1f} GB/s")
        return measure(case, self.device, dtype, self.ops, self.budget_s, self.peaks[dtype], self.layout,
                       matches(case.name, self.compiled), console.print)


@app.command()
def run(
    case: Annotated[list[str], Option(help="Name or glob; may be given several times. Default: the preset's.")] = (),
    device: Annotated[str, Option(help="cpu or cuda. Default: cuda where there is one (preset quick: cpu).")] = "",
    dtype: Annotated[str, Option(help=f"{', '.join(PRECISIONS)}: one or several, separated by commas.")] = "",
    op: Annotated[str, Option(help=f"{', '.join(OPS)}: one or several, separated by commas.")] = "",
    preset: Annotated[str, Option(help=f"{', '.join(PRESETS)}.")] = "default",
    layout: Annotated[str, Option(help=f"Memory layout of the input: {' or '.join(LAYOUTS)}.")] = "contiguous",
    compile: Annotated[bool | None, Option(
        "--compile/--no-compile", help="Time escnn under torch.compile too. Default: the preset's cases.")] = None,
    budget: Annotated[float, Option(help="Seconds of sampling for each kind of work. Default: the preset's.")] = 0.0,
    out: Annotated[Path | None, Option(help="CSV file. Default: benchmarks/results/<machine>.csv.")] = None,
):
    """Times equiconv beside escnn and plain torch. Nothing is timed that computes something else than escnn."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    chosen = PRESETS[preset]
    device = device or ("cuda" if torch.cuda.is_available() and preset != "quick" else "cpu")
    ops, dtypes = _split(op) or chosen.ops, _split(dtype) or chosen.dtypes
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"device must be cpu, or cuda where there is one, got {device!r}")
    try:
        for name in dtypes:
            lookup(name, device)
        cases = select(case or chosen.cases)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for given, known, what in ((ops, OPS, "op"), ((layout,), LAYOUTS, "layout")):
        if unknown := set(given) - set(known):
            raise typer.BadParameter(f"{what} must be one of {', '.join(known)}, got {', '.join(unknown)}")

    compiled = chosen.compiled if compile is None else ("*",) if compile else ()
    of_whole = [c for c in (cases if case else [*field_layers.LAYERS.values(), *network_steps.NETWORKS.values()])
                if type(c) in MEASURED_WHOLE and c.op in ops]
    cases = [c for c in cases if type(c) not in MEASURED_WHOLE]
    of_convolutions = tuple(o for o in ops if o in ("conv", "expand_filter"))
    jobs = [(c, name) for name in dtypes for c in (cases if of_convolutions else []) + of_whole]
    if "construction" in ops:
        jobs += [(c, None) for c in (cases if case else construction.cases())]
    limit_s = float("inf") if case else chosen.limit_s
    run = Run(device, layout, of_convolutions, budget or chosen.budget_s, compiled)
    where = dict(machine=machine.machine_name(device), device=device, **machine.environment())
    raise typer.Exit(_run(run, jobs, where, out or records.RESULTS / f"{where['machine']}.csv", limit_s))


def _run(run, jobs, where, out, limit_s):
    """Does the jobs [(case, dtype or None)]; the exit status: 1 where a method computed something else."""
    console.print(f"{where['machine']}, {where['threads']} threads, torch {where['torch']}, escnn {where['escnn']}, "
                  f"equiconv {where['equiconv']} ({where['commit']})")
    start, differing, left_out = time.perf_counter(), [], []
    with _progress() as progress:
        task = progress.add_task("", total=len(jobs))
        for case, dtype in jobs:
            title = f"{case.name} {dtype or 'construction'}"
            progress.update(task, description=title)
            if time.perf_counter() - start > limit_s:
                left_out.append(title)
                continue
            try:
                rows = run.rows(case, dtype)
            except Differs as error:
                differing.append(str(error))
            else:
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                for row in rows:
                    vars(row).update(where, date=now)
                records.append(out, rows)
                source = case.source or "a small case"
                console.print(table(f"{title}: {case.module}, batch {case.batch_on(run.device)}, {source}", rows))
            progress.advance(task)
    console.print(f"appended to {out}")
    if left_out:
        console.print(f"out of time after {limit_s:.0f} s, not measured: {', '.join(left_out)}")
    for message in differing:
        console.print(f"[bold red]not timed, since it computes something else:[/] {message}")
    return 1 if differing else 0


def _methods_that_build():
    try:
        equiconv_nn()
    except Unavailable:
        return ("escnn",)
    return ("escnn", "equiconv")


def _split(text):
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _progress():
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)


if __name__ == "__main__":
    app()
