"""python -m benchmarks.report: plots of the latest results, and the table in README.md between its markers."""
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from . import records
from .labels import METHODS, MODES
from .machine import ROOT
from .plots import draw
from .table import number

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
LEGEND = """Medians. escnn / equiconv is the median of paired ratios of interleaved samples, which last about as long
for every method (before 2026-11-22, those of fast methods were shorter, down to a call after another method's, whose
caches and clock it found). ~ marks what varied too much to be trusted. The floor is what equiconv's arithmetic and
memory traffic take at the machine's measured peaks."""
app = typer.Typer(add_completion=False)


class NoMarkers(Exception):
    """The README has no place for the table."""


def tables(rows):
    """Markdown: for each machine and dtype, one row for each case and kind of work, one column for each method."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.machine, row.dtype, row.layout].append(row)
    return "\n\n".join(_table(*key, group) for key, group in sorted(groups.items()))


def _table(machine, dtype, layout, rows):
    methods = [m for m in METHODS if any(r.method == m for r in rows)]
    works = defaultdict(dict)
    for row in rows:
        works[row.case, row.mode][row.method] = row
    last = max(rows, key=lambda r: r.date)
    title = ", ".join(part for part in (machine, dtype, layout if layout == "channels_last" else "") if part)
    lines = [f"**{title}** (torch {last.torch}, escnn {last.escnn}, commit {last.commit}, {last.date[:10]})", "",
             f"| layer | work | {' | '.join(f'{METHODS[m]}, ms' for m in methods)} | escnn / equiconv | floor, ms | "
             "equiconv / floor |",
             "|---|---|" + "---:|" * (len(methods) + 3)]
    order = list(MODES)
    for (case, mode), found in sorted(works.items(), key=lambda item: (order.index(item[0][1]), item[0][0])):
        ours, theirs = found.get("equiconv"), found.get("escnn")
        floor = number((ours or theirs).floor_ms) if ours or theirs else ""
        lines.append(f"| {case} | {MODES[mode]} | " + " | ".join(_time(found.get(m)) for m in methods)
                     + f" | {_speedup(ours, theirs)} | {floor} | {_over_floor(ours)} |")
    return "\n".join(lines)


def _time(row):
    if row is None or row.median_ms == "":
        return "-"
    return number(row.median_ms) + (" ~" if row.noisy else "")


def _over_floor(row):
    if row is None or row.median_ms == "" or row.floor_ms == "":
        return "-"
    return f"{float(row.median_ms) / float(row.floor_ms):.1f}x" + (" ~" if row.noisy else "")


def _speedup(ours, theirs):
    if ours is None or ours.speedup == "":
        return "-"
    text = f"{ours.speedup:.2f}x"
    return f"{text} ~" if ours.noisy or theirs is None or theirs.noisy else f"**{text}**"


def update_readme(path, text):
    """Puts the text between the markers of a file. Raises NoMarkers."""
    content = path.read_text() if path.exists() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise NoMarkers(f"{path} has no {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n\n{LEGEND}\n{END}{after}")


@app.command()
def main(
    results: Annotated[Path, Option(help="Folder of the CSV files; plots are written beside them.")] = records.RESULTS,
    readme: Annotated[Path, Option(help="File with the markers.")] = ROOT / "README.md",
):
    """Draws the plots of the latest results and writes the table of the README."""
    rows = [row for path in sorted(results.glob("*.csv")) for row in records.latest(records.read(path))]
    rows = [row for row in rows if row.median_ms != ""]
    if not rows:
        typer.echo(f"no results in {results}: run python -m benchmarks.run")
        raise typer.Exit(1)
    for path in draw(rows, results):
        typer.echo(f"wrote {path}")
    try:
        update_readme(readme, tables(rows))
    except NoMarkers as error:
        typer.echo(f"no table written: {error}")
        raise typer.Exit(1) from None
    typer.echo(f"wrote the table of {readme}")


if __name__ == "__main__":
    app()
