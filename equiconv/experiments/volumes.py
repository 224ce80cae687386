"""Which of eight shapes of four cubes? Voxelised in every orientation.

The shapes of the game in three dimensions, of which two are mirror images of each other: Thomas et al., Tensor Field
Networks, 2018.
"""
from functools import lru_cache

import torch

from . import figures
from .augmentation import random_rotations
from .data import Split, image_size
from .experiment import Comparison, Experiment, Network

SHAPES = {  # corners of the cubes
    "corner 1": ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0)), "corner 2": ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, -1, 0)),
    "square": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)), "line": ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)),
    "tripod": ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)), "L": ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)),
    "T": ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)), "zigzag": ((0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0)),
}
SIZE = 17  # voxels
EDGE = (3.0, 3.8)  # voxels, of the cubes
SHIFT = 1.0  # voxels, at most
NOISE = 0.3
TRAIN_SIZE, TEST_SIZE = 2000, 400
SEED = 20180222


def voxelised(shape, turn, edge, shift, size):
    """[size, size, size]: 1 inside of a shape, 0 outside, and between where its surface cuts a voxel.

    shape  [cubes, 3]: their corners, in edges
    turn   [3, 3] rotation matrix about the shape's centre of mass
    shift  [3] of that from the centre of the volume, in voxels
    """
    centres = (shape - shape.mean(0)) * edge
    steps = torch.arange(size) - (size - 1) / 2
    points = (torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1) - shift) @ turn
    depth = edge / 2 - (points[..., None, :] - centres).abs().amax(-1)  # [..., cubes]: below the surface of each
    return (depth.amax(-1) + 0.5).clamp(0, 1)


@lru_cache(2)
def splits(size):
    """(train, test): Splits of TRAIN_SIZE and TEST_SIZE volumes [n, 1, size, size, size], with noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return tuple(_draw(count, size) for count in (TRAIN_SIZE, TEST_SIZE))


def _draw(count, size):
    targets = torch.arange(count) % len(SHAPES)
    shapes = [torch.tensor(corners, dtype=torch.float32) for corners in SHAPES.values()]
    edges = EDGE[0] + (EDGE[1] - EDGE[0]) * torch.rand(count)
    shifts = SHIFT * (2 * torch.rand(count, 3) - 1)
    volumes = [voxelised(shapes[t], turn, edge * size / SIZE, shift, size)
               for t, turn, edge, shift in zip(targets.tolist(), random_rotations(count, 3), edges, shifts)]
    inputs = torch.stack(volumes)[:, None]
    return Split(inputs + NOISE * torch.randn(inputs.shape), targets)


def load(config):
    train, test = splits(image_size(config, SIZE))
    return train.first(config.train_size), test


def draw(folder, test, outputs):
    rows = [test.inputs[test.targets == c][:6, 0].amax(1) for c in range(len(SHAPES))]
    figures.examples(folder / "shapes.png", rows, list(SHAPES), limits=(0, 1.5))
    return {"shapes.png": "Test volumes, six of each class: the brightest voxel along the first axis"}


def _network(title, model, **options):
    return Network(title, {"model": model, "model_options": {"classes": len(SHAPES), "image_size": SIZE, **options}})


SE3 = {"widths": [2, 3, 4], "samples": [96, 96, 96], "pooled": 16, "hidden": 64}
PLAIN = {"stem": 3, "widths": [4, 6, 8], "inner": [4, 6, 7], "pooled": 16, "hidden": 64}

EXPERIMENT = Experiment(
    name="volumes",
    summary="voxelised shapes of four cubes in random orientations, with noise; eight classes, two of them mirror "
            "images",
    load=load,
    models=("se3_cnn", "cnn_3d"),
    defaults={"epochs": 20, "batch_size": 16, "train_size": TRAIN_SIZE, "lr": 3e-3, "schedule": "cosine",
              "model_options": {"classes": len(SHAPES), "image_size": SIZE, **SE3}},
    comparison=Comparison(
        networks={"se3": _network("SE(3) CNN", "se3_cnn", **SE3),
                  "cnn": _network("3D CNN", "cnn_3d", **PLAIN),
                  "cnn-augmented": Network("3D CNN, rotations added", {
                      **_network("", "cnn_3d", **PLAIN).settings, "augmentation": "rotation"})},
        train_sizes=(40, 200, 1000),
        settings={"epochs": 10},
        least_steps=100,
        figures=draw,
    ),
)
