"""What an experiment has to say of itself."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .metrics import accuracy


@dataclass(frozen=True)
class Network:
    """One of the networks that an experiment compares. settings: values of Config, its model among them."""
    title: str
    settings: dict


@dataclass(frozen=True)
class Comparison:
    """What `--compare` trains by default: every network on every number of training samples.

    networks    {name: Network}; the first is compared with each of the others
    train_sizes numbers of training samples
    settings    values of Config, for all networks
    least_steps a run with few samples takes more epochs, so as to have at least so many steps
    figures     figures(folder, test Split, {title: test outputs}) -> {file name: caption} of PNGs that it has written
    details     details(test outputs, targets) -> {name: number}, more columns of the table
    """
    networks: dict
    train_sizes: tuple
    settings: dict = field(default_factory=dict)
    least_steps: int = 1
    figures: Callable | None = None
    details: Callable | None = None

    @property
    def needs_outputs(self):
        return self.figures is not None or self.details is not None


@dataclass(frozen=True)
class Experiment:
    """load       load(config) -> (train, test), each a data.Split
    models     names of the models that fit; the first is the default
    comparison of several networks
    defaults   values of Config that differ from its own
    loss       loss(outputs, targets) -> scalar tensor, a mean over the batch
    score      score(outputs, targets) -> float over the whole test set, called score_name; more is better
    """
    name: str
    summary: str
    load: Callable
    models: tuple
    comparison: Comparison
    defaults: dict = field(default_factory=dict)
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy
    score: Callable[[torch.Tensor, torch.Tensor], float] = accuracy
    score_name: str = "accuracy (%)"
