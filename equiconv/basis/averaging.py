"""Intertwiners of any compact group, by averaging over it: a dense solve that gives the same numbers everywhere.

Sums run in extended precision and without BLAS, in one order: neither threads nor instruction sets change the result.
"""
import hashlib
from itertools import product

import numpy as np
from escnn import group as escnn_group

from .cache import Memory, remember

TIE = 1e-6         # candidates whose norms differ by less count as equal, and the first of them is taken
EXHAUSTED = 1e-6   # norm below which no direction is left
ROUNDING = 1e-13   # what is smaller is zero: the noise of escnn's irreps differs from machine to machine

_rules, _irreps = Memory(64), Memory(1024)


def group_key(group):
    """Hashable, equal for equal escnn groups."""
    return type(group).__name__, repr(sorted(group._keys.items()))


def haar_rule(group, bandlimit):
    """(elements, weights) that average exactly over a group.

    group      an escnn Group
    bandlimit  highest total frequency of the averaged products of irreps, if the group is continuous

    Raises ValueError for a continuous group that is none of SO(2), O(2), SO(3), O(3) and their direct products.
    """
    bandlimit = None if group.order() > 0 else bandlimit
    return _rules.get((group_key(group), bandlimit), lambda: _haar_rule(group, bandlimit))


def _haar_rule(group, bandlimit):
    if bandlimit is None:
        elements = list(group.elements)
        return elements, np.full(len(elements), 1 / len(elements))
    count = bandlimit + 1
    angles = [2 * np.pi * k / count for k in range(count)]
    if isinstance(group, escnn_group.SO2):
        return [group.element(a, "radians") for a in angles], np.full(count, 1 / count)
    if isinstance(group, escnn_group.O2):
        elements = [group.element((flip, a), "radians") for flip in (0, 1) for a in angles]
        return elements, np.full(2 * count, 0.5 / count)
    if isinstance(group, (escnn_group.SO3, escnn_group.O3)):
        heights, weights = np.polynomial.legendre.leggauss(bandlimit // 2 + 1)
        inversions = (0, 1) if isinstance(group, escnn_group.O3) else (None,)
        elements, found = [], []
        for flip, a, (z, w), c in product(inversions, angles, zip(heights, weights), angles):
            zyz = np.array([a, np.arccos(z), c])
            elements.append(group.element(zyz if flip is None else (flip, zyz), "ZYZ"))
            found.append(w)
        return elements, np.array(found) / sum(found)
    if isinstance(group, escnn_group.DirectProductGroup):
        (first, v), (second, w) = (haar_rule(g, bandlimit) for g in (group.G1, group.G2))
        return [group.pair_elements(a, b) for a in first for b in second], np.kron(v, w)
    raise ValueError(f"group must be finite, SO(2), O(2), SO(3), O(3) or a direct product of those, got {group}")


def matrices(representation, elements):
    """[n, size, size] float64 of an escnn representation at some elements."""
    return np.stack([np.asarray(representation(g), dtype=np.float64) for g in elements])


def irrep_matrices(irrep, bandlimit):
    """matrices of an irrep at the elements of the haar_rule of its group."""
    bandlimit = None if irrep.group.order() > 0 else bandlimit
    return _irreps.get((group_key(irrep.group), irrep.id, bandlimit),
                       lambda: matrices(irrep, haar_rule(irrep.group, bandlimit)[0]))


def embeddings(irrep, representation, weights, endomorphisms):
    """The copies of an irrep in a representation: E with representation(g) E = E irrep(g) and E^T E = 1.

    irrep           [n, d, d] at the elements of a haar_rule
    representation  [n, D, D] there, orthogonal
    weights         [n]
    endomorphisms   [K, d, d], an orthogonal basis of the matrices that commute with the irrep, the identity first

    Returns [copies, D, d] float64, orthogonal to each other; the choice depends on nothing but the arguments.
    """
    tables = [np.ascontiguousarray(a, dtype=np.float64) for a in (irrep, representation, weights, endomorphisms)]
    key = hashlib.blake2b(b"".join(repr(a.shape).encode() + a.tobytes() for a in tables)).hexdigest()
    return remember(f"embeddings-{key}", lambda: _embeddings(*tables))


def _embeddings(irrep, representation, weights, endomorphisms):
    n, size = len(weights), irrep.shape[-1]
    # The average of g -> rho(g) X irrep(g)^T, for each X with a single one, in the first column: these span all E.
    rho = representation.astype(np.longdouble).reshape(n, -1)
    column = irrep[:, :, 0].astype(np.longdouble) * weights[:, None]
    candidates = np.dot(rho.T, column).reshape(*representation.shape[1:], size)  # [D, D', d]: of candidate D', E [D, d]
    candidates = np.ascontiguousarray(candidates.transpose(1, 0, 2))
    endomorphisms, found = endomorphisms.astype(np.longdouble), []
    while True:
        norms = np.sqrt(np.square(candidates).sum((1, 2)))
        if norms.max() < EXHAUSTED:
            found = np.array(found, dtype=np.float64).reshape(-1, representation.shape[1], size)
            return np.where(np.abs(found) < ROUNDING, 0, found)
        pick = int(np.argmax(norms >= (1 - TIE) * norms.max()))
        embedding = candidates[pick] * (np.sqrt(np.longdouble(size)) / norms[pick])
        found.append(embedding)
        for endomorphism in endomorphisms:
            copy = np.dot(embedding, endomorphism)
            overlap = (candidates * copy).sum((1, 2)) / size
            candidates = candidates - overlap[:, None, None] * copy
