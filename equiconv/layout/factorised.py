"""A layer's filter plan as the factorised convolution computes it, one stage after the other.

    x^[b]     = (A x)[b]                      of each field of the source: A changes its basis to irreps
    u[b, h]   = x^[b] * H[h]                  R scalar harmonics of each component
    z[k, a]   = sum_(b,h) T[k, a, b, h] u[b, h]
    y^[m, a]  = sum_k W[m, k] z[k, a]         for each group, that is, each irrep of the target: a matrix product
    y         = A' y^                         of each field of the target: A' changes its basis from irreps

Forward, the source is the layer's input and the target its output. In the adjoint, which gives the gradient with
respect to the input, it is the other way round.
"""
from dataclasses import dataclass, field

import numpy as np

from .folding import symmetrise
from .representations import FieldsOf

ROUNDING = 1e-10  # relative differences below this come from float64


@dataclass(frozen=True)
class Row:
    """z[k, component] of a field, in a group: the sum of coefficient * u[b, h] over its terms (b, h, coefficient)."""
    slot: object  # the irrep that the components b belong to
    group: int
    k: int
    component: int
    terms: tuple


@dataclass
class Source:
    """Fields of one representation of the source; depth[g] is the number of k's that each of them has in group g."""
    fields: FieldsOf
    transform: np.ndarray  # A [size, size]
    rows: list = field(default_factory=list)
    depth: dict = field(default_factory=dict)


@dataclass
class Target:
    """Fields of one representation of the target; height[g] is the number of m's that each of them has in group g.

    places[i]  (group, m, a) where component i of y^ lies
    adds       whether an earlier target has the same fields, so that this one is added to it
    """
    fields: FieldsOf
    transform: np.ndarray  # A' [size, size]
    adds: bool
    places: dict = field(default_factory=dict)
    height: dict = field(default_factory=dict)


@dataclass
class Block:
    """The weights between the fields of a source and those of a target: w [out_fields, in_fields, paths].

    entries  [(group, m, k, path, scale)], within one field each: W[m, k] is the sum of scale * w[path]
    """
    source: Source
    target: Target
    weights_start: int
    paths: int
    out_fields: int
    in_fields: int
    entries: list = field(default_factory=list)


@dataclass
class FactorisedPlan:
    """What the stages need. components[g] is the number of a's of group g.

    complex  groups whose a's are the real and the imaginary part (see layout.complex_products)
    """
    harmonics: np.ndarray  # [R, S]
    components: list
    sources: list
    targets: list
    blocks: list
    adjoint: bool
    complex: frozenset = frozenset()


@dataclass(frozen=True)
class _Kernel:
    """T [d_target, d_source, R] of one path, between two slots."""
    block: Block
    path: int
    target_slot: object
    source_slot: object
    coefficients: np.ndarray


def factorise(plan, kernel, adjoint=False):
    """FactorisedPlan of a layout.FilterPlan whose taps form a grid of shape `kernel`."""
    sources, targets, blocks, kernels, weights = {}, {}, [], [], 0
    norms = _balanced(plan)
    for pair in plan.pairs:
        source_fields, target_fields = pair.in_fields, pair.out_fields
        into, back = source_fields.layout.change_of_basis_inv, target_fields.layout.change_of_basis
        if adjoint:
            source_fields, target_fields = target_fields, source_fields
            into, back = source_fields.layout.change_of_basis.T, target_fields.layout.change_of_basis_inv.T
        known = any(t.fields.channels == target_fields.channels for t in targets.values())
        if pair.paths or not known:
            target = targets.setdefault(_key(target_fields), Target(target_fields, back, known))
        if pair.paths:
            source = sources.setdefault(_key(source_fields), Source(source_fields, into))
            block = Block(source, target, weights, len(pair.paths), len(pair.out_fields), len(pair.in_fields))
            blocks.append(block)
            kernels += [_Kernel(block, p, path.in_slot, path.out_slot, path.coefficients.transpose(1, 0, 2) / norms)
                        if adjoint else _Kernel(block, p, path.out_slot, path.in_slot, path.coefficients / norms)
                        for p, path in enumerate(pair.paths)]
            weights += len(pair.paths) * len(pair.out_fields) * len(pair.in_fields)
    components = []
    for irrep in dict.fromkeys(_irrep(t.fields, slot) for t in targets.values() for slot in t.fields.layout.slots):
        mine = [k for k in kernels if _irrep(k.block.target.fields, k.target_slot) == irrep]
        components.append(_add_group(len(components), irrep, mine, targets.values()))
    for source in sources.values():
        source.rows.sort(key=lambda row: row.slot.start)  # those of one irrep together: they share the u's
    return FactorisedPlan(symmetrise(plan.harmonics, kernel) * norms[:, None], components, list(sources.values()),
                          list(targets.values()), blocks, adjoint)


