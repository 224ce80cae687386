"""Figures of the reports: for print, and readable without colour."""
from .files import write_atomically

STYLE = {"font.size": 9, "axes.grid": True, "grid.color": "0.88", "grid.linewidth": 0.6, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "legend.edgecolor": "none",
         "figure.constrained_layout.use": True}
LIGHT, DARK = "#e08b2c", "#1f4e79"  # apart in lightness too


def save(path, width, height, panels, draw):
    """Writes draw(figure, axes) as a PNG. width, height in inches; panels side by side, or none if it draws its own."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):  # no pyplot: the user's backend and figures stay as they are
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        draw(figure, figure.subplots(1, panels, squeeze=False)[0] if panels else None)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=200))


def smooth(values, window):
    """Means over up to `window` values up to each one."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / (i - max(0, i - window)) for i in range(1, len(sums))]


def training_curves(path, history, score_name):
    """Loss per step and test score per epoch."""
    def draw(_, axes):
        steps = [row["step"] for row in history.steps]
        losses = [row["loss"] for row in history.steps]
        window = max(1, len(losses) // 50)
        axes[0].plot(steps, losses, color="0.8", lw=0.8, label="each step")
        axes[0].plot(steps, smooth(losses, window), color=DARK, lw=1.5, label=f"mean of {window} steps")
        axes[0].set(xlabel="step", ylabel="training loss")
        axes[0].set_ylim(bottom=0)
        axes[0].legend()
        epochs = [row["epoch"] for row in history.epochs]
        axes[1].plot(epochs, [row["score"] for row in history.epochs], "o-", color=DARK, ms=3, lw=1.2)
        axes[1].set(xlabel="epoch", ylabel=f"test {score_name}")
        axes[1].xaxis.get_major_locator().set_params(integer=True)
    save(path, 7, 2.8, 2, draw)


def demo_curves(path, losses, milliseconds):
    """Loss curves and step times of escnn and equiconv. losses, milliseconds: {name: list, one value per step}"""
    looks = {"escnn": {"color": LIGHT, "lw": 3.0, "ls": "-"}, "equiconv": {"color": DARK, "lw": 1.2, "ls": "--"}}

    def draw(_, axes):
        for name, values in losses.items():
            window = max(1, len(values) // 50)
            axes[0].plot(range(1, len(values) + 1), smooth(values, window), label=name, **looks[name])
        axes[0].set(xlabel="step", ylabel=f"training loss, mean of {window} steps",
                    title="Same data, same initial weights")
        axes[0].set_ylim(bottom=0)
        axes[0].legend()
        everything = sorted(sum(milliseconds.values(), []))
        low, high = 0.95 * everything[0], everything[int(0.98 * (len(everything) - 1))] * 1.05  # without rare pauses
        edges = [low + (high - low) * i / 40 for i in range(41)]
        for name, values in milliseconds.items():
            median = sorted(values)[len(values) // 2]
            look = looks[name]
            axes[1].hist(values, edges, histtype="stepfilled", alpha=0.35, color=look["color"], ec=look["color"],
                         hatch=None if name == "escnn" else "////", label=f"{name}: median {median:.1f} ms")
            axes[1].axvline(median, color=look["color"], ls=look["ls"], lw=1.5)
        axes[1].set(xlabel="time of a training step (ms)", ylabel="steps", title="Step times, trained in turns")
        axes[1].set_ylim(top=axes[1].get_ylim()[1] * 1.3)  # room for the legend
        axes[1].legend()
    save(path, 8, 3.2, 2, draw)


LINES = tuple({"color": color, "marker": marker, "ls": style, "lw": 1.4, "ms": 4.5} for color, marker, style in (
    (DARK, "o", "-"), (LIGHT, "s", "--"), ("#3a8f5c", "^", "-."), ("#a33b5e", "D", ":"), ("0.35", "v", "--"),
    ("#7a5fb5", "P", "-."), ("#2aa1b3", "X", ":"), ("0.65", "*", "-")))  # apart without colour too


def data_efficiency(path, series, score_name):
    """series: {title: [(training samples, mean score, its spread over the seeds)]}"""
    def draw(_, axes):
        for (title, points), look in zip(series.items(), _looks(series)):
            if points:
                sizes, scores, spreads = zip(*points)
                axes[0].errorbar(sizes, scores, yerr=spreads if any(spreads) else None, capsize=2, label=title, **look)
        axes[0].set(xlabel="training samples", ylabel=f"test {score_name}", xscale="log")
        ticks = sorted({point[0] for points in series.values() for point in points})
        axes[0].set_xticks(ticks, map(str, ticks))
        axes[0].minorticks_off()
        axes[0].legend()
    save(path, 5, 3.4, 1, draw)


def wall_clock(path, curves, score_name, train_size):
    """curves: {title: [[[seconds, score] of each test] of each seed]}"""
    from matplotlib.ticker import LogLocator

    def draw(figure, axes):
        for (title, seeds), look in zip(curves.items(), _looks(curves)):
            for i, curve in enumerate(seeds):
                axes[0].plot(*zip(*curve), label=title if i == 0 else None, **look)
        axes[0].set(xlabel="seconds of training", ylabel=f"test {score_name}", xscale="log",
                    title=f"{train_size} training samples")
        axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].xaxis.set_major_formatter("{x:g}")
        axes[0].minorticks_off()
        figure.legend(loc="outside right upper")  # curves leave no corner free
    save(path, 6.8, 3.4, 1, draw)


def _looks(series):
    return [LINES[i % len(LINES)] for i in range(len(series))]


def examples(path, rows, titles, color_map="gray_r", limits=(0, 1), label=None):
    """Rows of images in one colour map.

    rows    lists of [H, W] tensors, as many each
    limits  values of the map's ends: one pair, or one for each row
    label   of the colour bar, if there is to be one
    """
    limits = limits if isinstance(limits, list) else len(rows) * [limits]

    def draw(figure, _):
        figure.set_layout_engine("compressed")  # for axes of fixed aspect; others may cut a long title off
        grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for images, title, line, (low, high) in zip(rows, titles, grid, limits):
            for image, axes in zip(images, line):
                shown = axes.imshow(image, cmap=color_map, vmin=low, vmax=high, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[["top", "right"]].set_visible(True)
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        if label:
            figure.colorbar(shown, ax=grid, label=label, shrink=0.8)
    save(path, 1 + 0.8 * len(rows[0]) + bool(label), 0.8 * len(rows), 0, draw)
