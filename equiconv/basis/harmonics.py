"""Steerable scalar functions on the plane, in space, on an orbit and at a point: the harmonics of the kernels.

Each class has

    group, subgroup_id   the group whose irreps the functions transform by, and the id in it of the symmetry group
                         (None: the group itself)
    js                   [(irrep id, multiplicity)], in the order of escnn
    key                  hashable, equal for equal functions
    sample(points)       {irrep id: [multiplicity, d_irrep, S]} float64, for points [S, dimensions]
    attributes(j)        what escnn says of each of the functions of one irrep: a list of dicts

Sums and elementary functions are evaluated one by one, in float64, so that every machine finds the same bits.
"""
import math

import numpy as np
from escnn.group import o2_group, o3_group

from .averaging import embeddings, matrices
from .restriction import subgroup_key

ORIGIN = 1e-9  # below this radius only frequency 0 is not zero


class Rings:
    """Gaussian rings exp(-(r - radius)^2 / (2 sigma^2)), in float32 as escnn keeps them.

    radii, sigmas  lists of numbers
    """

    def __init__(self, radii, sigmas):
        self.radii, self.sigmas = ([float(np.float32(v)) for v in values] for values in (radii, sigmas))

    def __len__(self):
        return len(self.radii)

    def sample(self, r):
        """[rings, S] at radii r [S]."""
        return np.array([[math.exp(-0.5 * ((x - radius) / sigma) ** 2) for x in r.tolist()]
                         for radius, sigma in zip(self.radii, self.sigmas)])


class _Harmonics:
    """What pickles of any harmonics: all but the group, which is needed to build kernels only."""

    def __getstate__(self):
        return {**self.__dict__, "group": None, "subgroup_id": None}

    def attributes(self, j):
        return self._attributes[j]


class _Shells(_Harmonics):
    """Rings times angular functions up to a frequency."""

    def __init__(self, group, subgroup_id, rings, max_frequency):
        self.group, self.subgroup_id, self.rings, self.max_frequency = group, subgroup_id, rings, max_frequency
        self.js = [(self.irrep(f), len(rings)) for f in range(max_frequency + 1)]
        self.key = (type(self).__name__, subgroup_key(subgroup_id), tuple(rings.radii), tuple(rings.sigmas),
                    max_frequency)
        self._attributes = {j: self._describe(j) for j, _ in self.js}

    def sample(self, points):
        points = np.asarray(points, dtype=np.float64)
        r = np.sqrt(np.square(points).sum(1))
        away = r > ORIGIN
        unit = np.where(away[:, None], points / np.where(away, r, 1)[:, None], 0)
        rings = self.rings.sample(r)
        found = {}
        for frequency, values in enumerate(self.angular(unit)):  # [d, S]
            values = values if frequency == 0 else np.where(away, values, 0)
            found[self.irrep(frequency)] = rings[:, None] * values[None]
        return found

    def _describe(self, j):
        frequency = j[1]
        shared = _irrep_attributes(self.group, j)
        return [{**shared, "radius": radius, "sigma": sigma, "idx": frequency * len(self.rings) + ring,
                 "radial_idx": ring, "j": j, "shape": (1, 1)}
                for ring, (radius, sigma) in enumerate(zip(self.rings.radii, self.rings.sigmas))]


class CircularShells(_Shells):
    """Rings times cos and sin of multiples of the angle from an axis, on the plane; irreps of O(2)."""

    def __init__(self, rings, max_frequency, axis, subgroup_id=None):
        self.axis = axis
        super().__init__(o2_group(max_frequency), subgroup_id, rings, max_frequency)
        self.key += (axis,)

    @staticmethod
    def irrep(frequency):
        return (int(frequency > 0), frequency)

    def angular(self, unit):
        a, b = (0.0 if abs(v) < 1e-15 else v for v in (math.cos(self.axis), math.sin(self.axis)))
        x, y = unit[:, 0] * a + unit[:, 1] * b, unit[:, 1] * a - unit[:, 0] * b
        return [np.ones((1, len(unit))), *(np.stack(p) for p in _powers(x, y, self.max_frequency)[1:])]


class SphericalShells(_Shells):
    """Rings times spherical harmonics; irreps of O(3)."""

    def __init__(self, rings, max_frequency, subgroup_id=None):
        super().__init__(o3_group(max_frequency), subgroup_id, rings, max_frequency)

    @staticmethod
    def irrep(frequency):
        return (frequency % 2, frequency)

    def angular(self, unit):
        return spherical_harmonics(unit, self.max_frequency)


