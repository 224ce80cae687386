"""Grey and white matter in patches of a real brain, each turned at random.

The MNI152 volumes that nilearn carries: an average over 152 heads, T1-weighted, with the probability of both tissues.
Patches to train on come from the back of the brain, those to test on from its front.
"""
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from . import figures
from .augmentation import random_rotations
from .data import MissingData, Split, image_size
from .experiment import Comparison, Experiment, Network
from .metrics import dice

CLASSES = ("other", "grey matter", "white matter")
SIZE = 17  # voxels of a patch
RESOLUTION = 2  # mm
TRAIN_SIZE, TEST_SIZE = 1000, 100
NOISE = 0.1  # of the brightness, in its standard deviations
SEED = 20201108


@lru_cache(1)
def volumes():
    """(brightness [1, D, H, W] with mean 0 and deviation 1 over the brain, classes [D, H, W], x y z of its axes).

    Raises MissingData without nilearn.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise MissingData("the brain comes with the package nilearn: pip install 'equiconv[brain]'") from error
    brightness, grey, white = (load(resolution=RESOLUTION).get_fdata(dtype=np.float32) for load in (
        datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template))
    classes = np.where(np.maximum(grey, white) < 0.5, 0, np.where(grey >= white, 1, 2))
    inside = brightness[brightness > 0]
    return torch.from_numpy((brightness - inside.mean()) / inside.std())[None], torch.from_numpy(classes)


def patches(brightness, classes, centres, turns, size):
    """Split of cubes [n, 1, size, size, size] of a volume, each turned about its centre; classes of the nearest voxels.

    centres  [n, 3], in voxels along the axes of the volume
    turns    [n, 3, 3] rotation matrices
    """
    shape = torch.tensor(classes.shape, dtype=torch.float32)
    steps = torch.arange(size) - (size - 1) / 2
    cube = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1)
    points = centres[:, None, None, None] + cube @ turns[:, None, None].mT  # [n, size, size, size, 3]
    grid = ((2 * points + 1) / shape - 1).flip(-1)  # the last axis comes first in grid_sample
    sources = ((brightness, "bilinear"), (classes[None].float(), "nearest"))
    found = [torch.cat([F.grid_sample(volume[None], g[None], mode=mode, align_corners=False) for g in grid])
             for volume, mode in sources]
    return Split(found[0], found[1][:, 0].round().long())


@lru_cache(2)
def splits(size):
    """(train, test): Splits of TRAIN_SIZE and TEST_SIZE patches, with noise."""
    brightness, classes = volumes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        brain = (classes > 0).nonzero().float()
        middle, margin = brain[:, 1].median(), size * 3 ** 0.5 / 2
        found = []
        for half, count in ((brain[brain[:, 1] < middle - margin], TRAIN_SIZE),
                            (brain[brain[:, 1] > middle + margin], TEST_SIZE)):  # no patch reaches into the other half
            centres = half[torch.randint(len(half), (count,))]
            split = patches(brightness, classes, centres, random_rotations(count, 3), size)
            found.append(Split(split.inputs + NOISE * torch.randn(split.inputs.shape), split.targets))
    return tuple(found)


def load(config):
    train, test = splits(image_size(config, SIZE))
    return train.first(config.train_size), test


def score(outputs, targets):
    """Mean Dice overlap of grey and white matter, in percent."""
    return sum(dice(outputs, targets)[1:]) / 2


def details(outputs, targets):
    return {f"Dice, {name}": value for name, value in zip(CLASSES[1:], dice(outputs, targets)[1:])}


def draw(folder, test, outputs):
    middle = test.inputs.shape[-1] // 2
    shown = range(min(6, len(test.targets)))
    columns = {"T1, central slice": [test.inputs[i, 0, middle] for i in shown],
               "tissue": [test.targets[i, middle] for i in shown],
               **{title: [scores[i, :, middle].argmax(0) for i in shown] for title, scores in outputs.items()}}
    limits = [(-2, 2)] + (len(columns) - 1) * [(0, 2)]
    figures.examples(folder / "patches.png", list(columns.values()), list(columns), "gray", limits)
    return {"patches.png": "Central slices of test patches: brightness, true classes (black: other, grey: grey matter, "
                           "white: white matter) and those that the networks find"}


def _network(title, model, **options):
    return Network(title, {"model": model, "model_options": options})


EXPERIMENT = Experiment(
    name="volumes-brain",
    summary="grey and white matter in turned patches of the MNI152 brain (nilearn), 2 mm voxels; trained on the back "
            "of the brain, tested on its front",
    load=load,
    models=("se3_segmenter", "cnn_segmenter"),
    defaults={"epochs": 20, "batch_size": 8, "train_size": TRAIN_SIZE, "lr": 5e-3, "schedule": "cosine"},
    score=score,
    score_name="mean Dice (%)",
    comparison=Comparison(
        networks={"se3": _network("SE(3) CNN", "se3_segmenter", widths=[6, 8, 8], kernels=[3, 3, 3]),
                  "cnn": _network("3D CNN", "cnn_segmenter", widths=[5, 6, 6], kernels=[3, 3, 3])},
        train_sizes=(10, 30, 100),
        settings={"epochs": 10},
        least_steps=60,
        figures=draw,
        details=details,
    ),
)
