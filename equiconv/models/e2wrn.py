"""Wide residual networks that are equivariant to fewer rotations and reflections from stage to stage."""
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from .groups import parse_group, plane_of, restriction
from .registry import register

STAGE_PLANES = (16, 32, 64)  # of a conventional wide residual network, times its widening factor
STAGE_STRIDES = (1, 2, 2)
STEM_PLANES, STEM_KERNEL = 16, 5
FREQUENCIES = 3.0  # cycles of the filters' harmonics, times the radius of their ring


def e2wrn(nn, *, depth=28, widening=10, group="D8", restricted=None, kernels=None, stride=1, dropout=0.3,
          delta_orthogonal=True, in_channels=3, classes=10):
    """E2WRN, with as many parameters as the conventional wide residual network of that depth and widening factor.

    nn                namespace of layers: escnn.nn or equiconv.nn
    depth             of the conventional network: 6 * blocks per stage + 4
    widening          its widening factor
    group             of the stem and the first stage: D8 (rotations by 45 degrees, reflections), C8 (rotations), ...
    restricted        groups of the other two stages: ("D4", "D1") for example, subgroups of those before; by default
                      with half as many rotations, then without
    kernels           kernel sizes of the three stages, in pixels; by default the paper's: 3 for groups that map the
                      grid to itself, 5 for others. escnn's example has 5 in stages without rotations: (5, 3, 5)
    stride            of the first stage; published: 2 for STL-10
    dropout           of each block
    delta_orthogonal  initialises so, as published; otherwise by He's method
    in_channels       scalar channels of the input
    classes           outputs

    Equivariant to the last stage's group, exactly for its reflections and rotations by multiples of 90 degrees on
    images whose size is odd before each stride.

    Raises ValueError for a depth, groups or kernels that do not fit.
    """
    groups = _groups(group, restricted)
    if kernels is None:
        kernels = [3 if 4 % rotations == 0 else 5 for _, rotations in groups]
    check_depth(depth, kernels)
    model = E2WRN(nn, (depth - 4) // 6, widening, groups, kernels, stride, dropout, in_channels, classes)
    initialise(nn, model, delta_orthogonal)
    return model


class E2WRN(torch.nn.Module):
    """A 5x5 stem, three stages of pre-activated residual blocks on regular fields, pooling, a linear classifier.

    forward: images [B, in_channels, H, W] -> logits [B, classes]
    in_type: field type of the images

    Use e2wrn(): the weights of the convolutions are left zero here.
    """

    def __init__(self, nn, blocks, widening, groups, kernels, stride, dropout, in_channels, classes):
        super().__init__()
        space = plane_of(*groups[0])
        self.in_type = nn.FieldType(space, in_channels * [space.trivial_repr])
        fields = _regular(nn, space, STEM_PLANES)
        layers = [_conv(nn, self.in_type, fields, STEM_KERNEL)]
        strides = (stride, *STAGE_STRIDES[1:])
        for i, (planes, kernel, stride) in enumerate(zip(STAGE_PLANES, kernels, strides, strict=True)):
            if i > 0 and groups[i] != groups[i - 1]:
                layers += restriction(nn, fields, *groups[i])
                fields = layers[-1].out_type
            inner = _regular(nn, fields.gspace, planes * widening)
            for block in range(blocks):
                last = i == len(groups) - 1 and block == blocks - 1
                out = _invariant(nn, fields.gspace, planes * widening) if last else inner
                layers.append(WideBlock(nn, fields, inner, out, kernel, stride if block == 0 else 1, dropout))
                fields = out
        layers += [nn.InnerBatchNorm(fields, momentum=0.9), nn.ReLU(fields, inplace=True)]
        self.features = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(fields.size, classes)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        invariant = self.features(self.in_type(images)).tensor
        return self.head(invariant.mean((2, 3)))


class WideBlock(torch.nn.Module):
    """Batch norm, ReLU and R2Conv, twice, with dropout between, beside a skip connection.

    forward: GeometricTensor of in_type -> GeometricTensor of out_type
    """

    def __init__(self, nn, in_type, inner_type, out_type, kernel, stride, dropout):
        super().__init__()
        self.activated = nn.SequentialModule(nn.InnerBatchNorm(in_type), nn.ReLU(in_type, inplace=True))
        self.residual = nn.SequentialModule(
            _conv(nn, in_type, inner_type, kernel), nn.InnerBatchNorm(inner_type), nn.ReLU(inner_type, inplace=True),
            nn.PointwiseDropout(inner_type, dropout), _conv(nn, inner_type, out_type, kernel, stride))
        self.skip = None
        if stride != 1 or in_type != out_type:
            self.skip = _conv(nn, in_type, out_type, 1, stride)

    def forward(self, fields):
        activated = self.activated(fields)
        return self.residual(activated) + (fields if self.skip is None else self.skip(activated))


def initialise(nn, model, delta_orthogonal):
    """Draws the weights of all R2Conv of a model, from torch's global generator."""
    init = nn.init.deltaorthonormal_init if delta_orthogonal else nn.init.generalized_he_init
    with _numpy_follows_torch():
        for module in model.modules():
            if isinstance(module, nn.R2Conv) and not module.weights.is_meta:
                init(module.weights.data, module.basisexpansion)


@contextmanager
def _numpy_follows_torch():
    """Delta-orthogonal initialisation draws rotations from NumPy's global generator too."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(torch.randint(2 ** 31, (), device="cpu").item())  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _groups(first, others):
    """[(has reflections, rotations)] of the three stages."""
    groups = [parse_group(first)]
    if others is None:
        reflections, rotations = groups[0]
        return [*groups, (reflections, max(1, rotations // 2)), (reflections, 1)]
    groups += map(parse_group, others)
    if len(groups) != 3:
        raise ValueError(f"restricted must name the groups of two stages, got {len(groups) - 1}")
    for (reflections, rotations), (fewer_reflections, fewer) in zip(groups, groups[1:]):
        if reflections != fewer_reflections or rotations % fewer:
            raise ValueError(f"each stage's group must be a subgroup of that before, with reflections or without like "
                             f"it, got {', '.join([first, *others])}")
    return groups


def _conv(nn, in_type, out_type, kernel, stride=1):
    return nn.R2Conv(in_type, out_type, kernel, padding=kernel // 2, stride=stride, bias=False, sigma=None,
                     frequencies_cutoff=FREQUENCIES, initialize=False)


def _regular(nn, space, planes):
    """So many regular fields that a convolution between two such types has the parameters of one between planes."""
    order = space.fibergroup.order()
    return nn.FieldType(space, int(planes * math.sqrt(order) / order) * [space.regular_repr])


def _invariant(nn, space, planes):
    """About as many channels as _regular has, in scalar fields."""
    return nn.FieldType(space, int(planes * math.sqrt(space.fibergroup.order())) * [space.trivial_repr])


def check_depth(depth, kernels):
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 * blocks + 4, that is 10, 16, 22, 28, ..., got {depth}")
    if len(kernels) != 3 or any(k % 2 == 0 for k in kernels):
        raise ValueError(f"kernels must be three odd numbers, got {tuple(kernels)}")


PAPER = "Weiler, Cesa: General E(2)-Equivariant Steerable CNNs, NeurIPS 2019; escnn, examples/e2wrn.py"
for _name, _settings, _group, _shape, _results in (
    ("e2wrn10_4", {"depth": 10, "widening": 4, "group": "D4", "restricted": ("D4", "D4")}, "D4", (3, 33, 33), ""),
    ("e2wrn16_8", {"depth": 16, "widening": 8, "stride": 2}, "D8, D4, D1", (3, 96, 96), ": 9.80 % error on STL-10"),
    ("e2wrn28_7", {"depth": 28, "widening": 7}, "D8, D4, D1", (3, 32, 32), ""),
    ("e2wrn28_10", {"depth": 28, "widening": 10}, "D8, D4, D1", (3, 32, 32),
     ": 2.05 % error on CIFAR-10, 14.30 % on CIFAR-100"),
):
    register(name=_name, citation=PAPER + _results, input_shape=_shape, group=_group)(partial(e2wrn, **_settings))
