"""A FactorisedPlan as flat tables, which is how the kernels of steerable_conv read it.

One int32 tensor holds records of named numbers, each a struct of the same name and order in csrc/steerable_conv.h. What
ends in "_start" says where something begins in that tensor, or in `values`.
"""
from itertools import product
from math import ceil

import numpy as np

from .complex_products import with_complex_products
from .flat_table import PADDING, FlatTable
from .folding import fold

HEADER = (
    "harmonics",                              # R
    "groups", "groups_start",
    "sources", "sources_start",
    "targets", "targets_start",
    "blocks", "blocks_start",
    "phases", "phases_start",
)
GROUP = ("components", "complex")             # complex: layout.complex_products
SOURCE = (
    "size", "fields", "channels_start",       # fields of one group of the convolution
    "transform_start",                        # in values: A [size, size]; -1 for the identity
    "slots", "slots_start",
    "depth_start",                            # [groups]
)
SLOT = (
    "component", "size",                      # of an irrep in the field
    "rows", "rows_start",
    "uses_start",                             # [size, R]: UNUSED, SHARED, or the number of the only row, which equals u
)
UNUSED, SHARED = -1, -2
ROW = ("group", "k", "component", "terms", "terms_start", "coefficients_start")  # terms: (component in the slot, h)
TARGET = (
    "size", "fields", "channels_start",
    "transform_start",                        # in values: A' [size, size]; -1 for the identity
    "places_start",                           # [size, 3]: (group, m, a)
    "height_start",                           # [groups]
    "adds",
)
BLOCK = (
    "source", "target",
    "weights_start", "paths",
    "stride_source", "stride_target", "stride_group",   # in weights, to the next field, to the next group of fields
    "entries", "entries_start", "scales_start",         # (group, m, row of weights, path)
)
PHASE = (                                     # the positions that take part in some of the taps: see layout.Geometry
    "outer", "middle", "inner",               # residue of p + padding modulo stride, if up
    "single", "single_start",                 # j along the inner axis: each has a plane
    "pairs", "pairs_start",                   # (j, j') along the inner axis: then come planes of sum, difference
    "classes", "classes_start",
)
CLASS = (
    "even", "odd", "harmonics_start",
    "middle_odd",
    "positions", "positions_start",
    "coefficients_start",                     # in values: [position, even (+ odd, if a pair along the outer axis)]
)
POSITION = ("plane", "outer", "outer_mirrored", "middle", "middle_mirrored")  # -1: not mirrored
MAX_EVEN, MAX_ODD = 8, 4                      # harmonics of a class that are computed together
MAX_TERMS = 1024                              # of a row; also components of a field


def conv_tables(plan, kernel, stride, dilation, groups, up):
    """(index int32, values float64) tensors of a FactorisedPlan for a convolution of that shape.

    kernel, stride, dilation  tuples over the axes
    """
    plan = with_complex_products(plan)
    index, values = FlatTable(np.int32), FlatTable(np.float64)
    index.reserve(len(HEADER))
    records = dict(
        sources=[_source(s, plan, index, values, groups if up else 1) for s in plan.sources],
        targets=[_target(t, plan, index, values, 1 if up else groups) for t in plan.targets],
        blocks=[_block(b, plan, index, values, groups, up) for b in plan.blocks],
        phases=_phases(plan.harmonics, three_axes(kernel), three_axes(stride), three_axes(dilation), up, index, values))
    records["groups"] = [_record(GROUP, components=components, complex=int(g in plan.complex))
                         for g, components in enumerate(plan.components)]
    header = dict(harmonics=len(plan.harmonics))
    for name, rows in records.items():
        header.update({name: len(rows), f"{name}_start": index.add(rows)})
    index.fill(0, [header[name] for name in HEADER])
    return index.tensor(), values.tensor(PADDING)


def too_large(plan):
    """Why the kernels cannot take that FactorisedPlan, or None."""
    size = max(fields.fields.layout.size for fields in (*plan.sources, *plan.targets))
    terms = max((len(row.terms) for source in plan.sources for row in source.rows), default=0)
    if max(size, terms) <= MAX_TERMS:
        return None
    return f"at most {MAX_TERMS} components of a field and terms of a sum are supported, got {size} and {terms}"


def three_axes(axes):
    """A tuple over the axes as (outer, middle, inner): in the plane, there is no middle."""
    return (axes[0], 1, axes[1]) if len(axes) == 2 else tuple(axes)


def _record(names, **values):
    return [values[name] for name in names]


def _transform(matrix, values):
    return -1 if (matrix == np.eye(len(matrix))).all() else values.add(matrix)


def _source(source, plan, index, values, groups):
    slots = {}
    for row in source.rows:
        slots.setdefault(row.slot, []).append(row)
    return _record(
        SOURCE, size=source.fields.layout.size, fields=len(source.fields) // groups,
        channels_start=index.add(source.fields.channels), transform_start=_transform(source.transform, values),
        slots=len(slots),
        slots_start=index.add([_slot(slot, rows, plan, index, values) for slot, rows in slots.items()]),
        depth_start=index.add([source.depth.get(g, 0) for g in range(len(plan.components))]))


