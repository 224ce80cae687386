"""Wigner D matrices for escnn, in the place of lie_learn where that is missing: it has no wheel for Python 3.13."""
import importlib.util
import math
import sys
from functools import cache
from types import ModuleType

import numpy as np

NAME = "lie_learn.representations.SO3.wigner_d"  # what escnn imports, for its one function


def provide():
    """Makes `from lie_learn.representations.SO3.wigner_d import wigner_D_matrix` work without lie_learn."""
    if "lie_learn" in sys.modules or importlib.util.find_spec("lie_learn") is not None:
        return
    parts = NAME.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules[".".join(parts[:i])] = ModuleType(".".join(parts[:i]))
    sys.modules[NAME].wigner_D_matrix = wigner_D_matrix


def wigner_D_matrix(l, alpha, beta, gamma, field="real"):
    """D^l of the rotation by ZYZ Euler angles in the basis of real spherical harmonics, order -l .. l.

    l                   degree, >= 0
    alpha, beta, gamma  in radians

    Returns [2 l + 1, 2 l + 1]. Wigner's sum over factorials: Varshalovich et al., Quantum Theory of Angular Momentum,
    4.3.1 (2); signs with the Condon-Shortley phase. Raises ValueError for a field other than "real".
    """
    if field != "real":
        raise ValueError(f"wigner_D_matrix: field must be 'real', got {field!r}")
    orders = np.arange(-l, l + 1)
    complex_basis = np.exp(1j * alpha * orders)[:, None] * small_d(l, beta) * np.exp(1j * gamma * orders)
    to_real = real_from_complex(l)
    return (to_real @ complex_basis @ to_real.conj().T).real


def small_d(l, beta):
    """d^l(beta) in the basis of complex spherical harmonics, [2 l + 1, 2 l + 1]."""
    cosine, sine = math.cos(beta / 2), math.sin(beta / 2)
    return sum(coefficient * cosine ** power_of_cosine * sine ** power_of_sine
               for coefficient, power_of_cosine, power_of_sine in _terms(l))


@cache
def _terms(l):
    """d^l as a sum over t of coefficient * cos(beta / 2)^p * sin(beta / 2)^q: each a [2 l + 1, 2 l + 1] table."""
    f, n = math.factorial, 2 * l + 1
    tables = [(np.zeros((n, n)), np.zeros((n, n), int), np.zeros((n, n), int)) for _ in range(n)]
    for m in range(-l, l + 1):
        for k in range(-l, l + 1):
            root = math.sqrt(f(l + m) * f(l - m) * f(l + k) * f(l - k))
            for t in range(max(0, k - m), min(l + k, l - m) + 1):
                coefficient, power_of_cosine, power_of_sine = (table[m + l, k + l:k + l + 1] for table in tables[t])
                coefficient[:] = (-1) ** (m - k + t) * root / (f(l + k - t) * f(t) * f(m - k + t) * f(l - m - t))
                power_of_cosine[:], power_of_sine[:] = 2 * l + k - m - 2 * t, m - k + 2 * t
    return tables


@cache
def real_from_complex(l):
    """The unitary matrix [2 l + 1, 2 l + 1] from complex to real spherical harmonics."""
    matrix = np.zeros((2 * l + 1, 2 * l + 1), complex)
    matrix[l, l] = 1
    for m in range(1, l + 1):
        matrix[l - m, [l - m, l + m]] = np.array([1j, -1j * (-1) ** m]) / math.sqrt(2)
        matrix[l + m, [l - m, l + m]] = np.array([1, (-1) ** m]) / math.sqrt(2)
    return matrix
