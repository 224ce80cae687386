"""The steerable kernels of a convolution: each element of its basis, or the filter as its weights make it."""
import math
from pathlib import Path

import numpy as np
import torch

from .drawing import SCALARS, bare, new_figure, save

GROUPS = ("C1 .. C64, D1 .. D64, SO2, O2 in the plane; SO3, O3, octa, ico in space")
MOST = 48  # elements of a basis that are drawn, if they fit
WIDTH, HEIGHT = 6.6, 8.5  # inches, of all elements
TITLE, HEAD, BETWEEN = 0.55, 0.36, 0.12  # least width of an element, room above it, beside it
GAP = 0.12  # between the pictures of two pairs of channels, as part of a kernel


def draw_kernels(path, conv, most=MOST, filter_only=False):
    """Draws the kernels of an R2Conv, an R3Conv or one of their kin as a PNG; returns how many elements its basis has.

    conv         the module; small field types keep the picture readable
    most         elements that are drawn, if they fit on a page
    filter_only  draw the filter that the weights make instead of the elements

    Each picture has a row for each output channel and a column for each input channel. Of three-dimensional kernels
    the middle slice across the z axis is shown. Raises ValueError if there are more channels than can be drawn.
    """
    out_channels, in_channels = conv.out_type.size, conv.in_type.size
    if out_channels * in_channels > 1024:
        raise ValueError(f"kernels from {in_channels} to {out_channels} channels are too many to draw: "
                         "take smaller field types")
    if filter_only:
        shown, titles = [_filter(conv, conv.weights)], ["filter"]
    else:
        shown = [_filter(conv, one) for one in torch.eye(len(conv.weights), dtype=conv.weights.dtype)[:most]]
        titles = [_title(info) for info, _ in zip(conv.basisexpansion.get_basis_info(), shown)]
    wide, high = (n * _tile(in_channels, out_channels) for n in (in_channels, out_channels))
    wide_with_title = max(wide, TITLE)
    columns = max(1, min(len(shown), int(WIDTH // (wide_with_title + BETWEEN))))
    rows = max(1, min(math.ceil(len(shown) / columns), int(HEIGHT // (high + HEAD))))
    shown = shown[:columns * rows]
    width, height = max(columns * (wide_with_title + BETWEEN) + 0.75, 3.2), rows * (high + HEAD) + 0.5
    with new_figure(width, height) as figure:
        for i, (kernel, title) in enumerate(zip(shown, titles)):
            x, y = BETWEEN + i % columns * (wide_with_title + BETWEEN), 0.25 + HEAD + i // columns * (high + HEAD)
            axes = figure.add_axes([x / width, 1 - (y + high) / height, wide / width, high / height])
            bare(axes)
            mosaic = _mosaic(kernel / max(np.abs(kernel).max(), 1e-12))
            image = axes.imshow(mosaic, cmap=SCALARS, vmin=-1, vmax=1, interpolation="nearest")
            axes.set_title(title, pad=2, fontsize=6, loc="left")
        figure.text(BETWEEN / width, 1 - 0.14 / height, _heading(conv, len(conv.weights), len(shown), filter_only),
                    va="center", weight="bold")
        figure.text(BETWEEN / width, 0.1 / height, "rows: output channels, columns: input channels", va="center",
                    fontsize=6)
        axes = figure.add_axes([1 - 0.6 / width, max(0.1, 0.25 / height), 0.08 / width, min(0.6, 1.6 / height)])
        bar = figure.colorbar(image, cax=axes, ticks=[-1, 0, 1])
        bar.outline.set_linewidth(0.5)
        bar.set_label("of its largest value", fontsize=6, labelpad=2)
        save(figure, Path(path))
    return len(conv.weights)


def build(group, in_names, out_names, kernel_size):
    """A convolution of equiconv.nn between sums of representations, as the command line names them.

    group               one of GROUPS
    in_names, out_names like "trivial,regular" or "0,1,2": irreps by their frequency, with a comma between fields

    Raises ValueError for what does not exist.
    """
    from .. import nn
    space = _space(group)
    fields = [nn.FieldType(space, [_representation(space, name) for name in names.split(",")])
              for names in (in_names, out_names)]
    convolution = nn.R2Conv if space.dimensionality == 2 else nn.R3Conv
    return convolution(*fields, kernel_size, bias=False)


def _space(group):
    from escnn import gspaces
    name = group.upper()
    continuous = {"SO2": lambda: gspaces.rot2dOnR2(-1, 6), "O2": lambda: gspaces.flipRot2dOnR2(-1, 6),
                  "SO3": lambda: gspaces.rot3dOnR3(4), "O3": lambda: gspaces.flipRot3dOnR3(4),
                  "OCTA": gspaces.octaOnR3, "ICO": gspaces.icoOnR3}
    if name in continuous:
        return continuous[name]()
    if name[:1] in ("C", "D") and name[1:].isdigit() and 1 <= int(name[1:]) <= 64:
        order = int(name[1:])
        if name[0] == "C":
            return gspaces.rot2dOnR2(order) if order > 1 else gspaces.trivialOnR2()
        return gspaces.flipRot2dOnR2(order) if order > 1 else gspaces.flip2dOnR2()
    raise ValueError(f"there is no group {group!r}; there are {GROUPS}")


def _representation(space, name):
    name = name.strip()
    if name in ("trivial", "regular"):
        if name == "regular" and space.fibergroup.order() < 0:
            raise ValueError(f"{space.fibergroup} has no regular representation: take irreps, like 0,1,2")
        return space.trivial_repr if name == "trivial" else space.regular_repr
    if not name.replace(".", "").isdigit():
        raise ValueError(f"a representation is trivial, regular or an irrep, like 1 or 1.2, got {name!r}")
    numbers = tuple(map(int, name.split(".")))
    ids = {tuple(irrep.id) for irrep in space.fibergroup.irreps()}
    # of a group with reflections, an irrep of that frequency
    fitting = [numbers] if numbers in ids else sorted(i for i in ids if i[1:] == numbers)
    if not fitting:
        known = ", ".join(".".join(map(str, i)) for i in sorted(ids))
        raise ValueError(f"{space.fibergroup} has no irrep {name}; it has {known}")
    return space.irrep(*fitting[-1])


def _filter(conv, weights):
    """[out, in, k, k] float64: in three dimensions the middle slice."""
    with torch.no_grad():
        filter = conv.basisexpansion(weights.detach()).double().cpu()
    filter = filter.reshape(conv.out_type.size, -1, *[conv.kernel_size] * conv.d).numpy()
    return filter if conv.d == 2 else filter[:, :, conv.kernel_size // 2]


def _tile(in_channels, out_channels):
    """Inches for the kernel of one pair of channels."""
    return min(0.45, 1.95 / in_channels, 3.4 / out_channels)


def _mosaic(kernel):
    """[out, in, k, k] -> one picture with white gaps."""
    outputs, inputs, k, _ = kernel.shape
    fine = max(1, round(12 / k))  # pixels of the picture for one of the kernel
    gap = max(1, round(GAP * k * fine))
    tile = k * fine + gap
    picture = np.full((outputs * tile - gap, inputs * tile - gap), np.nan)
    for o in range(outputs):
        for i in range(inputs):
            picture[o * tile:o * tile + k * fine, i * tile:i * tile + k * fine] = np.kron(kernel[o, i],
                                                                                        np.ones((fine, fine)))
    return picture


def _title(info):
    """The frequency and the radius of an element, where its basis names them."""
    names = {"irrep:frequency": "frequency", "frequency": "frequency", "radius": "radius"}
    found = {shown: info[key] for key, shown in names.items() if key in info}
    return "\n".join(f"{key} {value:g}" for key, value in found.items())


def _heading(conv, total, drawn, filter_only):
    def fields(type):
        return " + ".join(r.name.replace("_", " ") for r in type.representations)
    what = "one filter" if filter_only else f"{drawn} of {total} basis kernels" if drawn < total else \
        f"all {total} basis kernels"
    across = "" if conv.d == 2 else ", middle slice"
    return f"{conv.in_type.gspace.fibergroup.name}: {fields(conv.in_type)} → {fields(conv.out_type)}, {what}{across}"
