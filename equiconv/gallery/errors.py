"""Equivariance error against the angle, for networks of equiconv.models with random weights."""
import math
import warnings
from pathlib import Path

import torch

from .. import models
from ..experiments.figures import DARK, LIGHT
from ..experiments.files import write_csv
from ..testing import EquivarianceWarning, check_equivariance
from .drawing import CURVES, new_figure, save
from .responses import AXIS

STEP = 11.25  # degrees: half the angle of C16
AFFORDABLE = 4e9  # multiplications for one input: networks with more are left out unless they are named
COLUMNS = 4
LOWEST, HIGHEST = 1e-8, 10


def default_networks():
    """Names of the networks for images that take less than AFFORDABLE multiplications."""
    return [name for name in models.names()
            if len(models.input_shape(name)) == 3 and models.complexity(name).macs < AFFORDABLE]


def check_names(names):
    """Raises ValueError unless all are networks for images or volumes."""
    for name in names:
        if len(models.input_shape(name)) not in (3, 4):
            raise ValueError(f"{name} takes neither images nor volumes")


def error_curve(name, seed=0):
    """({degrees: relative error of the outputs}, whether the network was built for a group) of a network.

    The input, a smooth random field, is rotated in steps of STEP up to 180 degrees; volumes about a skew axis.
    seed  of the random weights

    Raises ValueError for a name that is no network for images or volumes.
    """
    from escnn import gspaces
    check_names([name])
    torch.manual_seed(seed)
    model, shape = models.create(name), models.input_shape(name)
    space = gspaces.rot2dOnR2(-1) if len(shape) == 3 else gspaces.rot3dOnR3()
    degrees = [STEP * (i + 1) for i in range(int(180 / STEP))]
    angles = [math.radians(d) for d in degrees]
    rotations = [space.fibergroup.element(a if len(shape) == 3 else a * AXIS, "radians" if len(shape) == 3 else "EV")
                 for a in angles]
    images = space.type(*shape[0] * [space.trivial_repr])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EquivarianceWarning)  # conventional networks are among them
        result = check_equivariance(Outputs(model), in_type=images, input_size=shape[-1], elements=rotations)
    return dict(zip(degrees, result.errors.values())), hasattr(model, "in_type")


class Outputs(torch.nn.Module):
    """A network as a function of plain tensors, which may be rotated by angles that are not of its group."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)


def draw_errors(out, curves):
    """Writes equivariance-errors.png and .csv to the folder `out`: a panel for each network.

    curves  {name: what error_curve returns}
    """
    import matplotlib
    columns = min(COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    with new_figure(max(1.75 * columns, 3) + 0.3, 1.42 * rows + 0.75) as figure, matplotlib.rc_context(CURVES):
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False,
                               gridspec_kw={"hspace": 0.48, "wspace": 0.12})
        width, height = figure.get_size_inches()
        figure.subplots_adjust(left=0.72 / width, right=0.98, top=1 - 0.58 / height, bottom=0.42 / height)
        lines = {}  # for the legend
        for axes, (name, (errors, steerable)) in zip(grid.flat, curves.items()):
            shown = [max(e, LOWEST) for e in errors.values()]
            kind = "steerable network" if steerable else "other network"
            lines[kind], = axes.plot(list(errors), shown, "o-" if steerable else "s-",
                                     color=DARK if steerable else LIGHT, ms=2, lw=1)
            mean = sum(errors.values()) / len(errors)
            axes.set_title(f"{name}\nmean {100 * mean:.2g} %", pad=3, fontsize=6.5)
            axes.set(yscale="log", ylim=(LOWEST / 2, HIGHEST), xlim=(0, 184), xticks=range(0, 181, 90),
                     yticks=[1e-8, 1e-6, 1e-4, 1e-2, 1])
        figure.legend(lines.values(), lines, loc="upper center", ncols=2, frameon=False, borderaxespad=0.2)
        for axes in list(grid.flat)[len(curves):]:
            axes.set_visible(False)
        for axes in list(grid.flat)[max(0, len(curves) - columns):len(curves)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("angle (degrees)")
        figure.supylabel("relative equivariance error of the outputs", fontsize=7, x=0.015)
        save(figure, Path(out) / "equivariance-errors.png")
    degrees = next(iter(curves.values()))[0]
    write_csv(Path(out) / "equivariance-errors.csv",
              [{"degrees": d, **{name: errors[d] for name, (errors, _) in curves.items()}} for d in degrees])
