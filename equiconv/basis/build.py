"""The steerable basis of a gspace, as escnn's gspaces define it."""
import math

import numpy as np
from escnn.group import ico_group
from escnn.gspaces import GSpace0D, GSpace2D, GSpace3D

from .harmonics import CircularShells, Orbit, Point, Rings, SphericalShells
from .kernels import SteerableBasis

# The stabiliser of a point of each orbit of the icosahedral group, by escnn's names of the orbits.
STABILIZERS = {"ico": (False, 3), "dodeca": (False, 5), "icosidodeca": (False, 2)}


def has_native_basis(space):
    """Whether steerable_basis knows that gspace: one of escnn's own. A subclass may build another basis."""
    return type(space) in (GSpace0D, GSpace2D, GSpace3D)


def steerable_basis(space, in_repr, out_repr, rings=None, sigma=None, max_frequency=None):
    """The basis of the equivariant kernels between two representations.

    space              an escnn GSpace0D, GSpace2D or GSpace3D
    in_repr, out_repr  representations of its fibergroup
    rings, sigma       lists: radii and widths of the Gaussian rings (not for GSpace0D)
    max_frequency      highest angular frequency

    Returns a SteerableBasis; its elements are those of space.build_kernel_basis.
    """
    if isinstance(space, GSpace0D):
        return SteerableBasis(in_repr, out_repr, [Point(space.fibergroup)])
    rings = Rings(rings, sigma)
    if isinstance(space, GSpace2D):
        harmonics = _circular_shells(space._sg_id, rings, max_frequency)
    else:
        harmonics = SphericalShells(rings, max_frequency, space._sg_id)
    return SteerableBasis(in_repr, out_repr, [harmonics])


def _circular_shells(subgroup_id, rings, max_frequency):
    flip, order = subgroup_id
    if flip is not None and order == -1:
        return CircularShells(rings, max_frequency, axis=flip / 2)
    # escnn measures angles from the vertical axis where there are no flips
    return CircularShells(rings, max_frequency, math.pi / 2 if flip is None else 0.0, subgroup_id)


def icosahedral_basis(in_repr, out_repr, rings, sigma, samples):
    """The basis of escnn's R3IcoConv: bumps on orbits of the icosahedral group.

    in_repr, out_repr  representations of the icosahedral group
    rings, sigma       lists: radii of the orbits and widths of the bumps
    samples            "ico", "dodeca" or "icosidodeca"
    """
    group, orbits = ico_group(), []
    for radius, width in zip(rings, sigma):
        at_origin = bool(np.isclose(radius, 0.0, rtol=1e-7, atol=1e-7))
        X = group.homspace(group.subgroup_self_id if at_origin else STABILIZERS[samples])
        root = np.zeros(3)
        if not at_origin:
            axis = X._inclusion(X.H.elements[1]).to("Q")[:3]
            root = axis / np.linalg.norm(axis)
        orbits.append(Orbit(X, root, width, radius, 1.0 if at_origin else radius))
    return SteerableBasis(in_repr, out_repr, orbits, union=True)
