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
OTHERS = {  # whose layers are not all of equiconv.nn
    "deeplense_c4_cnn": ({"widths": 6 * (2,), "hidden": 8, "image_size": 32}, (1, 32, 32)),
    "equivariant_transformer": ({"grid": 52, "features": 4, "pose_features": 4, "dropout": 0.0}, (1, 28, 28)),
    "hnet": ({"features": 2, "image_size": 16}, (1, 16, 16)),
}
CONVENTIONAL = {  # the same of their twins
    "cnn": ({"widths": 6 * (4,), "hidden": 8}, (1, 29, 29)),
    "cnn_3d": ({"stem": 2, "widths": (4, 4), "inner": (4, 4), "pooled": 4, "hidden": 8, "dropout": 0.0,
                "image_size": 9}, (1, 9, 9, 9)),
    "deeplense_cnn": ({"widths": 6 * (4,), "hidden": 8, "image_size": 32}, (1, 32, 32)),
    "e2sf_cnn": ({"widths": 6 * (4,), "hidden": 8, "dropout": 0.0}, (1, 28, 28)),
    "et_cnn": ({"grid": 52, "features": 16, "dropout": 0.0}, (1, 28, 28)),
    "exp_e2sf_cnn": ({"widths": 6 * (4,), "hidden": 8}, (1, 28, 28)),
    "hnet_cnn": ({"features": 4}, (1, 16, 16)),
    "wrn28_10": ({"depth": 10, "widths": (4, 8, 8), "dropout": 0.0}, (3, 9, 9)),
    "z2_cnn": ({"width": 4}, (1, 28, 28)),
}
ALL = NETWORKS | OTHERS | CONVENTIONAL
FURTHER = {  # that do not classify images, or differ from another one by their options alone
    "cnn_segmenter": ({"widths": (2, 2), "kernels": (3, 3)}, (1, 9, 9, 9)),
    "equivariant_mlp": ({"frequencies": (1, 2, 2, 2)}, (3,)),
    "equivariant_transformer_rotation": ({"grid": 52, "features": 4, "pose_features": 4, "dropout": 0.0}, (1, 28, 28)),
    "plain_mlp": ({}, (3,)),
    "se3_segmenter": ({"widths": (2, 2), "kernels": (3, 3), "frequency": 1}, (1, 9, 9, 9)),
}
EVERY = ALL | FURTHER


def build(name, nn=None):
    torch.manual_seed(0)
    return models.create(name, nn, **EVERY[name][0])


def images(name, batch=3, seed=0):
    return torch.randn(batch, *EVERY[name][1], generator=torch.Generator().manual_seed(seed))
