"""Harmonics that are even or odd along an axis need half the taps: mirrored taps are added or subtracted first."""
from dataclasses import dataclass
from itertools import product

import numpy as np

from .harmonics import NOISE


@dataclass(frozen=True)
class Position:
    """Taps that are added up before a harmonic is applied, by their numbers along (outer, middle, inner).

    Along an axis, a pair of numbers (j, j') are mirrored taps, and a single one (j,) stands for itself.
    """
    outer: tuple
    middle: tuple
    inner: tuple


@dataclass(frozen=True)
class FoldClass:
    """Harmonics of one parity along the inner and the middle axis, even and odd ones along the outer axis.

    even, odd           indices of the harmonics
    inner_odd, middle_odd   whether mirrored taps are subtracted along these axes
    positions           list of Position; odd harmonics have no part at those that are single along the outer axis
    coefficients        [positions, even + odd]
    """
    even: tuple
    odd: tuple
    inner_odd: bool
    middle_odd: bool
    positions: tuple
    coefficients: np.ndarray


def fold(harmonics, kernel, taps):
    """FoldClasses that compute every harmonic from some of the taps (all of them, or one phase of a strided layer).

    harmonics  [R, S], S the product of kernel; symmetrised
    kernel     (outer, middle, inner) numbers of taps
    taps       for each axis the numbers of the taps that take part
    """
    grid = harmonics.reshape(-1, *kernel)[np.ix_(range(len(harmonics)), *taps)]  # [R, outer, middle, inner]
    symmetric = [list(t) == [k - 1 - j for j in reversed(t)] for t, k in zip(taps, kernel)]
    parities = [_parities(h) if all(symmetric) else None for h in grid]
    classes = {}
    for r, parity in enumerate(parities):
        classes.setdefault(parity and parity[1:], ([], []))[bool(parity and parity[0])].append(r)
    return [_plain(grid, taps, even) if parity is None else _folded(grid, taps, parity, even, odd)
            for parity, (even, odd) in classes.items()]


def symmetrise(harmonics, kernel):
    """Harmonics [R, S] that are even or odd along every axis up to noise, made exactly so; the others as they are."""
    grid = harmonics.reshape(-1, *kernel).copy()
    for h in grid:
        for axis, odd in enumerate(_parities(h) or ()):
            h[:] = (h - np.flip(h, axis)) / 2 if odd else (h + np.flip(h, axis)) / 2
    return grid.reshape(harmonics.shape)


def point_symmetrise(harmonics):
    """(harmonics, parities [R]): +1 even, -1 odd, 0 neither, when the taps are reversed; even and odd ones exactly so.

    harmonics  [R, S]; reversing the S taps of a grid reflects it in its centre
    """
    mirrored = harmonics[:, ::-1]
    limit = 10 * NOISE * np.abs(harmonics).max(1, initial=0)
    even, odd = (np.abs(harmonics - sign * mirrored).max(1, initial=0) <= limit for sign in (1, -1))
    parities = np.where(even, 1, np.where(odd, -1, 0))
    return np.where(parities[:, None], (harmonics + parities[:, None] * mirrored) / 2, harmonics), parities


def _parities(h):
    """For each axis whether h is odd; None unless it is either even or odd along every axis."""
    found, limit = [], 10 * NOISE * np.abs(h).max(initial=0)
    for axis in range(h.ndim):
        mirrored = np.flip(h, axis)
        if np.abs(h - mirrored).max(initial=0) <= limit:
            found.append(False)
        elif np.abs(h + mirrored).max(initial=0) <= limit:
            found.append(True)
        else:
            return None
    return tuple(found)


def _plain(grid, taps, harmonics):
    positions = tuple(Position((o,), (m,), (i,)) for o, m, i in product(*taps))
    return FoldClass(tuple(harmonics), (), False, False, positions, grid[harmonics].reshape(len(harmonics), -1).T)


def _folded(grid, taps, parity, even, odd):
    middle_odd, inner_odd = parity
    positions, coefficients = [], []
    for at in product(*(range((len(t) + 1) // 2) for t in taps)):
        mirrored = [len(t) - 1 - j for t, j in zip(taps, at)]
        outer, middle, inner = ((t[j],) if j == m else (t[j], t[m]) for t, j, m in zip(taps, at, mirrored))
        if (middle_odd and len(middle) == 1) or (inner_odd and len(inner) == 1):
            continue  # an odd function is zero there
        positions.append(Position(outer, middle, inner))
        coefficients.append(grid[(even + odd, *at)])
    return FoldClass(tuple(even), tuple(odd), inner_odd, middle_odd, tuple(positions),
                     np.array(coefficients).reshape(len(positions), len(even) + len(odd)))
