"""What the networks answer to a rotating scene, in the frame of the camera and in the comoving frame."""
import math
from dataclasses import dataclass

import numpy as np
import torch

from .networks import both
from .scenes import disc, seen, turn

AXIS = np.array([0.36, 0.48, 0.8])  # of the rotation of a volume: none of the grid's


@dataclass
class Response:
    """Fields [angles, 1 + dimensions, *spatial] of one network: a scalar and the components (x, y[, z]) of a vector.

    Both are in units of their root mean square at angle 0. errors: relative L2 against angle 0, in the comoving frame.
    """
    name: str
    parameters: int
    camera: np.ndarray
    comoving: np.ndarray
    errors: list

    @property
    def mean_error(self):
        """Over all angles but the first, which is the one that the others are compared with."""
        return sum(self.errors[1:]) / (len(self.errors) - 1)


@dataclass
class Show:
    """degrees [angles]; inputs [angles, *spatial]; responses of the steerable and of the conventional network."""
    degrees: list
    inputs: np.ndarray
    responses: list


def rotation(degrees, dimensions):
    """The matrix that rotates (x, y), or (x, y, z) about AXIS."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    if dimensions == 2:
        return np.array([[c, -s], [s, c]])
    x, y, z = AXIS
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return c * np.eye(3) + s * cross + (1 - c) * np.outer(AXIS, AXIS)


def respond(scene, size, degrees, seed, tick):
    """The Show of a scene [n, ...] at a resolution of `size`, for each angle; calls tick() after each angle."""
    dimensions = scene.ndim
    networks, parameters = both(dimensions, seed)
    region = disc(size, dimensions) > 0.5
    inputs = []
    camera, comoving = ({name: [] for name in networks} for _ in range(2))
    scales = {}
    for angle in degrees:
        action = rotation(angle, dimensions)
        x = seen(scene, action, size)
        inputs.append(x[0, 0].numpy())
        for name, network in networks.items():
            with torch.inference_mode():
                fields = network(x)[0].double().numpy()
            if name not in scales:
                scalar, vector = (math.sqrt((f ** 2).sum(0)[region].mean()) for f in (fields[:1], fields[1:]))
                scales[name] = np.array([scalar] + dimensions * [vector]).reshape(-1, *[1] * dimensions)
            camera[name].append(fields / scales[name])
            back = turn(camera[name][-1], action.T)
            back[1:] = np.einsum("ij,j...->i...", action.T, back[1:])
            comoving[name].append(back)
        tick()
    responses = []
    for name in networks:
        still = comoving[name][0] * region
        errors = [float(np.linalg.norm((f - still) * region) / np.linalg.norm(still)) for f in comoving[name]]
        responses.append(Response(name, parameters[name], np.stack(camera[name]), np.stack(comoving[name]), errors))
    return Show(list(degrees), np.stack(inputs), responses)
