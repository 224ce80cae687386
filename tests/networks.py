"""The published networks at small sizes, and an input for each."""
import torch

from equiconv import models

NETWORKS = {  # name: (options, shape of one input)
    "c8_steerable_cnn": ({"widths": 6 * (2,), "hidden": 8}, (1, 29, 29)),
    "e2sfcnn": ({"order": 4, "widths": 6 * (2,), "hidden": 8, "dropout": 0.0}, (1, 28, 28)),
    "e2wrn10_4": ({"widening": 1, "dropout": 0.0, "delta_orthogonal": False}, (3, 9, 9)),
    "e2wrn28_10": ({"depth": 10, "widening": 1, "dropout": 0.0, "delta_orthogonal": False}, (3, 9, 9)),
    "p4_cnn": ({"width": 2, "classes": 3}, (1, 28, 28)),
    "p4m_cnn": ({"width": 2, "classes": 3}, (1, 28, 28)),
    "se3_cnn": ({"stem": 1, "widths": (1, 1), "samples": (24, 24), "cube_orbits": 1, "frequency": 1, "pooled": 2,
                 "hidden": 8, "dropout": 0.0, "image_size": 9}, (1, 9, 9, 9)),
}
CONVENTIONAL = {  # the same of their twins
    "cnn": ({"widths": 6 * (4,), "hidden": 8}, (1, 29, 29)),
    "wrn28_10": ({"depth": 10, "widths": (4, 8, 8), "dropout": 0.0}, (3, 9, 9)),
}


def build(name, nn=None):
    torch.manual_seed(0)
    return models.create(name, nn, **(NETWORKS | CONVENTIONAL)[name][0])


def images(name, batch=3, seed=0):
    return torch.randn(batch, *(NETWORKS | CONVENTIONAL)[name][1], generator=torch.Generator().manual_seed(seed))
