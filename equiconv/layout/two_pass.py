"""A FactorisedPlan for the two-pass method: a kernel writes all of z, matrix products mix it.

What a kernel is compiled for is a Structure; numbers that it reads while it runs are in two flat tables. All of it is
for one group of the convolution: the others have other channels and weights, by constant steps.

A `place` (before, step, at) says where a component lies in a buffer of several matrices for `pixels` pixels: at element
pixels * before + pixel * step + at.
"""
import hashlib
from dataclasses import dataclass
from itertools import product

import numpy as np

from .conv_tables import three_axes, weight_strides
from .flat_table import PADDING, FlatTable

MAX_SUMS = 96     # over the taps, that a program of pass 1 holds in registers
MAX_TERMS = 192   # of z's that it is compiled for; one z alone may have more
MAX_ALIGNED = 8   # copies that a thread treats together at most
MAX_SIZE = 64     # components of a field whose basis is changed: that matrix lies in registers
PLACE = ("before", "step", "at")
FIELD = ("channel", *PLACE)                            # of a component of a field; before is ABSENT where it is zero
ABSENT = -1
INSTANCE = ("column", "copies", "rows_start")          # of a Part: see there
TEMPLATE = ("base", "step_source", "step_target", "step_group", "sources", "targets", "terms", "terms_start",
            "scales_start")                            # of a Gather: see there
TERM = ("base", "step_source", "step_target", "step_group")


@dataclass(frozen=True)
class Change:
    """Fields whose basis is changed alike, in one launch.

    size          components of each
    fields_start  in index: FIELD of each component of each field
    basis_start   in values: [size, size]; -1 for none (then size is 1)
    adds          whether the result is added to what is there
    """
    fields: int
    size: int
    fields_start: int
    basis_start: int
    adds: bool


@dataclass(frozen=True)
class Part:
    """What a program of pass 1 computes from the components of one irrep: sums over the taps, then some of the z's.

    sums       ((component, part), ...), by component: x^[component] * (that part of the harmonics)
    rows       (((sum, coefficient), ...), ...): the terms of each z
    instances  in how many places of the fields the irrep lies; INSTANCE of each, in index, from instances_start on
    copies     fields of the largest instance; their components lie side by side
    aligned    what divides every place in x^ and z where copies begin, and their number
    """
    components: int
    sums: tuple
    rows: tuple
    instances: int
    instances_start: int
    copies: int
    aligned: int


@dataclass(frozen=True)
class Product:
    """Matrix products of one shape: y^ [pixels * components, height] = z [pixels * components, depth] W, `count` times.

    z_start, y_start, packed_start  in elements for one pixel (of W: in elements)
    """
    count: int
    components: int
    depth: int
    height: int
    z_start: int
    y_start: int
    packed_start: int


@dataclass(frozen=True)
class Gather:
    """Sums of scaled elements of one array, for every pair of a source and a target field.

    TEMPLATE of each in index: to [base + source field * step_source + target field * step_target + group * step_group]
    goes the sum over TERMs, addressed in the same way, times their scales.
    """
    templates: int
    start: int
    pairs: int  # of fields, in the largest template


@dataclass(frozen=True)
class Structure:
    """What the kernels are compiled for, and sizes.

    kernel              (outer, middle, inner)
    parities            of each part of the harmonics: whether it is odd along (outer, middle, inner)
    coefficients_start  in values: [half of outer, half of middle, half of inner, parts]
    channels            of x^, for one pixel; likewise z_size, y_size; packed: elements of all W
    """
    kernel: tuple
    parities: tuple
    coefficients_start: int
    channels: int
    z_size: int
    y_size: int
    packed: int
    sources: tuple
    parts: tuple
    products: tuple
    targets: tuple
    pack: Gather
    unpack: Gather


MAX_BYTES = 1 << 28  # of the z's of a slice
MIN_PIXELS = 1024    # of a slice, whatever they take

_STRUCTURES = {}


