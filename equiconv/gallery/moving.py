"""The rotating image and the rotating volume: figures and films of both networks' responses."""
import json
from pathlib import Path

import numpy as np

from ..experiments.figures import DARK, LIGHT
from ..experiments.files import write_text
from . import scenes
from .drawing import CURVES, Fields, Picture, bare, colour_bar, gif, new_figure, pixels, save
from .responses import AXIS, respond

IMAGE_SIZE, VOLUME_SIZE = 129, 33
IMAGE_FRAMES, VOLUME_FRAMES = 48, 24
SHOWN = {2: (0, 30, 105, 225), 3: (0, 105)}  # degrees in the still figure, as near as the frames come
SECONDS, FILM_DPI = 6, 110
ROWS = ("input", "response", "in the comoving\nframe", "response", "in the comoving\nframe")
NETWORK_ROWS = {1: 0, 3: 1}  # where a network's rows begin
# Slices through the middle of a volume, of axes [-z, -y, x]: name, index, components (right, up) after the scalar.
SLICES = (("axial (x, y)", lambda n: np.s_[..., n, :, :], (1, 2)),
          ("coronal (x, z)", lambda n: np.s_[..., :, n, :], (1, 3)),
          ("sagittal (y, z)", lambda n: np.s_[..., :, ::-1, n], (2, 3)))


def rotate_image(out, image=None, size=IMAGE_SIZE, frames=IMAGE_FRAMES, seed=0, tick=lambda: None):
    """Writes rotating-image.png, .gif and .json to the folder `out`; returns {network: mean equivariance error}.

    image   file of a photograph; by default a portrait
    size    of the networks' input, in pixels
    frames  angles in a full turn
    seed    of the networks' random weights
    tick    called after each of the 2 * frames steps

    The error is relative L2 between the response in the comoving frame and that at angle 0, within the inscribed disc,
    and its mean is over all other angles. Raises ValueError for a file or numbers that will not do.
    """
    _check(size, frames)
    show = respond(scenes.photograph(image, size), size, _angles(frames), seed, tick)
    return _publish(Path(out), "rotating-image", show, [_whole], tick)


def rotate_volume(out, volume=None, size=VOLUME_SIZE, frames=VOLUME_FRAMES, seed=0, tick=lambda: None):
    """The same for a volume, with three slices through its middle: rotating-volume.png, .gif and .json.

    volume  .npy file of a three-dimensional array with axes -z, -y, x; by default nilearn's brain, or without nilearn a
            phantom of a head
    """
    _check(size, frames)
    show = respond(scenes.volume(volume, size), size, _angles(frames), seed, tick)
    return _publish(Path(out), "rotating-volume", show, [_slice(*s, size) for s in SLICES], tick)


def _check(size, frames):
    if size < 17:
        raise ValueError(f"size must be at least 17, got {size}")
    if frames < 4:
        raise ValueError(f"frames must be at least 4, got {frames}")


def _angles(frames):
    return [360 * i / frames for i in range(frames)]


def _whole(fields):
    return fields


_whole.label = ""


