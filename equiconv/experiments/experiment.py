"""What an experiment has to say of itself."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


def accuracy(outputs, targets):  # [B, classes], [B]
    """Fraction of the samples, in percent."""
    return 100 * (outputs.argmax(1) == targets).double().mean().item()


@dataclass(frozen=True)
class Experiment:
    """load     load(config) -> (train, test), each a data.Split
    models   names of the models that fit; the first is the default
    defaults values of Config that differ from its own
    loss     loss(outputs, targets) -> scalar tensor, a mean over the batch
    score    score(outputs, targets) -> float over the whole test set, called score_name
    """
    name: str
    summary: str
    load: Callable
    models: tuple
    defaults: dict = field(default_factory=dict)
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy
    score: Callable[[torch.Tensor, torch.Tensor], float] = accuracy
    score_name: str = "accuracy (%)"