def _balanced(plan):
    """[R] factors of the harmonics that give those of a kernel equal coefficients, as cos and sin of one angle have.

    The kernels of the smallest irreps decide, which hold the fewest harmonics.
    """
    factors = np.zeros(len(plan.harmonics))
    for path in sorted((path for pair in plan.pairs for path in pair.paths), key=lambda p: p.coefficients.size):
        largest = np.abs(path.coefficients).max((0, 1))
        known, new = (factors > 0) & (largest > 0), (factors == 0) & (largest > 0)
        scale = (largest[known] / factors[known]).max() if known.any() else largest.max(initial=0)
        factors[new] = largest[new] / scale
    return np.where(factors > 0, factors, 1)


def _key(fields):
    return fields.channels, fields.layout.slots[0].irrep is None  # an opaque layout has its own components


def _irrep(fields, slot):
    return slot.irrep if slot.irrep is not None else fields.layout.name


def _add_group(group, irrep, kernels, targets):
    """Adds the rows, places and entries of one irrep of the target; returns its number of components a.

    A z that serves several paths is computed once. Where the components of the irrep share their z's, as those of the
    complex irreps of C_N and SO(2) do, each component is an m of its own: as many products, with fewer z's.
    """
    whole, split = _Distinct(), _Distinct()
    size = next(slot.size for t in targets for slot in t.fields.layout.slots if _irrep(t.fields, slot) == irrep)
    of_whole = [[(0, *whole.add(k, k.coefficients))] for k in kernels]
    of_split = [[(a, *split.add(k, k.coefficients[a:a + 1])) for a in range(size) if k.coefficients[a].any()]
                for k in kernels]
    is_split = len(split) <= len(whole)
    components, distinct = (1, split) if is_split else (size, whole)
    for target in targets:
        slots = [slot for slot in target.fields.layout.slots if _irrep(target.fields, slot) == irrep]
        target.height[group] = len(slots) * size // components
        for copy, slot in enumerate(slots):
            for a in range(size):
                target.places[slot.start + a] = (group, copy * size + a, 0) if is_split else (group, copy, a)
    for source, tensors in distinct.of_source():
        source.depth[group] = len(tensors)
        source.rows += [Row(slot, group, k, a, tuple((slot.start + b, int(h), row[b, h]) for b, h in np.argwhere(row)))
                        for k, (slot, tensor) in enumerate(tensors) for a, row in enumerate(tensor)]
    for kernel, found in zip(kernels, of_split if is_split else of_whole):
        first = kernel.block.target.places[kernel.target_slot.start][1]
        kernel.block.entries += [(group, first + a, k, kernel.path, scale) for a, k, scale in found]
    return components


class _Distinct:
    """The tensors T of each source, up to a factor: their largest element is 1."""

    def __init__(self):
        self.sources, self.tensors = {}, {}

    def __len__(self):
        return sum(map(len, self.tensors.values()))

    def add(self, kernel, tensor):
        """(number among the tensors of the source, factor)"""
        source, slot = kernel.block.source, kernel.source_slot
        size = np.abs(tensor)
        scale = tensor.flat[np.argmax(size > (1 - ROUNDING) * size.max())]
        unit = tensor / scale
        known = self.tensors.setdefault(id(source), [])
        self.sources[id(source)] = source
        for k, (its_slot, other) in enumerate(known):
            if its_slot == slot and np.abs(unit - other).max() <= ROUNDING * np.abs(other).max():
                return k, scale
        known.append((slot, unit))
        return len(known) - 1, scale

    def of_source(self):
        return [(self.sources[key], tensors) for key, tensors in self.tensors.items()]
