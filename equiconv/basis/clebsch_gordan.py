"""Clebsch-Gordan coefficients: the irreps in the product of two irreps, and where they lie in it."""
import math

import numpy as np
from escnn.group import O2, O3, SO2, SO3, CyclicGroup, DihedralGroup

from . import so3
from .averaging import embeddings, group_key, haar_rule, irrep_matrices
from .cache import Memory

_products = Memory(4096)


def tensor_product(group, left, right):
    """The irreps in the product of two irreps.

    group        an escnn Group
    left, right  ids of irreps of it

    Returns a tuple of (id of an irrep j, coefficients [d_left, d_right, multiplicity, d_j]), in the order in which
    escnn lists them; coefficients[..., s, :] embeds the s-th copy of j.

    Closed forms for C_N, D_N, SO(2), O(2), SO(3), O(3), averaging for other groups. Raises ValueError where a
    continuous group lacks the irreps to complete the product.
    """
    return _products.get((group_key(group), left, right), lambda: tuple(_tensor_product(group, left, right)))


def _tensor_product(group, left, right):
    if isinstance(group, (CyclicGroup, SO2)):  # escnn's own formulas
        return [(j, np.asarray(group._clebsh_gordan_coeff(left, right, j), dtype=np.float64))
                for j, _ in group._tensor_product_irreps(left, right)]
    if isinstance(group, (DihedralGroup, O2)):
        return _dihedral(left, right, group.rotation_order if isinstance(group, DihedralGroup) else None)
    if isinstance(group, SO3):
        (l1,), (l2,) = left, right
        return [((l,), so3.clebsch_gordan(l1, l2, l)[:, :, None]) for l in range(abs(l1 - l2), l1 + l2 + 1)]
    if isinstance(group, O3):
        (i1, l1), (i2, l2) = left, right
        return [(((i1 + i2) % 2, l), so3.clebsch_gordan(l1, l2, l)[:, :, None])
                for l in range(abs(l1 - l2), l1 + l2 + 1)]
    return _averaged(group, left, right)


def _dihedral(left, right, order):
    """D_N, or O(2) for order None.

    Irreps (0, 0) and (1, 0) are even and odd under the flip; so are (0, N/2) and (1, N/2), which rotations by 2 pi / N
    multiply by -1; (1, k) has the components cos(k phi), which is even, and sin(k phi), which is odd.
    """
    half = order // 2 if order is not None and order % 2 == 0 else None

    def size(irrep):
        return 1 if irrep[1] in (0, half) else 2

    def identify(frequency, coefficients):
        """The irreps of the real and the imaginary part of exp(i frequency phi), from [d_left, d_right, 2]."""
        sign = 1
        if frequency < 0:
            frequency, sign = -frequency, -1
        if order is not None and 2 * frequency > order:
            frequency, sign = order - frequency, -sign
        coefficients = coefficients * np.array([1, sign])
        if size((1, frequency)) == 2:
            return [((1, frequency), coefficients)]
        return [((flip, frequency), coefficients[:, :, flip:flip + 1]) for flip in (0, 1)]

    (flip1, k1), (flip2, k2) = left, right
    if size(left) == size(right) == 1:
        frequency = 0 if k1 == k2 else half
        return [(((flip1 + flip2) % 2, frequency), np.ones((1, 1, 1, 1)))]
    if size(left) == 1 or size(right) == 1:
        # a function of one frequency times 1 or -1; an odd one turns (cos, sin) into (sin, -cos)
        (flip, k), table = (left, np.eye(2)[None]) if size(left) == 1 else (right, np.eye(2)[:, None])
        other = k2 if size(left) == 1 else k1
        if flip:
            table = table @ np.array([[0.0, -1.0], [1.0, 0.0]])
        (irrep, table), = identify(other + k, table)
        return [(irrep, table[:, :, None])]
    found = []
    for sign in (-1, 1):  # exp(i k1 phi) exp(+-i k2 phi)
        table = np.zeros((2, 2, 2))
        table[0, 0, 0], table[1, 1, 0], table[1, 0, 1], table[0, 1, 1] = 1, -sign, 1, sign
        found += identify(k1 + sign * k2, table * math.sqrt(0.5))
    order_of = {j: i for i, j in enumerate([(0, 0), *((1, k) for k in range(k1 + k2 + 1)), (0, half)])}
    return [(j, table[:, :, None]) for j, table in sorted(found, key=lambda item: order_of[item[0]])]


def _averaged(group, left, right):
    irreps = [group.irrep(*i) for i in (left, right)]
    candidates = group.irreps()
    highest = max(frequency(j.id) for j in candidates) if group.order() <= 0 else 0
    bandlimit = sum(frequency(i.id) for i in irreps) + highest
    weights = haar_rule(group, bandlimit)[1]
    a, b = (irrep_matrices(i, bandlimit) for i in irreps)
    whole = np.einsum("gab,gcd->gacbd", a, b).reshape(len(weights), irreps[0].size * irreps[1].size, -1)
    found, missing = [], whole.shape[1]
    for j in candidates:
        copies = embeddings(irrep_matrices(j, bandlimit), whole, weights, j.endomorphism_basis())
        if len(copies):
            found.append((j.id, copies.reshape(len(copies), irreps[0].size, irreps[1].size, j.size)
                          .transpose(1, 2, 0, 3)))
            missing -= len(copies) * j.size
    if missing:
        raise ValueError(f"{group} must have the irreps in the product of {left} and {right}: the ones that are built "
                         f"leave {missing} of {whole.shape[1]} dimensions; build more, with a larger maximum_frequency")
    return found


def frequency(irrep):
    """An upper bound of the frequency of an irrep, from its id."""
    return max((frequency(part) if isinstance(part, tuple) else int(part) for part in irrep), default=0)
