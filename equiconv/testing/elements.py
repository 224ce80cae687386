"""Group elements as transformations of the grid: which are exact there, what to call them, where to draw them."""
import math

import numpy as np
import torch


def is_exact(space, g):
    """Whether g maps a square grid to itself: a signed permutation of the axes.

    To the rounding of float64: of one made in float32, GeometricTensor.transform takes the border to lie outside.
    """
    if space.dimensionality == 0:
        return True
    action = torch.as_tensor(space.basespace_action(g)).abs()
    return bool(((action < 1e-9) | (action > 1 - 1e-9)).all())


def angle(space, g):
    """(degrees of the rotation in [0, 360), whether g preserves orientation); (nan, True) without a base space."""
    if space.dimensionality not in (2, 3):
        return math.nan, True
    action = np.asarray(space.basespace_action(g))
    turns = bool(np.linalg.det(action) > 0)
    if space.dimensionality == 2:
        return _degrees(math.atan2(action[1][0], action[0][0])), turns
    rotation = action if turns else -action
    return _degrees(math.acos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))), turns


def name(space, g):
    """What g does, in words."""
    degrees, turns = angle(space, g)
    if math.isnan(degrees):
        return " ".join(str(g).split())
    if space.dimensionality == 3:
        action = np.asarray(space.basespace_action(g))
        _, _, rows = np.linalg.svd((action if turns else -action) - np.eye(3))
        about = ", ".join(f"{v + 0:g}" for v in rows[-1].round(2))
        return f"rotation by {degrees:g} deg about ±({about})" + ("" if turns else " and inversion")
    return f"rotation by {degrees:g} deg" if turns else f"reflection in the axis at {degrees / 2:g} deg"


def _degrees(radians):
    return round(math.degrees(radians) % 360, 2) % 360
