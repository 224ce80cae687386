"""The steerable kernels of a convolution: each element of its basis, or the filter as its weights make it."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .drawing import SCALARS, bare, new_figure, save

GROUPS = ("C1 .. C64, D1 .. D64, SO2, O2 in the plane; SO3, O3, octa, ico in space")
MOST = 48  # elements of a basis that are drawn, if they fit
WIDTH, HEIGHT = 6.6, 8.5  # inches, of all elements
TILES = (0.55, 0.45, 0.36, 0.28, 0.22, 0.18)  # inches for the kernel of a pair of channels: the first at which all fit
LARGE = (2, 3)  # rows and columns of the largest elements that a page has room for: its tiles may be smaller for that
FILTER_TILE = 1.0  # inches, at most, for the kernel of a pair of channels in a filter by itself
TITLE, HEAD, BETWEEN = 0.55, 0.32, 0.12  # least width of an element, room above it, beside it
HEADING, LEAST = 0.22, 1.3  # room for that of a section, its least width
GAP = 0.12  # between the pictures of two pairs of channels, as part of a kernel


@dataclass
class Section:
    """Pictures of the same size under a heading. kernels: [out, in, k, k] each; titles: of each"""
    heading: str
    kernels: list
    titles: list

    def cell(self, tile):
        """(width, height) of a picture with its title, in inches."""
        outputs, inputs = self.kernels[0].shape[:2]
        return max(inputs * tile, TITLE) + BETWEEN, outputs * tile + HEAD

    def grid(self, tile):
        """(rows, columns), as even as can be."""
        count = len(self.kernels)
        rows = math.ceil(count / max(1, int(WIDTH // self.cell(tile)[0])))
        return rows, math.ceil(count / rows)

    def extent(self, tile):
        """(width, height) in inches."""
        (rows, columns), (wide, high) = self.grid(tile), self.cell(tile)
        return max(columns * wide, LEAST), rows * high + HEADING

    def first(self, count):
        return Section(self.heading, self.kernels[:count], self.titles[:count])


def draw_kernels(path, conv, most=MOST, filter_only=False):
    """Draws the kernels of an R2Conv, an R3Conv or one of their kin as a PNG; returns how many elements its basis has.

    conv         the module; small field types keep the picture readable
    most         elements that are drawn, if they fit on a page
    filter_only  draw the filter that the weights make instead of the elements

    An element of the basis maps one field to another; those of the same two fields are drawn together, without the
    channels of other fields. Each picture has a row for each output channel and a column for each input channel. Of
    three-dimensional kernels the middle slice across the z axis is shown. Raises ValueError if there are more channels
    than can be drawn.
    """
    out_channels, in_channels = conv.out_type.size, conv.in_type.size
    if out_channels * in_channels > 1024:
        raise ValueError(f"kernels from {in_channels} to {out_channels} channels are too many to draw: "
                         "take smaller field types")
    if filter_only:
        sections, tile = _on_a_page([Section("filter", [_filter(conv, conv.weights)], [""])], (FILTER_TILE,), (1, 1))
    else:
        sections, tile = _on_a_page(_sections(conv, most), TILES, LARGE)
    drawn = sum(len(section.kernels) for section in sections)
    placed, width, height = _shelves(sections, tile)
    with new_figure(width, height) as figure:
        def place(x, y, wide, high):
            return figure.add_axes([x / width, 1 - (y + high) / height, wide / width, high / height])

        def write(x, y, text, **style):
            figure.text(x / width, 1 - y / height, text, va="center", **style)
        write(0, -0.2, _heading(conv, len(conv.weights), drawn, filter_only), weight="bold")
        for section, left, top in placed:
            (wide, high), columns = section.cell(tile), section.grid(tile)[1]
            write(left, top + HEADING / 2, section.heading)
            for i, (kernel, title) in enumerate(zip(section.kernels, section.titles)):
                axes = place(left + i % columns * wide, top + HEADING + HEAD + i // columns * high,
                             kernel.shape[1] * tile, high - HEAD)
                bare(axes)
                image = axes.imshow(_mosaic(kernel / max(np.abs(kernel).max(), 1e-12)), cmap=SCALARS, vmin=-1, vmax=1,
                                    interpolation="nearest", aspect="auto")
                axes.set_title(title, pad=2, fontsize=6, loc="left")
        write(0, height + 0.15, "rows: output channels, columns: input channels", fontsize=6)
        axes = place(width + 0.1, HEADING + HEAD, 0.08, min(height - HEADING - HEAD, 1.6))
        bar = figure.colorbar(image, cax=axes, ticks=[-1, 0, 1])
        bar.outline.set_linewidth(0.5)
        bar.set_label("of its largest value", fontsize=6, labelpad=2)
        save(figure, Path(path), bbox_inches="tight")  # the texts and the bar lie outside of the figure
    return len(conv.weights)


def _sections(conv, most):
    """A Section for each pair of fields, with the blocks of its elements."""
    found = {}
    infos = conv.basisexpansion.get_basis_info()
    for one, info in zip(torch.eye(len(conv.weights), dtype=conv.weights.dtype)[:most], infos):
        pair = (conv.in_type, info["in_field_position"]), (conv.out_type, info["out_field_position"])
        inside, outside = (slice(type.fields_start[i], type.fields_end[i]) for type, i in pair)
        heading = " → ".join(_name(type.representations[i]) for type, i in pair)
        section = found.setdefault(tuple(i for _, i in pair), Section(heading, [], []))
        section.kernels.append(_filter(conv, one)[outside, inside])
        section.titles.append(_title(info))
    return list(found.values())


def _on_a_page(sections, tiles, least):
    """(sections, size of a tile): the first size at which they fit; or at the last one, as much of them as fits.

    least  rows and columns that a page has room for
    """
    highest, widest = (max(section.kernels[0].shape[axis] for section in sections) for axis in (0, 1))
    limit = min(((HEIGHT - HEADING) / least[0] - HEAD) / highest, (WIDTH / least[1] - BETWEEN) / widest)
    tiles = [tile for tile in tiles if tile <= limit] or [limit]
    for tile in tiles:
        if _shelves(sections, tile)[2] <= HEIGHT:
            return sections, tile
    while _shelves(sections, tile)[2] > HEIGHT:  # the last row goes, and with it perhaps its section
        rows, columns = sections[-1].grid(tile)
        sections = sections[:-1] + [sections[-1].first((rows - 1) * columns)] * (rows > 1)
    return sections, tile


def _shelves(sections, tile):
    """([(section, left, top)], width, height) in inches: from left to right, then downwards."""
    placed, left, top, high, width = [], 0, 0, 0, 0
    for section in sections:
        extent = section.extent(tile)
        if left > 0 and left + extent[0] > WIDTH:
            left, top, high = 0, top + high, 0
        placed.append((section, left, top))
        left, high = left + extent[0], max(high, extent[1])
        width = max(width, left)
    return placed, width, top + high


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


def _name(representation):
    return representation.name.replace("_", " ")


def _heading(conv, total, drawn, filter_only):
    def fields(type):
        return " + ".join(map(_name, type.representations))
    what = "one filter" if filter_only else f"{drawn} of {total} basis kernels" if drawn < total else \
        f"all {total} basis kernels"
    across = "" if conv.d == 2 else ", middle slice"
    return f"{conv.in_type.gspace.fibergroup.name}: {fields(conv.in_type)} → {fields(conv.out_type)}, {what}{across}"
