"""Irreps whose two components are a complex number: their matrix products in three real products instead of four.

Those of C_N and SO(2) are such: each weight is the real or the imaginary part of a complex one, which multiplies
z = c + i d. With w = a + i b (Gauss's three multiplications; Knuth, The Art of Computer Programming, 4.6.4)

    Re wz = a (c + d) - (a + b) d        Im wz = a (c + d) + (b - a) c
"""
from collections import defaultdict
from dataclasses import replace

from .factorised import ROUNDING

ROWS = 3  # of real weights for each k of a complex product: those of c + d, of c, and of d
REAL, IMAGINARY = ((0, 1), (1, -1), (2, -1)), ((1, 1), (2, -1))  # (row, factor) of a part of w


def with_complex_products(plan):
    """The FactorisedPlan with `complex` groups, where it can have such: half as many k's and m's, of components (c, d).

    The entries of a complex group are those of its real weights [ROWS * k + row, m].
    """
    found = {g: pairs for g in range(len(plan.components)) if (pairs := _pairs(plan, g)) is not None}
    if not found:
        return plan
    sources = {id(s): replace(
        s, rows=[_paired_row(row, found[row.group][id(s)]) if row.group in found else row for row in s.rows],
        depth={g: depth // 2 if g in found else depth for g, depth in s.depth.items()}) for s in plan.sources}
    targets = {id(t): replace(
        t, places={i: (g, m // 2, m % 2) if g in found else (g, m, a) for i, (g, m, a) in t.places.items()},
        height={g: height // 2 if g in found else height for g, height in t.height.items()}) for t in plan.targets}
    blocks = [replace(b, source=sources[id(b.source)], target=targets[id(b.target)], entries=_entries(b, found))
              for b in plan.blocks]
    return replace(plan, components=[2 if g in found else size for g, size in enumerate(plan.components)],
                   sources=list(sources.values()), targets=list(targets.values()), blocks=blocks,
                   complex=frozenset(found))


def _pairs(plan, group):
    """{id(source): {k: (pair, 0 or 1)}}, where the z's of a pair are c and d; None if there are no such pairs.

    The rows of y^ come as (Re, Im) of one irrep after the other, if the group has such irreps.
    """
    sizes = {slot.size for t in plan.targets for slot in t.fields.layout.slots if t.places[slot.start][0] == group}
    if sizes != {2} or plan.components[group] != 1:
        return None
    numbers = {id(source): {} for source in plan.sources}
    for block in plan.blocks:
        known = numbers[id(block.source)]
        for terms in _products(block, group).values():
            pair = _ordered(terms)
            if pair is None or [known.setdefault(k, (pair, i)) for i, k in enumerate(pair)] != [(pair, 0), (pair, 1)]:
                return None
    for source in plan.sources:
        known = numbers[id(source)]
        order = {pair: number for number, pair in enumerate(sorted({pair for pair, _ in known.values()}))}
        if len(known) != source.depth.get(group, 0):
            return None
        numbers[id(source)] = {k: (order[pair], i) for k, (pair, i) in known.items()}
    return numbers


def _products(block, group):
    """{(m // 2, path): {m % 2: (k, scale)}} of one group; some entries of a component make it None."""
    found = defaultdict(dict)
    for g, m, k, path, scale in block.entries:
        if g == group:
            known = found[m // 2, path]
            known[m % 2] = None if m % 2 in known else (k, scale)
    return found


def _ordered(terms):
    """(k of c, k of d) such that a path, y^[a] = scale z[k], is a real or imaginary number times c + i d; or None."""
    if len(terms) != 2 or None in terms.values():
        return None
    (k, scale), (other, scale_of_other) = terms[0], terms[1]
    if k == other or abs(abs(scale) - abs(scale_of_other)) > ROUNDING * abs(scale):
        return None
    return (k, other) if scale * scale_of_other > 0 else (other, k)


def _paired_row(row, numbers):
    pair, component = numbers[row.k]
    return replace(row, k=pair, component=component)


def _entries(block, found):
    """Those of other groups as they are; of complex ones, from Re y^ = a c (real) or -b d (imaginary)."""
    entries = []
    for g, m, k, path, scale in block.entries:
        if g not in found:
            entries.append((g, m, k, path, scale))
        elif m % 2 == 0:
            pair, is_imaginary = found[g][id(block.source)][k]
            parts, part = (IMAGINARY, -scale) if is_imaginary else (REAL, scale)
            entries += [(g, m // 2, ROWS * pair + row, path, factor * part) for row, factor in parts]
    return entries
