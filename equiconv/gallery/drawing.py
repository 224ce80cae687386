"""What the figures share: styles, images within a disc, a scalar field in colour with a vector field as arrows."""
from contextlib import contextmanager

import numpy as np

from ..experiments.figures import STYLE
from ..experiments.files import write_atomically

LOOK = {**STYLE, "font.size": 8, "axes.titlesize": 8, "axes.grid": False, "figure.constrained_layout.use": False,
        "savefig.facecolor": "white"}
CURVES = {"axes.grid": True}
SCALARS = "RdBu_r"  # the colour map of every scalar field and kernel: white is zero
LIMIT = 2.5  # root mean squares at the end of the colour map
LONGEST = 2.5  # root mean squares of the vector field that an arrow as long as the distance between two stands for
ARROWS = 13  # along each side
DPI = 220


@contextmanager
def new_figure(width, height):
    """A matplotlib Figure of that size in inches, without pyplot: the user's backend and figures stay as they are."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure


def save(figure, path, **options):
    """options: of Figure.savefig"""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=DPI, **options))


class Picture:
    """An image in grey, cut to a disc. values: [n, n]; limits: black and white; radius of the disc, in pixels"""

    def __init__(self, axes, values, radius, limits):
        bare(axes)
        self.image = axes.imshow(values, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="bilinear")
        cut(axes, self.image, radius)

    def update(self, values):
        self.image.set_data(values)


class Fields:
    """A scalar field in colour and a vector field as arrows, cut to a disc of that radius in pixels.

    fields: [3, n, n], the scalar and the components of the vector to the right and upwards
    """

    def __init__(self, axes, fields, radius):
        bare(axes)
        size = fields.shape[-1]
        self.image = axes.imshow(fields[0], cmap=SCALARS, vmin=-LIMIT, vmax=LIMIT, interpolation="bilinear")
        cut(axes, self.image, radius)
        step = size / ARROWS
        places = np.round(np.arange(ARROWS) * step + (step - 1) / 2).astype(int)
        rows, columns = (a.ravel() for a in np.meshgrid(places, places, indexing="ij"))
        kept = np.hypot(rows - (size - 1) / 2, columns - (size - 1) / 2) < radius
        self.rows, self.columns = rows[kept], columns[kept]
        self.arrows = axes.quiver(self.columns, self.rows, *self._components(fields), pivot="mid", units="xy",
                                  angles="uv", scale_units="xy", scale=LONGEST / step / 1.4, width=0.11 * step,
                                  headwidth=3.2, headlength=3.6, headaxislength=3.2, minlength=0.6, color="black")

    def _components(self, fields):
        return fields[1][self.rows, self.columns], fields[2][self.rows, self.columns]

    def update(self, fields):
        self.image.set_data(fields[0])
        self.arrows.set_UVC(*self._components(fields))


def cut(axes, image, radius):
    """Shows of an image in axes only a disc about its centre."""
    from matplotlib.patches import Circle
    centre = (image.get_array().shape[0] - 1) / 2
    image.set_clip_path(Circle((centre, centre), radius, transform=axes.transData))


def colour_bar(figure, axes, image):
    bar = figure.colorbar(image, cax=axes, extend="both", ticks=[-2, -1, 0, 1, 2])
    bar.set_label("colour: scalar field (units of its r.m.s.), arrows: vector field")
    bar.outline.set_linewidth(0.5)
    axes.tick_params(width=0.5)


def bare(axes):
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def gif(path, frames, seconds):
    """Writes RGB arrays [h, w, 3] as an endless film that lasts so long."""
    from PIL import Image
    images = [Image.fromarray(frame) for frame in frames]
    palette = images[len(images) // 3].quantize(256)  # one for all frames, or still parts would flicker
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    write_atomically(path, lambda temporary: images[0].save(
        temporary, save_all=True, append_images=images[1:], duration=round(1000 * seconds / len(images)), loop=0))


def pixels(figure, dpi):
    """The figure as [h, w, 3] uint8."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