def _slice(label, index, components, size):
    """A function from an array [..., D, H, W], or fields [4, D, H, W], to what a slice shows of it."""
    def cut(fields):
        plane = fields[index(size // 2)]
        return plane if fields.ndim == 3 else plane[[0, *components]]
    cut.label = label
    return cut


def _publish(out, name, show, views, tick):
    dimensions = show.inputs[0].ndim
    _still(out / f"{name}.png", show, views, dimensions)
    film = _film_of_image if dimensions == 2 else _film_of_volume
    gif(out / f"{name}.gif", film(show, views, tick), SECONDS)
    errors = {r.name: r.mean_error for r in show.responses}
    write_text(out / f"{name}.json", json.dumps({
        "mean equivariance error": errors, "parameters": {r.name: r.parameters for r in show.responses},
        "degrees": show.degrees, "equivariance error": {r.name: r.errors for r in show.responses}}, indent=1) + "\n")
    return errors


def _grid(show, views):
    """Rows of (draw(axes, view, frame) -> Picture or Fields, values(frame)) as in ROWS."""
    radius = (show.inputs.shape[-1] - 1) / 2
    limits = show.inputs[0].min(), show.inputs[0].max()
    rows = [(lambda axes, values: Picture(axes, values, scenes.FILLED * radius, limits), show.inputs)]
    for response in show.responses:
        rows += [(lambda axes, values: Fields(axes, values, radius), frames)
                 for frames in (response.camera, response.comoving)]
    return rows


def _still(path, show, views, dimensions):
    """Rows as in ROWS, columns of angles and views; below, the errors over the angle."""
    frames = [int(np.argmin(np.abs(np.array(show.degrees) - d))) for d in SHOWN[dimensions]]
    columns = [(frame, view) for frame in frames for view in views]
    cell, gap = (1.32, 0.06) if len(columns) < 5 else (0.98, 0.05)
    left, right, top, curves, below, between = 1.2, 0.75, 0.2 if len(views) == 1 else 0.6, 1.2, 0.4, 0.12
    width = left + len(columns) * (cell + gap) + right
    height = top + 5 * (cell + gap) + 2 * between + 0.35 + curves + below
    with new_figure(width, height) as figure:
        def place(x, y, w, h):  # inches from the top left
            return figure.add_axes([x / width, 1 - (y + h) / height, w / width, h / height])

        y = top
        for i, (draw, values) in enumerate(_grid(show, views)):
            y += between if i in NETWORK_ROWS else 0
            for j, (frame, view) in enumerate(columns):
                x = left + j * (cell + gap) + (0.5 * gap if j >= len(views) else -0.5 * gap) * (len(views) > 1)
                axes = place(x, y, cell, cell)
                shown = draw(axes, view(values[frame]))
                if i == 0:
                    degrees = f"{show.degrees[frame]:g}°"
                    axes.set_title(view.label.replace(" (", "\n(") if view.label else degrees, pad=3)
                    if view.label and view is views[1]:
                        axes.text(0.5, 1.42, degrees, transform=axes.transAxes, ha="center", weight="bold")
                if j == 0:
                    axes.text(-0.06, 0.5, ROWS[i], transform=axes.transAxes, ha="right", va="center", linespacing=1.3)
            if i in NETWORK_ROWS:
                response = show.responses[NETWORK_ROWS[i]]
                figure.text(0.08 / width, 1 - (y + cell) / height, response.name, rotation=90, weight="bold",
                            ha="left", va="center")
            y += cell + gap
        bar = y - 2 * (cell + gap) - between / 2
        colour_bar(figure, place(width - right + 0.1, bar - 0.9 * cell, 0.1, 1.8 * cell), shown.image)
        _errors(place(left, y + 0.35, width - left - right, curves), show)
        save(figure, path)


def _errors(axes, show):
    import matplotlib
    for response, colour, marker in zip(show.responses, (DARK, LIGHT), "os"):
        axes.plot(show.degrees[1:], [100 * e for e in response.errors[1:]], marker + "-", color=colour, ms=2.5, lw=1)
    axes.set(yscale="log", xlim=(0, 360), xticks=range(0, 361, 45), xlabel="angle of rotation (degrees)",
             ylabel="equivariance\nerror (%)")
    with matplotlib.rc_context(CURVES):
        axes.grid(True)
    axes.set_ylim(0.3, 300)  # below the lowest are the angles at which the grid maps to itself
    axes.yaxis.set_major_formatter("{x:g}")
    for response, colour, factor, side in zip(show.responses, (DARK, LIGHT), (2, 0.5), ("bottom", "top")):
        label = f"{response.name} ({response.parameters:,} weights): mean {percent(response.mean_error)}"
        axes.text(0.5, factor * 100 * response.mean_error, label, color=colour, ha="center", va=side, weight="bold",
                  transform=axes.get_yaxis_transform())


def percent(error):
    return f"{100 * error:.3g} %"


def _film_of_image(show, views, tick):
    """Frames of: the input at the left; for each network, a row of the response and the comoving frame."""
    rows = _grid(show, views)
    with new_figure(6.4, 4.7) as figure:
        axes = figure.subplots(2, 3, gridspec_kw={"left": 0.01, "right": 0.87, "top": 0.92, "bottom": 0.02,
                                                  "wspace": 0.03, "hspace": 0.16})
        moving = []
        for i, response in enumerate(show.responses):
            for j, k in enumerate((0, 1 + 2 * i, 2 + 2 * i)):
                draw, values = rows[k]
                moving.append((draw(axes[i, j], values[0]), values, _whole))
            axes[i, 1].set_title(f"{response.name}: response", pad=4)
            axes[i, 2].set_title(f"comoving frame: error {percent(response.mean_error)}", pad=4)
        title = axes[0, 0].set_title("", pad=4)
        bare(axes[1, 0])
        colour_bar(figure, figure.add_axes([0.89, 0.2, 0.018, 0.6]), moving[1][0].image)
        return _frames(figure, show, moving, lambda degrees: title.set_text(f"input, {degrees:.0f}°"), tick)


def _film_of_volume(show, views, tick):
    """Frames of: a row for each slice; columns as the rows of the still figure."""
    rows = _grid(show, views)
    with new_figure(8.0, 4.9) as figure:
        axes = figure.subplots(len(views), 5, gridspec_kw={"left": 0.03, "right": 0.9, "top": 0.88, "bottom": 0.02,
                                                           "wspace": 0.04, "hspace": 0.04})
        moving = []
        for i, view in enumerate(views):
            for j, (draw, values) in enumerate(rows):
                moving.append((draw(axes[i, j], view(values[0])), values, view))
            axes[i, 0].set_ylabel(view.label)
        for j, response in zip((1, 3), show.responses):
            axes[0, j].set_title(f"{response.name}:\nresponse", pad=4)
            axes[0, j + 1].set_title(f"comoving frame:\nerror {percent(response.mean_error)}", pad=4)
        title = axes[0, 0].set_title("", pad=4)
        colour_bar(figure, figure.add_axes([0.915, 0.2, 0.014, 0.6]), moving[1][0].image)
        about = ", ".join(f"{v:g}" for v in AXIS)
        return _frames(figure, show, moving, lambda degrees: title.set_text(f"input, {degrees:.0f}°\nabout ({about})"),
                       tick)


def _frames(figure, show, moving, entitle, tick):
    frames = []
    for i, degrees in enumerate(show.degrees):
        for drawn, values, view in moving:
            drawn.update(view(values[i]))
        entitle(degrees)
        frames.append(pixels(figure, FILM_DPI))
        tick()
    return frames
