"""Whole networks: a step of training, from images to changed weights, beside escnn's and the conventional twins'.

Each is the published network of equiconv.models at its published size; only the batch is small on a CPU, and the images
of the largest networks, for all methods alike. Methods:
escnn, equiconv_convolutions (escnn's with its convolutions accelerated), equiconv (the same network, with the same
weights), equiconv_irreps (that one, where features stay in the basis of their irreps between convolutions), torch (the
conventional network with as many channels) and twin (with as many parameters). A step is the forward pass,
cross-entropy, backward pass and SGD with momentum.
"""
import copy
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest.mock import patch

import escnn.nn
import torch

from equiconv import accelerate, models

from .equality import check, worst_error
from .layers import equiconv_nn
from .precision import autocast, lookup, torch_switches
from .records import Row

OP = "network"
OURS = ("equiconv_convolutions", "equiconv", "equiconv_irreps")
DRAWS = 3


@dataclass(frozen=True)
class Network:
    """A network of equiconv.models and its twins, by name.

    twin        of equal parameters; that of equal width is named twin_wide
    batches     images in a step: on the CPU, on a GPU
    cpu_pixels  height and width of the images on the CPU; None: as published, as on a GPU
    sized       whether the networks have those as an option, image_size
    model       the network's name in equiconv.models, by default that of the case
    options     of the network
    """
    name: str
    twin: str
    batches: tuple
    cpu_pixels: int | None = None
    sized: bool = False
    model: str = ""
    options: dict = field(default_factory=dict)
    op = OP
    module = "a step of training"

    @property
    def source(self):
        return models.citation(self.model or self.name)

    def batch_on(self, device):
        return self.batches[torch.device(device).type == "cuda"]

    def shape_on(self, device):
        """Of one image: [C, *size]."""
        channels, *size = models.input_shape(self.model or self.name)
        return channels, *(len(size) * [self.cpu_pixels] if self._is_smaller_on(device) else size)

    def build(self, nn, device):
        return _build(self.model or self.name, nn, self.options | self.size_on(device))

    def size_on(self, device):
        """The option of the networks that goes with the size of the images."""
        return {"image_size": self.cpu_pixels} if self.sized and self._is_smaller_on(device) else {}

    def _is_smaller_on(self, device):
        return self.cpu_pixels is not None and torch.device(device).type == "cpu"


def _exp_e2sfcnn(fields):
    return Network(f"exp_e2sfcnn_{fields}", "exp_e2sf_cnn", (2, 64), model="exp_e2sfcnn",
                   options=dict(fields=fields, group="SO2"))


NETWORKS = {network.name: network for network in (
    Network("e2sfcnn", "e2sf_cnn", batches=(2, 64)),
    _exp_e2sfcnn("gated_conv"), _exp_e2sfcnn("hnet_conv"), _exp_e2sfcnn("fourier"),
    Network("c8_steerable_cnn", "cnn", batches=(4, 64)),
    Network("e2wrn16_8", "wrn16_8", batches=(1, 16), cpu_pixels=32),
    Network("e2wrn28_10", "wrn28_10", batches=(1, 32), cpu_pixels=16),
    Network("se3_cnn", "cnn_3d", batches=(2, 32)),
    Network("hnet", "hnet_cnn", batches=(8, 64)),
    Network("deeplense_c4_cnn", "deeplense_cnn", batches=(2, 64), cpu_pixels=64, sized=True),
)}


class Step:
    """A step of training of a model, as a function without arguments."""

    def __init__(self, model, images, labels, precision):
        self.model, self.images, self.labels, self.precision = model, images, labels, precision
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)

    def logits(self):
        with autocast(self.precision, self.images.device):
            return self.model(self.images)

    def loss(self):
        return torch.nn.functional.cross_entropy(self.logits(), self.labels)

    def evaluated(self):
        """Logits and gradients in evaluation mode, where dropout draws nothing."""
        self.model.eval()
        logits = self.logits()
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, self.labels),
                                        [p for _, p in sorted(self.model.named_parameters()) if p.requires_grad])
        self.model.train()
        return logits, torch.cat([g.flatten() for g in gradients])

    def __call__(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def measure(case, device, dtype, budget_s, timed, layout="contiguous"):
    """Rows of a Network. Raises Differs, before anything is timed, where equiconv's computes something else.

    timed  timed(functions, device, budget_s) -> {method: columns of a Row}
    """
    precision = lookup(dtype, device)
    with torch_switches(precision):
        steps = _steps(case, device, precision, layout)
        with torch.no_grad():
            steps["escnn"].logits()  # statistics of a batch
        for method in OURS:
            steps[method].model.load_state_dict(steps["escnn"].model.state_dict())
        errors = {method: _error(case, method, steps, precision) for method in OURS}
        rows = timed(steps, device, budget_s)
    size = "x".join(map(str, case.shape_on(device)[1:]))
    return [Row(case=case.name, source=case.source, op=OP, mode="training", dtype=dtype, layout=layout,
                batch=case.batch_on(device), size=size, method=method, **columns, error=errors.get(method, ""),
                note={"torch": f"{case.twin}_wide", "twin": case.twin}.get(method, ""))
            for method, columns in rows.items()]


def _error(case, method, steps, precision):
    """Of a method's logits and gradients. Raises Differs.

    Where two values are equal up to rounding, a maximum (of pooling) may be another one's, and its gradient elsewhere:
    then other images are drawn, DRAWS times at most.
    """
    for _ in range(DRAWS):
        actual, expected = (steps[name].evaluated() for name in (method, "escnn"))
        if worst_error(actual, expected) <= precision.tolerance:
            break
        images = torch.randn_like(steps["escnn"].images)
        for step in steps.values():
            step.images = images
    return check(f"{case.name}, {method}", actual, expected, precision.tolerance)


def _steps(case, device, precision, layout):
    """{method: Step}, on the same images."""
    theirs, ours = _uninitialised(case, device), case.build(equiconv_nn(), device)
    theirs.load_state_dict(ours.state_dict())
    built = {"escnn": theirs, "equiconv_convolutions": accelerate_convolutions(copy.deepcopy(theirs)), "equiconv": ours,
             "equiconv_irreps": accelerate(copy.deepcopy(ours), irrep_domain=True),
             **{method: _build(name, escnn.nn, case.size_on(device))
                for method, name in (("torch", f"{case.twin}_wide"), ("twin", case.twin))}}
    shape = case.shape_on(device)
    images = torch.randn(case.batch_on(device), *shape, device=device, dtype=precision.activations)
    if layout == "channels_last":
        images = images.contiguous(memory_format={3: torch.channels_last, 4: torch.channels_last_3d}[len(shape)])
    labels = torch.arange(len(images), device=device) % 3  # all have three classes or more
    return {method: Step(model.to(device, precision.parameters).train(), images, labels, precision)
            for method, model in built.items()}


def accelerate_convolutions(model):
    """The model with its convolutions and linear maps accelerated alone, in place."""
    import equiconv
    from equiconv.nn import ACCELERATED
    from equiconv.nn.expanded import Expanded
    for module in model.modules():
        if issubclass(ACCELERATED.get(type(module), object), Expanded):
            equiconv.accelerate(module)
    return model


def _build(name, nn, options):
    torch.manual_seed(0)
    return models.create(name, nn, **options)


def _uninitialised(case, device):
    """escnn's network without its initialisation, which takes minutes: it gets equiconv's weights."""
    with ExitStack() as stack:
        for method in ("generalized_he_init", "deltaorthonormal_init"):
            stack.enter_context(patch.object(escnn.nn.init, method, lambda *_, **__: None))
        return case.build(escnn.nn, device)
