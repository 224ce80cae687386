"""What is rotated: a photograph and a volume, and their exact place on the grid after a rotation."""
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import affine_transform, gaussian_filter

from ..experiments import brain
from ..experiments.data import MissingData

FINER = 2  # a photograph is rotated at that resolution, and averaged afterwards
SPLINE = 3  # order of the interpolation
FILLED = 0.8  # radius of the disc that is kept of a scene, of that of the grid: the rest is room for the kernels
EDGE = 1.5  # pixels over which the disc fades

# Kak, Slaney: Principles of Computerized Tomographic Imaging, 1988, table 3.1: the head phantom in three dimensions.
# Its grey levels are those of Toft's version, whose contrast is visible: value, half axes, centre, angle about z.
HEAD = ((1.0, (.69, .92, .9), (0, 0, 0), 0), (-.8, (.6624, .874, .88), (0, 0, 0), 0),
        (-.2, (.41, .16, .21), (-.22, 0, -.25), 108), (-.2, (.31, .11, .22), (.22, 0, -.25), 72),
        (.1, (.21, .25, .5), (0, .35, -.25), 0), (.1, (.046, .046, .046), (0, .1, -.25), 0),
        (.1, (.046, .023, .02), (-.08, -.65, -.25), 0), (.1, (.046, .023, .02), (.06, -.65, -.25), 90),
        (.2, (.056, .04, .1), (.06, -.105, .625), 90), (-.2, (.056, .056, .1), (0, .1, .625), 0))


def photograph(path, size):
    """[n, n] in 0..1, n = FINER * size: the largest square at the top centre of an image file, in grey.

    path  of the file; None takes the portrait that matplotlib carries

    Raises ValueError if the file is no image.
    """
    from matplotlib import cbook
    from PIL import Image, UnidentifiedImageError
    try:
        image = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False) if path is None else path)
        image = image.convert("L")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not an image that can be read ({error})") from None
    side = min(image.size)
    left = (image.size[0] - side) // 2
    image = image.crop((left, 0, left + side, side)).resize((FINER * size,) * 2, Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float64) / 255


def volume(path, size):
    """[size, size, size] in 0..1, axes as escnn's: -z, -y, x.

    path  of a three-dimensional .npy file, which is cropped to a cube and resampled; None takes the brain that nilearn
          carries, or without nilearn a phantom of a head

    Raises ValueError if the file holds no volume.
    """
    if path is None:
        try:
            return _brain(size)
        except MissingData:
            return _head(size)
    try:
        values = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not an .npy file that can be read ({error})") from None
    if getattr(values, "ndim", 0) != 3 or values.dtype.kind not in "fiub" or min(values.shape) < 2:
        raise ValueError(f"{path} must hold a three-dimensional array of numbers, got {getattr(values, 'shape', '?')}")
    side = min(values.shape)
    values = values[tuple(slice((n - side) // 2, (n - side) // 2 + side) for n in values.shape)].astype(np.float64)
    return _resampled(values, size)


def _resampled(values, size):
    """A cube of numbers as one of that size, in 0..1."""
    side = len(values)
    if side > size:
        values = gaussian_filter(values, 0.5 * side / size)
    scale = (side - 1) / (size - 1)
    values = affine_transform(values, np.eye(3) * scale, order=1, output_shape=(size,) * 3)
    return (values - values.min()) / max(np.ptp(values), 1e-12)


def _brain(size):
    """The MNI152 average of T1-weighted heads. Raises MissingData without nilearn."""
    values = brain.volumes()[0][0].numpy().transpose(2, 1, 0)[::-1, ::-1]  # from axes x, y, z
    values = values - values.min()  # zero outside of the brain
    side = max(values.shape)
    return _resampled(np.pad(values, [((side - n) // 2, (side - n + 1) // 2) for n in values.shape]), size)


def _head(size):
    fine = 2 * size  # averaged over two voxels along each axis
    along = ((np.arange(fine) + 0.5) * 2 / fine - 1) / FILLED
    z, y, x = np.meshgrid(-along, -along, along, indexing="ij")
    values = np.zeros((fine,) * 3)
    for value, (a, b, c), centre, degrees in HEAD:
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        dx, dy, dz = x - centre[0], y - centre[1], z - centre[2]
        inside = ((dx * cos + dy * sin) / a) ** 2 + ((dy * cos - dx * sin) / b) ** 2 + (dz / c) ** 2 <= 1
        values[inside] += value
    return values.reshape(size, 2, size, 2, size, 2).mean((1, 3, 5))


def disc(size, dimensions, radius=1.0):
    """[size, ...] of 0..1: 1 within that part of the inscribed circle or sphere, fading over EDGE pixels."""
    axis = np.arange(size) - (size - 1) / 2
    distance = np.sqrt(sum(a ** 2 for a in np.meshgrid(*[axis] * dimensions, indexing="ij")))
    return 1 / (1 + np.exp((distance - radius * (size - 1) / 2) / (EDGE / 4)))


def turn(fields, action):
    """fields [..., *spatial] with their places rotated by the matrix `action`, which acts on (x, y[, z])."""
    n = len(action)
    flip = np.diag([-1.0] * (n - 1) + [1.0])
    on_grid = flip @ np.asarray(action)[::-1, ::-1] @ flip  # escnn's axes: [-z,] -y, x
    centre = (np.array(fields.shape[-n:]) - 1) / 2
    back = on_grid.T
    flat = np.asarray(fields, dtype=np.float64).reshape(-1, *fields.shape[-n:])
    turned = [affine_transform(f, back, offset=centre - back @ centre, order=SPLINE) for f in flat]
    return np.stack(turned).reshape(fields.shape)


def seen(scene, action, size):
    """What a camera sees of a scene under a rotation: [1, 1, *spatial] float32, within a disc, of mean zero in it."""
    turned = turn(scene, action)
    finer = scene.shape[0] // size
    if finer > 1:
        turned = turned.reshape(size, finer, size, finer).mean((1, 3))
    mask = disc(size, len(action), FILLED)
    level = scene.mean()  # the same for each rotation
    return torch.from_numpy((turned - level) * mask).float()[None, None]
