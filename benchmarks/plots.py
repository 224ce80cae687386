"""Plots of the latest results: the time of every method beside escnn's, and its floor."""
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .labels import METHODS, MODES
from .table import number

COLOURS = {"escnn": "#7f7f7f", "escnn_compiled": "#bcbd22", "torch": "#1f77b4", "equiconv": "#d62728",
           "equiconv_dense": "#ff9896", "equiconv_factorised": "#9467bd", "equiconv_two_pass": "#c5b0d5",
           "equiconv_fused": "#8c564b", "equiconv_convolutions": "#ff7f0e", "equiconv_irreps": "#e377c2",
           "twin": "#17becf"}


def draw(rows, folder):
    """One PNG for each machine, dtype and layout, with a panel for each kind of work; returns their paths."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.machine, row.dtype or "construction", row.layout].append(row)
    paths = []
    for (machine, dtype, layout), group in sorted(groups.items()):
        parts = [part for part in (machine, dtype, "channels-last" if layout == "channels_last" else "") if part]
        figure = _figure(", ".join(parts), group)
        paths.append(folder / f"{'-'.join(parts)}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _figure(title, rows):
    works = [[row for row in rows if row.mode == mode] for mode in MODES]
    works = [found for found in works if any(row.method == "escnn" for row in found)]
    bars = [len(found) + len({row.case for row in found}) for found in works]
    figure, panels = plt.subplots(len(works), 1, figsize=(9, 1 + sum(0.17 * n + 0.8 for n in bars)), squeeze=False,
                                  gridspec_kw={"height_ratios": bars}, layout="constrained")
    figure.suptitle(f"{title}: time per call as a multiple of escnn's")
    for found, panel in zip(works, panels[:, 0]):
        _panel(panel, found)
    present = [method for method in METHODS if any(row.method == method for row in rows)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[method]) for method in present]
    labels = [METHODS[method] for method in present]
    if any(row.floor_ms != "" for row in rows):
        handles.append(plt.Line2D([], [], color="black"))
        labels.append("its floor at the machine's peaks")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    return figure


def _panel(panel, rows):
    """One bar per case and method. Faded: noisy."""
    by_case = defaultdict(dict)
    for row in rows:
        by_case[row.case][row.method] = row
    y, ticks = 0, {}
    for case, found in by_case.items():
        if "escnn" not in found:
            continue
        ticks[case] = y - (len(found) - 1) / 2
        for method in METHODS:
            if method in found:
                _bar(panel, y, found[method], found["escnn"].median_ms)
                y -= 1
        y -= 0.8
    panel.set(title=MODES[rows[0].mode], yticks=list(ticks.values()), yticklabels=list(ticks))
    panel.title.set_fontsize("medium")
    panel.set_xlim(0, 1.12 * panel.get_xlim()[1])  # room for the words at the end of the bars
    panel.grid(axis="x", alpha=0.3)


def _bar(panel, y, row, unit):
    error = [[(row.median_ms - row.p20_ms) / unit], [(row.p80_ms - row.median_ms) / unit]]
    panel.barh(y, row.median_ms / unit, 0.9, color=COLOURS[row.method], alpha=0.4 if row.noisy else 1, xerr=error,
               error_kw={"linewidth": 0.8})
    if row.floor_ms != "":
        panel.plot([row.floor_ms / unit] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.5)
    words = f"{number(row.median_ms)} ms" + (f", {row.speedup:.2f}x" if row.method.startswith("equiconv") else "")
    panel.annotate(words + (" ~" if row.noisy else ""), (max(row.p80_ms, row.median_ms) / unit, y), xytext=(4, 0),
                   textcoords="offset points", va="center", fontsize="x-small")
