"""How much arithmetic the stages of a factorised plan need."""
from dataclasses import dataclass
from math import prod

import numpy as np

from .complex_products import ROWS, with_complex_products
from .conv_tables import folded_phases, three_axes


@dataclass(frozen=True)
class Work:
    """Multiplications for one pixel of the target, in all groups of the convolution together; and sizes.

    harmonics   folded harmonics of every component, averaged over the phases of a strided layer
    combining   the sums of z, where it is not one harmonic
    transforms  A and A', where they are not the identity
    mixing      the matrix products, complex ones in three real products
    products    the same, complex ones in four
    packed      elements of the matrices W
    entries     of the blocks, that are added up in them
    z, y        numbers of z and of y^
    """
    harmonics: float
    combining: float
    transforms: float
    mixing: float
    products: float
    packed: int
    entries: int
    z: int
    y: int

    @property
    def pointwise(self):
        """All but the matrix products."""
        return self.harmonics + self.combining + self.transforms

    @property
    def multiplications(self):
        return self.pointwise + self.mixing


def work_of(plan, kernel, stride, dilation, groups, up):
    """Work of a FactorisedPlan in a convolution of that shape (see Geometry)."""
    plan = with_complex_products(plan)
    in_source, in_target = (groups, 1) if up else (1, groups)  # what a side's fields are divided by
    sources = [(len(s.fields) // in_source, s) for s in plan.sources]
    targets = [(len(t.fields) // in_target, t) for t in plan.targets]
    phases = [_costs(classes, len(plan.harmonics)) for _, classes in folded_phases(
        plan.harmonics, *map(three_axes, (kernel, stride, dilation)), up)]
    harmonics = sum(fields * sum(_harmonics(source, phase) for phase in phases) / len(phases)
                    for fields, source in sources)
    combining = sum(fields * sum(len(row.terms) for row in source.rows if not _is_harmonic(row))
                    for fields, source in sources)
    transforms = sum(fields * side.transform.size for fields, side in (*sources, *targets)
                     if not np.array_equal(side.transform, np.eye(len(side.transform))))
    shapes = [(size, sum(n * s.depth.get(g, 0) for n, s in sources), sum(n * t.height.get(g, 0) for n, t in targets),
               g in plan.complex) for g, size in enumerate(plan.components)]
    products = sum((4 if is_complex else size) * depth * height for size, depth, height, is_complex in shapes)
    mixing = sum((ROWS if is_complex else size) * depth * height for size, depth, height, is_complex in shapes)
    packed = sum((ROWS if is_complex else 1) * depth * height for _, depth, height, is_complex in shapes)
    entries = sum(len(block.entries) * block.out_fields * block.in_fields for block in plan.blocks)
    return Work(groups * harmonics, groups * combining, groups * transforms, groups * mixing, groups * products,
                groups * packed, entries,
                groups * sum(size * depth for size, depth, *_ in shapes),
                groups * sum(size * height for size, _, height, _ in shapes))


def dense_work(plan, stride, up):
    """Multiplications of the dense convolution with a FilterPlan's filter, for one pixel of its output."""
    return plan.out_channels * plan.in_channels * plan.taps / (prod(stride) if up else 1)


def _costs(classes, count):
    """[(harmonics of a class as a mask, multiplications)]"""
    found = []
    for c in classes:
        mask = np.zeros(count, bool)
        mask[[*c.even, *c.odd]] = True
        pairs = sum(len(p.outer) == 2 for p in c.positions)
        found.append((mask, len(c.positions) * len(c.even) + pairs * len(c.odd)))
    return found


def _harmonics(source, costs):
    """Of one field: a class is computed for a component where one of its harmonics is used."""
    used = {}
    for row in source.rows:
        for component, harmonic, _ in row.terms:
            used.setdefault(component, set()).add(harmonic)
    return sum(cost for harmonics in used.values() for mask, cost in costs if mask[list(harmonics)].any())


def _is_harmonic(row):
    return len(row.terms) == 1 and row.terms[0][2] == 1
