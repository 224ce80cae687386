"""Clebsch-Gordan coefficients of SO(3) in the real basis, by Racah's formula in integers.

The real basis of frequency l has the harmonics of order -l..l: sin(|m| phi) for m < 0, cos(m phi) for m >= 0.
"""
import math
from fractions import Fraction
from functools import lru_cache

import numpy as np


def complex_coefficient(j1, m1, j2, m2, j, m):
    """<j1 m1 j2 m2 | j m> in Condon and Shortley's phases.

    Racah's formula: D. A. Varshalovich et al., Quantum Theory of Angular Momentum, 8.2.1 (3).
    """
    if m != m1 + m2 or abs(m) > j or not abs(j1 - j2) <= j <= j1 + j2:
        return 0.0
    f = math.factorial
    square = Fraction((2 * j + 1) * f(j1 + j2 - j) * f(j1 - j2 + j) * f(-j1 + j2 + j), f(j1 + j2 + j + 1))
    square *= f(j + m) * f(j - m) * f(j1 - m1) * f(j1 + m1) * f(j2 - m2) * f(j2 + m2)
    total = Fraction(0)
    for k in range(max(0, j2 - j - m1, j1 - j + m2), min(j1 + j2 - j, j1 - m1, j2 + m2) + 1):
        terms = (k, j1 + j2 - j - k, j1 - m1 - k, j2 + m2 - k, j - j2 + m1 + k, j - j1 - m2 + k)
        denominator = 1
        for term in terms:
            denominator *= f(term)
        total += Fraction((-1) ** k, denominator)
    return math.copysign(math.sqrt(square * total * total), total)


def real_to_complex(l):
    """[2l + 1, 2l + 1]: the complex harmonics (rows, m = -l..l) as combinations of the real ones (columns)."""
    change = np.zeros((2 * l + 1, 2 * l + 1), dtype=np.complex128)
    change[l, l] = 1
    for m in range(1, l + 1):
        change[l + m, l + m], change[l + m, l - m] = (-1) ** m * math.sqrt(0.5), (-1) ** m * 1j * math.sqrt(0.5)
        change[l - m, l + m], change[l - m, l - m] = math.sqrt(0.5), -1j * math.sqrt(0.5)
    return change


@lru_cache(maxsize=1024)
def clebsch_gordan(l1, l2, l):
    """[2 l1 + 1, 2 l2 + 1, 2 l + 1]: the copy of frequency l in the product of l1 and l2, in the real basis."""
    table = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l + 1))
    for m1 in range(-l1, l1 + 1):
        for m2 in range(max(-l2, -l - m1), min(l2, l - m1) + 1):
            table[l1 + m1, l2 + m2, l + m1 + m2] = complex_coefficient(l1, m1, l2, m2, l, m1 + m2)
    # plain einsum: no BLAS, whose sums depend on the machine
    real = np.einsum("abc,ax->xbc", table, real_to_complex(l1))
    real = np.einsum("xbc,by->xyc", real, real_to_complex(l2))
    real = np.einsum("xyc,cz->xyz", real, real_to_complex(l).conj())
    result = np.ascontiguousarray(real.real if (l1 + l2 + l) % 2 == 0 else real.imag)
    result.setflags(write=False)
    return result
