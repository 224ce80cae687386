"""Tables and reports of a run."""
from pathlib import Path

from rich.table import Column, Table

from .. import acceleration_report, models
from . import environment, figures
from .config import plain
from .files import write_text

EPOCHS_SHOWN = 12
NAMES = ("name", "twin of")  # columns that are never broken


def table(title, header, rows):
    """A rich Table; every cell is shown as str, and whole. header: titles of the columns, those of names in NAMES"""
    columns = (Column(title, overflow="fold", no_wrap=title in NAMES) for title in header)
    shown = Table(*columns, title=title, title_justify="left", show_header=any(header))
    for row in rows:
        shown.add_row(*map(str, row))
    return shown


def markdown(header, rows):
    """The same as a Markdown table."""
    def line(cells):
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def environment_section():
    facts = {**environment.versions(), **environment.machine(), **environment.build()}
    return "## Machine and versions\n\n" + markdown(("fact", "value"), facts.items())


def accelerated(model):
    """One sentence: how many modules of a model run on equiconv's kernels, and which do not."""
    rows = acceleration_report(model)
    left = sorted({row.cls for row in rows if row.status == "left"})
    done = sum(row.status == "accelerated" for row in rows)
    rest = f"; left as they are: {', '.join(left)}" if left else ""
    return f"{done} of {len(rows)} equivariant modules are accelerated{rest}"


def epochs_rows(epochs):
    return [(e["epoch"], f"{e['train_loss']:.4f}", f"{e['test_loss']:.4f}", f"{e['score']:.2f}", f"{e['seconds']:.1f}")
            for e in epochs]


def epochs_header(score_name):
    return "epoch", "training loss", "test loss", f"test {score_name}", "seconds"


def epochs_table(epochs, score_name):
    return table("last epochs", epochs_header(score_name), epochs_rows(epochs[-EPOCHS_SHOWN:]))


def training_report(run, complete):
    """Writes report.md and curves.png of a training run to its folder."""
    config, history, learner = run.config, run.history, run.learner
    state = "complete" if complete else f"**interrupted** after step {learner.step}; `--resume` goes on"
    times = sorted(row["milliseconds"] for row in history.steps)
    facts = [("state", state), ("weights", f"{learner.weights():,}"), ("processes", run.processes.size),
             ("construction", f"{run.construction_seconds:.2f} s")]
    if times:
        facts.append(("median step", f"{times[len(times) // 2]:.1f} ms"))
    if history.epochs:
        facts.append((f"test {run.experiment.score_name}", f"{history.epochs[-1]['score']:.2f}"))
    parts = [f"# {config.experiment}: {config.model}", f"Data: {run.experiment.summary}.", markdown(("", ""), facts),
             f"{accelerated(learner.model)}.", f"Network: {models.citation(config.model)}."]
    if history.steps:
        figures.training_curves(Path(config.out) / "curves.png", history, run.experiment.score_name)
        parts.append("![training curves](curves.png)")
    if history.epochs:
        parts += ["## Epochs", markdown(epochs_header(run.experiment.score_name), epochs_rows(history.epochs))]
    settings = [(name, f"`{value}`") for name, value in plain(config).items()]
    parts += ["## Settings", markdown(("setting", "value"), settings), environment_section()]
    write_text(Path(config.out) / "report.md", "\n\n".join(parts) + "\n")
