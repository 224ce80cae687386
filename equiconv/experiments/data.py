"""What experiments are trained and tested on."""
from typing import NamedTuple

import torch

from .. import models


class MissingData(RuntimeError):
    """The data of an experiment are not on this machine."""


class Split(NamedTuple):
    inputs: torch.Tensor   # [n, C, *size] float32
    targets: torch.Tensor  # [n] int64, or [n, *size] of a segmentation

    def first(self, count):
        """As many samples, from the first. Raises ValueError if there are fewer."""
        if count > len(self.targets):
            raise ValueError(f"train_size is {count}, but there are {len(self.targets)} samples to train on")
        return Split(self.inputs[:count], self.targets[:count])

    def interleaved(self):
        """The same samples in an order in which the classes take turns: the first n hold all equally often."""
        turns = torch.empty_like(self.targets)
        for c in self.targets.unique():
            turns[self.targets == c] = torch.arange((self.targets == c).sum())
        order = turns.argsort(stable=True)
        return Split(self.inputs[order], self.targets[order])


def image_size(config, default=None):
    """Pixels per axis of the inputs that a Config asks for: its image_size, the model's, or `default`.

    Raises ValueError if the first two differ.
    """
    of_model = config.model_options.get("image_size")
    if config.image_size and of_model and config.image_size != of_model:
        raise ValueError(f"image_size is {config.image_size}, but the model's is {of_model}")
    return config.image_size or of_model or default or models.input_shape(config.model)[-1]