class Orbit(_Harmonics):
    """Gaussian bumps around the points of one orbit of a finite group in space.

    group   escnn Group with a standard_representation
    X       its homogeneous space of the orbit: escnn HomSpace
    root    [3], the point of the orbit that the stabiliser fixes
    sigma   width of the bumps
    radius  what the attributes say of the orbit
    scale   factor of all points
    """

    subgroup_id = None

    def __init__(self, X, root, sigma, radius, scale):
        self.group, self.sigma = X.G, sigma
        elements, stabilizer = list(X.G.elements), [X._inclusion(h) for h in X.H.elements]
        action = matrices(X.G.standard_representation, elements)
        points = (action * root).sum(-1)
        _, first = np.unique(np.round(points, 4), axis=0, return_index=True)
        self._points = scale * points[first]  # [n, 3]
        self.js, self._functions, self._attributes = [], {}, {}
        trivial, weights = np.ones((len(stabilizer), 1, 1)), np.full(len(stabilizer), 1 / len(stabilizer))
        for irrep in X.G.irreps():
            fixed = embeddings(trivial, matrices(irrep, stabilizer), weights, np.ones((1, 1, 1)))[:, :, 0]
            fixed = fixed[:len(fixed) // irrep.sum_of_squares_constituents]
            if len(fixed):
                at = matrices(irrep, [elements[i] for i in first])  # [n, d, d]
                self.js.append((irrep.id, len(fixed)))
                self._functions[irrep.id] = (at[None] * fixed[:, None, None]).sum(-1)  # [multiplicity, n, d]
                shared = _irrep_attributes(X.G, irrep.id)
                self._attributes[irrep.id] = [{"i": i, **shared, "sigma": sigma, "radius": radius}
                                              for i in range(len(fixed))]
        self.key = ("Orbit", tuple(self._points.ravel().tolist()), sigma)

    def sample(self, points):
        offset = self._points[:, None] - np.asarray(points, dtype=np.float64)
        square = np.square(offset).sum(-1) / self.sigma ** 2
        bumps = np.array([[math.exp(-0.5 * v) for v in row] for row in square.tolist()])  # [n, S]
        return {j: (values[..., None] * bumps[:, None]).sum(1) for j, values in self._functions.items()}


class Point(_Harmonics):
    """The constant at a point: kernels are linear maps."""

    subgroup_id = None

    def __init__(self, group):
        self.group = group
        trivial = group.trivial_representation.id
        self.js, self.key = [(trivial, 1)], ("Point",)
        self._attributes = {trivial: [{**_irrep_attributes(group, trivial), "idx": 0, "j": trivial, "shape": (1, 1)}]}

    def sample(self, points):
        return {self.js[0][0]: np.ones((1, 1, len(points)))}


def _irrep_attributes(group, j):
    return {"irrep:" + key: value for key, value in group.irrep(*j).attributes.items()}


def spherical_harmonics(unit, max_frequency):
    """Real spherical harmonics at unit vectors [S, 3]: a list of [2 l + 1, S] for l = 0..max_frequency.

    Orders -l..l, with sin(|m| phi) for m < 0, without the phase of Condon and Shortley, and of norm 1 at every point
    (Schmidt's semi-normalisation). Legendre recursion: https://dlmf.nist.gov/14.10.E3.
    """
    x, y, z = unit.T
    powers = _powers(x, y, max_frequency)
    found = [np.zeros((2 * l + 1, len(unit))) for l in range(max_frequency + 1)]
    diagonal = 1.0  # (2 m - 1)!!
    for m in range(max_frequency + 1):
        before, legendre = np.zeros(len(unit)), np.full(len(unit), diagonal)
        for l in range(m, max_frequency + 1):
            norm = math.sqrt((2 if m else 1) * math.factorial(l - m) / math.factorial(l + m))
            found[l][l + m] = norm * legendre * powers[m][0]
            if m:
                found[l][l - m] = norm * legendre * powers[m][1]
            before, legendre = legendre, ((2 * l + 1) * z * legendre - (l + m) * before) / (l - m + 1)
        diagonal *= 2 * m + 1
    return found


def _powers(x, y, highest):
    """[(real part, imaginary part)] of (x + i y)^m for m = 0..highest."""
    found = [(np.ones(len(x)), np.zeros(len(x)))]
    for _ in range(highest):
        a, b = found[-1]
        found.append((a * x - b * y, a * y + b * x))
    return found
