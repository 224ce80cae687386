"""CIFAR-10 and CIFAR-100 from a folder with the original files, in their binary version.

A record is its label (CIFAR-100: coarse, then fine) and 3 x 32 x 32 pixels, one byte each: https://www.cs.toronto.edu/~kriz/cifar.html
"""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .data import MissingData, Split
from .experiment import Comparison, Experiment, Network

SIZE = 32
FILES = {10: ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"), 100: (["train.bin"], "test.bin")}
LABELS = {10: 1, 100: 2}  # bytes of a record before its pixels; the last of them is the class


@lru_cache(1)
def read(folder, classes):
    """(train, test): Splits of images [n, 3, 32, 32], each channel of the training images with mean 0 and deviation 1.

    Raises MissingData without the files, and ValueError if one of them has another format.
    """
    if not folder:
        raise MissingData(f"CIFAR-{classes} is read from a folder, which --data names")
    train_files, test_file = FILES[classes]
    parts = [_read_file(Path(folder) / name, classes) for name in (*train_files, test_file)]
    inputs, targets = (torch.cat(some) for some in zip(*parts[:-1]))
    deviation, mean = torch.std_mean(inputs, (0, 2, 3), keepdim=True)
    deviation = deviation.clamp(min=1e-3)
    return Split((inputs - mean) / deviation, targets), Split((parts[-1][0] - mean) / deviation, parts[-1][1])


def _read_file(path, classes):
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise MissingData(f"{path}: there is no such file of the binary version of CIFAR-{classes}") from error
    record = LABELS[classes] + 3 * SIZE * SIZE
    if len(content) == 0 or len(content) % record:
        raise ValueError(f"{path}: records of CIFAR-{classes} have {record} bytes, and {len(content)} are no multiple")
    records = torch.from_numpy(content.reshape(-1, record))
    targets = records[:, LABELS[classes] - 1].long()
    if targets.max() >= classes:
        raise ValueError(f"{path}: the classes of CIFAR-{classes} are 0 to {classes - 1}, but there is {targets.max()}")
    return records[:, LABELS[classes]:].reshape(-1, 3, SIZE, SIZE).float() / 255, targets


def _experiment(classes):
    def load(config):
        if config.model_options.get("classes", 10) != classes:
            raise ValueError(f"CIFAR-{classes} has {classes} classes: model_options must say so, as \"classes\"")
        train, test = read(config.data, classes)
        return train.interleaved().first(config.train_size), test

    def network(title, model):
        return Network(title, {"model": model, "model_options": {"classes": classes}})

    train_size = 50_000
    return Experiment(
        name="cifar" if classes == 10 else "cifar100",
        summary=f"CIFAR-{classes}, from the original files",
        load=load,
        models=("e2wrn28_10", "e2wrn28_7", "e2wrn10_4", "wrn28_10", "wrn28_7", "wrn10_4"),
        # Published: Weiler, Cesa 2019; Zagoruyko, Komodakis 2016
        defaults={"epochs": 200, "batch_size": 128, "train_size": train_size, "lr": 0.1, "weight_decay": 5e-4,
                  "optimizer": "sgd", "schedule": "steps", "augmentation": "crop-flip",
                  "model_options": {"classes": classes}},
        comparison=Comparison(networks={"e2wrn28-10": network("E(2) WRN-28-10", "e2wrn28_10"),
                                        "wrn28-10": network("WRN-28-10", "wrn28_10"),
                                        "e2wrn10-4": network("D4 WRN-10-4", "e2wrn10_4"),
                                        "wrn10-4": network("WRN-10-4", "wrn10_4")},
                              train_sizes=(train_size,)),
    )


CIFAR10, CIFAR100 = _experiment(10), _experiment(100)
