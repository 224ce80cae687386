"""Whole networks: a training step with escnn's layers, with equiconv's convolutions alone, and with all its layers."""
import copy
from dataclasses import dataclass, field

import escnn.nn
import torch

from .equality import check
from .precision import autocast, lookup, torch_switches
from .records import Row

OPS = ("network",)
METHODS = ("escnn", "equiconv_convolutions", "equiconv")
ALLOWED = 100  # times the tolerance of one layer: what dozens of them add up to


@dataclass(frozen=True)
class Network:
    """A network of equiconv.models, what it is built with, and its input: size and batch.

    Without dropout, which would not draw equal masks.
    """
    name: str
    model: str
    size: tuple
    batch: int
    options: dict = field(default_factory=dict)
    op: str = "network"

    @property
    def module(self):
        return self.model

    @property
    def source(self):
        from equiconv import models
        return models.citation(self.model)

    def batch_on(self, device):
        return self.batch


NETWORKS = {case.name: case for case in (
    Network("net_c8_cnn", "c8_steerable_cnn", (1, 29, 29), 16),
    Network("net_e2sfcnn", "e2sfcnn", (1, 29, 29), 8, {"dropout": 0.0}),
    Network("net_se3_cnn", "se3_cnn", (1, 33, 33, 33), 2),
    Network("net_wrn16_8", "e2wrn16_8", (3, 48, 48), 1, {"dropout": 0.0}),
)}


class Training:
    """A network with its images: forward, and backward to the images and every parameter."""

    def __init__(self, model, images, grad, precision):
        self.model, self.images, self.grad, self.precision = model, images, grad, precision

    def __call__(self):
        """[logits, gradient of the images, gradients of all parameters as one vector]"""
        with autocast(self.precision, self.images.device):
            logits = self.model(self.images)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        of_images, *gradients = torch.autograd.grad(logits, [self.images, *parameters], self.grad.to(logits.dtype))
        return [logits, of_images, torch.cat([g.flatten() for g in gradients])]


def build(case, device, precision):
    """{method: Training}, with equal weights, bases and images."""
    import equiconv
    from equiconv import models
    torch.manual_seed(0)
    theirs = models.create(case.model, nn=escnn.nn, **case.options).to(device, precision.parameters).train()
    found = {"escnn": theirs, "equiconv_convolutions": accelerate_convolutions(copy.deepcopy(theirs)),
             "equiconv": equiconv.accelerate(copy.deepcopy(theirs))}
    images = torch.randn(case.batch, *case.size, device=device, dtype=precision.activations, requires_grad=True)
    with torch.no_grad(), autocast(precision, images.device):
        grad = torch.randn_like(copy.deepcopy(theirs)(images))
    return {method: Training(found[method], images, grad, precision) for method in METHODS}


def accelerate_convolutions(model):
    """The model with its convolutions accelerated alone, in place."""
    from equiconv.nn import ACCELERATED
    from equiconv.nn.expanded import Expanded
    for module in model.modules():
        cls = ACCELERATED.get(type(module))
        if cls is not None and issubclass(cls, Expanded):
            module.__class__ = cls
            module._adopt()
    return model


def measure(case, device, dtype, budget_s, timed):
    """Rows of the training step of a Network. Raises Differs, before anything is timed, where the methods differ.

    timed  timed(functions, device, budget_s) -> {method: columns of a Row}
    """
    precision = lookup(dtype, device)
    with torch_switches(precision):
        functions = build(case, device, precision)
        expected = functions["escnn"]()
        errors = {method: check(f"{case.name}, {method}", functions[method](), expected, ALLOWED * precision.tolerance)
                  for method in METHODS[1:]}
        return [Row(case=case.name, source=case.source, op=case.op, mode="training", dtype=dtype, layout="contiguous",
                    batch=case.batch, size="x".join(map(str, case.size[1:])), method=method, **columns,
                    error=errors.get(method, ""))
                for method, columns in timed(functions, device, budget_s).items()]