def _slot(slot, rows, plan, index, values):
    uses = np.full((slot.size, len(plan.harmonics)), UNUSED)
    for r, row in enumerate(rows):
        for b, h, coefficient in row.terms:
            alone = len(row.terms) == 1 and coefficient == 1 and uses[b - slot.start, h] == UNUSED
            uses[b - slot.start, h] = r if alone else SHARED
    direct = set(uses[uses >= 0])
    records = [_record(ROW, group=row.group, k=row.k, component=row.component, terms=len(row.terms),
                       terms_start=index.add([(b - slot.start, h) for b, h, _ in row.terms]),
                       coefficients_start=values.add([c for *_, c in row.terms]))
               for r, row in enumerate(rows)]
    order = sorted(range(len(rows)), key=lambda r: r in direct)  # first those that must be combined
    place = {r: i for i, r in enumerate(order)}
    uses = np.vectorize(lambda use: place.get(use, use))(uses)
    return _record(SLOT, component=slot.start, size=slot.size, rows=len(rows) - len(direct),
                   rows_start=index.add([records[r] for r in order]), uses_start=index.add(uses))


def _target(target, plan, index, values, groups):
    size = target.fields.layout.size
    return _record(
        TARGET, size=size, fields=len(target.fields) // groups, channels_start=index.add(target.fields.channels),
        transform_start=_transform(target.transform, values),
        places_start=index.add([target.places[i] for i in range(size)]),
        height_start=index.add([target.height.get(g, 0) for g in range(len(plan.components))]), adds=int(target.adds))


def _block(block, plan, index, values, groups, up):
    to_source, to_target, to_group = weight_strides(block, plan.adjoint, groups, up)
    return _record(
        BLOCK, source=plan.sources.index(block.source), target=plan.targets.index(block.target),
        weights_start=block.weights_start, paths=block.paths,
        stride_source=to_source, stride_target=to_target, stride_group=to_group, entries=len(block.entries),
        entries_start=index.add([entry[:4] for entry in block.entries]),
        scales_start=values.add([entry[4] for entry in block.entries]))


def weight_strides(block, adjoint, groups, up):
    """Steps in w [out_fields, in_fields, paths] to the next field of the source, of the target, to the next group."""
    to_out, to_in = block.in_fields * block.paths, block.paths
    group_of_out = up == adjoint  # which side has the fields of all groups
    fields, step = (block.out_fields, to_out) if group_of_out else (block.in_fields, to_in)
    return (to_out, to_in, fields // groups * step) if adjoint else (to_in, to_out, fields // groups * step)


def folded_phases(harmonics, kernel, stride, dilation, up):
    """(residue, FoldClasses) of each phase of the target's positions; all of (outer, middle, inner)."""
    for residue in product(*(range(s) for s in stride)) if up else [(0, 0, 0)]:
        taps = [[j for j in range(k) if not up or j * d % s == r]
                for k, s, d, r in zip(kernel, stride, dilation, residue)]
        yield residue, fold(harmonics, kernel, taps)


def _phases(harmonics, kernel, stride, dilation, up, index, values):
    found = []
    for residue, folded in folded_phases(harmonics, kernel, stride, dilation, up):
        classes = [part for c in folded for part in _parts(c)]
        taps = {p.inner for c in classes for p in c.positions}
        single, pairs = (sorted(t for t in taps if len(t) == length) for length in (1, 2))
        found.append(_record(
            PHASE, outer=residue[0], middle=residue[1], inner=residue[2],
            single=len(single), single_start=index.add(single), pairs=len(pairs), pairs_start=index.add(pairs),
            classes=len(classes), classes_start=index.add([_class(c, single, pairs, index, values) for c in classes])))
    return found


def _parts(c):
    """The class as several of at most MAX_EVEN and MAX_ODD harmonics."""
    parts = max(ceil(len(c.even) / MAX_EVEN), ceil(len(c.odd) / MAX_ODD), 1)
    for even, odd in zip(np.array_split(np.arange(len(c.even)), parts), np.array_split(np.arange(len(c.odd)), parts)):
        yield type(c)(tuple(np.array(c.even)[even]), tuple(np.array(c.odd, int)[odd]), c.inner_odd, c.middle_odd,
                      c.positions, c.coefficients[:, np.concatenate([even, len(c.even) + odd]).astype(int)])


def _class(c, single, pairs, index, values):
    order = sorted(range(len(c.positions)), key=lambda p: (len(c.positions[p].outer), len(c.positions[p].middle)))
    positions, coefficients = [], []
    for p in order:
        position, row = c.positions[p], c.coefficients[p]
        plane = (single.index(position.inner) if len(position.inner) == 1
                 else len(single) + 2 * pairs.index(position.inner) + c.inner_odd)
        positions.append((plane, *_pair(position.outer), *_pair(position.middle)))
        coefficients.append(row if len(position.outer) == 2 else row[:len(c.even)])
    return _record(
        CLASS, even=len(c.even), odd=len(c.odd), harmonics_start=index.add([*c.even, *c.odd]),
        middle_odd=int(c.middle_odd), positions=len(order), positions_start=index.add(positions),
        coefficients_start=values.add(np.concatenate([*coefficients, []])))


def _pair(taps):
    return taps if len(taps) == 2 else (taps[0], -1)