def grid_of(geometry):
    """Sizes of the grid of x^, on which a window of the kernel's taps begins at every pixel of the target (times the
    stride): the source with its padding, and with zeros between its pixels if geometry.up."""
    steps = (1,) * len(geometry.kernel) if geometry.up else geometry.stride
    return [(n - 1) * step + dilation * (k - 1) + 1 for n, step, dilation, k in zip(
        geometry.target_size, steps, geometry.dilation, geometry.kernel)]


def pixels_of_slice(pixels, z_size, itemsize):
    """How many pixels of the target are treated at a time, so that their z's take MAX_BYTES."""
    return min(pixels, max(MIN_PIXELS, MAX_BYTES // (max(z_size, 1) * itemsize)))


def structure(key):
    """The Structure of that key, which two_pass_tables returned. Raises RuntimeError where it was not called."""
    if key not in _STRUCTURES:
        raise RuntimeError("the tables of a two-pass convolution were not made in this process: call the layer once")
    return _STRUCTURES[key]


def two_pass_tables(plan, kernel, groups, up):
    """(key of the Structure, index int32 tensor, values float64 tensor) of a FactorisedPlan.

    kernel      tuple over the axes
    groups, up  as in layout.Geometry
    """
    index, values = FlatTable(np.int32), FlatTable(np.float64)
    source_fields, target_fields = (groups, 1) if up else (1, groups)
    sources = [(s, len(s.fields) // source_fields) for s in plan.sources]
    targets = [(t, len(t.fields) // target_fields) for t in plan.targets]
    columns = np.cumsum([0, *(fields * s.fields.layout.size for s, fields in sources)])
    parities, coefficients = _folded(plan.harmonics, three_axes(kernel), up)
    numbers = _Numbers(plan, sources, targets)
    changes = [_Change(s, fields, [(0, int(columns[-1]), int(start) + c * fields) for c in range(s.fields.layout.size)])
               for (s, fields), start in zip(sources, columns)]
    of_targets = [_Change(t, fields, [numbers.place_of_y(i, t.places[c], fields) for c in range(t.fields.layout.size)])
                  for i, (t, fields) in enumerate(targets)]
    found = Structure(
        kernel=three_axes(kernel), parities=tuple(p for _, p in parities), coefficients_start=values.add(coefficients),
        channels=int(columns[-1]), z_size=numbers.z_size, y_size=numbers.y_size, packed=numbers.packed,
        sources=_changes(changes, index, values), parts=_parts(sources, columns, parities, numbers, index),
        products=numbers.products, targets=_changes(of_targets, index, values),
        pack=_pack(plan, sources, targets, groups, up, numbers, index, values),
        unpack=_unpack(plan, sources, targets, groups, up, numbers, index, values))
    key = hashlib.blake2b(repr(found).encode(), digest_size=12).hexdigest()
    _STRUCTURES[key] = found
    return key, index.tensor(PADDING), values.tensor(PADDING)


def too_large(plan, kernel):
    """Why the kernels cannot take that FactorisedPlan for a grid of taps of shape `kernel`, or None."""
    size = max((s.fields.layout.size for s in (*plan.sources, *plan.targets) if not _is_split(s)), default=0)
    parts_of = _parts_of(_folded(plan.harmonics, three_axes(kernel), False)[0])
    sums = max((len(_sums_of(row, parts_of)) for source in plan.sources for row in source.rows), default=0)
    if size > MAX_SIZE or sums > MAX_SUMS:
        return (f"at most {MAX_SIZE} components of a field and {MAX_SUMS} sums over the taps are supported, got {size} "
                f"and {sums}")
    return None


def _is_split(side):
    return bool((side.transform == np.eye(len(side.transform))).all())


def _folded(harmonics, kernel, up):
    """Harmonics as sums of parts that are even or odd along each axis: ([(harmonic, parity)], coefficients).

    coefficients  [half of outer, half of middle, half of inner, parts]: mirrored taps are added or subtracted before.
                  Along the outer and the middle axis, the tap in the middle is added to itself.
    """
    grid = harmonics.reshape(-1, *kernel)
    if up:
        grid = np.flip(grid, (1, 2, 3))
    parities, parts = [], []
    for h, function in enumerate(grid):
        for parity in product(*((0, 1) if k > 1 else (0,) for k in kernel)):
            part = function
            for axis, odd in enumerate(parity):
                part = (part + (-1) ** odd * np.flip(part, axis)) / 2
            if np.abs(part).max() > 1e-12 * np.abs(function).max():
                parities.append((h, parity))
                parts.append(part[tuple(slice((k + 1) // 2) for k in kernel)])
    parts = np.stack(parts, -1)
    for axis, k in enumerate(kernel[:2]):
        if k > 1 and k % 2:
            np.moveaxis(parts, axis, 0)[-1] /= 2
    return parities, parts


class _Numbers:
    """Where the k's and m's of each group lie, and in which Product."""

    def __init__(self, plan, sources, targets):
        groups = range(len(plan.components))
        self.k_start, self.depth = _starts(sources, groups, lambda s: s.depth)
        self.m_start, self.height = _starts(targets, groups, lambda t: t.height)
        shapes = {}
        for g in groups:
            if self.depth[g] and self.height[g]:
                shapes.setdefault((plan.components[g], self.depth[g], self.height[g]), []).append(g)
        self.z_size = self.y_size = self.packed = 0
        self.place, products = {}, []  # {group: (Product, which one of it)}
        for (components, depth, height), members in shapes.items():
            found = Product(len(members), components, depth, height, self.z_size, self.y_size, self.packed)
            products.append(found)
            self.place.update({g: (found, i) for i, g in enumerate(members)})
            self.z_size += found.count * components * depth
            self.y_size += found.count * components * height
            self.packed += found.count * depth * height
        self.products = tuple(products)

    def place_of_z(self, source, row, fields):
        of, i = self.place[row.group]
        at = row.component * of.depth + self.k_start[source][row.group] + row.k * fields
        return of.z_start + i * of.components * of.depth, of.components * of.depth, at

    def place_of_y(self, target, place, fields):
        group, m, a = place
        if group not in self.place:
            return ABSENT, 0, 0
        of, i = self.place[group]
        at = a * of.height + self.m_start[target][group] + m * fields
        return of.y_start + i * of.components * of.height, of.components * of.height, at

    def packed_at(self, source, target, group, m, k, source_fields, target_fields):
        """(place of W[m, k] of the first fields, step to the next source field)"""
        of, i = self.place[group]
        row = self.k_start[source][group] + k * source_fields
        column = self.m_start[target][group] + m * target_fields
        return of.packed_start + (i * of.depth + row) * of.height + column, of.height


def _starts(sides, groups, counts):
    """([{group: first number} of each side], {group: how many there are})"""
    starts, total = [], dict.fromkeys(groups, 0)
    for side, fields in sides:
        starts.append(dict(total))
        for g in groups:
            total[g] += fields * counts(side).get(g, 0)
    return starts, total


class _Change:
    """Fields of one representation, with the places of the components of the first of them."""

    def __init__(self, side, fields, places):
        self.side, self.split = side, _is_split(side)
        layout = side.fields.layout
        self.rows = np.array([[(channel + c, before, step, at + f if before != ABSENT else 0)
                               for c, (before, step, at) in zip(range(layout.size), places)]
                              for f, channel in enumerate(side.fields.channels[:fields])])  # [fields, size, FIELD]


def _changes(changes, index, values):
    """Changes, those without a change of basis in one launch; what is added comes last."""
    found = []
    for adds in (False, True):
        mine = [c for c in changes if getattr(c.side, "adds", False) == adds]
        split = [c.rows.reshape(-1, 1, len(FIELD)) for c in mine if c.split]
        if split:
            rows = np.concatenate(split)
            rows = rows[np.argsort(rows[:, 0, 0], kind="stable")]
            found.append(Change(len(rows), 1, index.add(rows), -1, adds))
        found += [Change(len(c.rows), c.rows.shape[1], index.add(c.rows), values.add(c.side.transform), adds)
                  for c in mine if not c.split]
    return tuple(found)


def _parts(sources, columns, parities, numbers, index):
    parts_of = _parts_of(parities)
    found = {}  # (components, sums, rows): instances
    for number, (source, fields) in enumerate(sources):
        slots = {}
        for row in source.rows:
            if row.group in numbers.place:
                slots.setdefault(row.slot, []).append(row)
        for rows in slots.values():
            for some in _divided(rows, parts_of):
                sums = sorted({s for row in some for s in _sums_of(row, parts_of)})
                first, last = sums[0][0], sums[-1][0]  # only the components that are used
                terms = tuple(tuple((sums.index((int(b), p)), float(c)) for b, h, c in row.terms for p in parts_of[h])
                              for row in some)
                column = int(columns[number]) + first * fields
                places = [numbers.place_of_z(number, row, fields) for row in some]
                key = last - first + 1, tuple((b - first, p) for b, p in sums), terms
                found.setdefault(key, []).append(((column, fields, index.add(places)), places))
    return tuple(_part(key, instances, int(columns[-1]), index) for key, instances in found.items())


def _part(key, instances, channels, index):
    rows = [row for row, _ in instances]
    begins = [number for (column, copies, _), places in instances for number in (column, copies, *np.ravel(places))]
    aligned = int(np.gcd.reduce([channels, *begins, MAX_ALIGNED]))
    return Part(*key, len(rows), index.add(rows), max(copies for _, copies, _ in rows), aligned)


def _parts_of(parities):
    """{harmonic: numbers of its parts}"""
    found = {}
    for p, (h, _) in enumerate(parities):
        found.setdefault(h, []).append(p)
    return found


def _sums_of(row, parts_of):
    return {(int(b), p) for b, h, _ in row.terms for p in parts_of[h]}


def _divided(rows, parts_of):
    """The rows of a slot in parts that fit into registers."""
    part, sums, terms = [], set(), 0
    for row in rows:
        mine = _sums_of(row, parts_of)
        if part and (len(sums | mine) > MAX_SUMS or terms + len(row.terms) > MAX_TERMS):
            yield part
            part, sums, terms = [], set(), 0
        part.append(row)
        sums |= mine
        terms += len(row.terms)
    if part:
        yield part


def _blocks(plan, sources, targets, groups, up):
    """(block, numbers of its source and target, their fields, strides in the weights) of each block."""
    for block in plan.blocks:
        s, t = plan.sources.index(block.source), plan.targets.index(block.target)
        yield block, s, t, sources[s][1], targets[t][1], weight_strides(block, plan.adjoint, groups, up)


def _pack(plan, sources, targets, groups, up, numbers, index, values):
    """Gather of all W from the weights."""
    templates = []
    for block, s, t, s_fields, t_fields, strides in _blocks(plan, sources, targets, groups, up):
        terms = {}
        for group, m, k, path, scale in block.entries:
            terms.setdefault((group, m, k), []).append((block.weights_start + path, *strides, scale))
        for (group, m, k), found in terms.items():
            base, step = numbers.packed_at(s, t, group, m, k, s_fields, t_fields)
            templates.append(((base, step, 1, 0), (s_fields, t_fields), found))
    return _gather(templates, index, values)


def _unpack(plan, sources, targets, groups, up, numbers, index, values):
    """Gather of the weights' gradient from that of all W: the transpose of _pack."""
    templates = []
    for block, s, t, s_fields, t_fields, strides in _blocks(plan, sources, targets, groups, up):
        terms = {path: [] for path in range(block.paths)}
        for group, m, k, path, scale in block.entries:
            base, step = numbers.packed_at(s, t, group, m, k, s_fields, t_fields)
            terms[path].append((base, step, 1, 0, scale))
        templates += [((block.weights_start + path, *strides), (s_fields, t_fields), found)
                      for path, found in terms.items()]
    return _gather(templates, index, values)


def _gather(templates, index, values):
    rows = [(*to, *fields, len(terms), index.add([term[:-1] for term in terms]), values.add([t[-1] for t in terms]))
            for to, fields, terms in templates]
    return Gather(len(rows), index.add(rows), max((s * t for _, (s, t), _ in templates), default=0))
