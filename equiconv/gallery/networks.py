"""The two networks of the demonstration, with random weights: one steerable, one conventional, of equal parameters."""
from itertools import pairwise

import torch

SETTINGS = {2: {"frequency": 3, "widths": (8, 8), "kernel": 9}, 3: {"frequency": 2, "widths": (4, 6), "kernel": 5}}
NAMES = ("steerable CNN", "conventional CNN")


def steerable(dimensions, frequency, widths, kernel):
    """From one scalar field to a scalar and a vector field: convolutions of SO(2) or SO(3), gated nonlinearities.

    frequency  of the irreps in its hidden fields: all up to that
    widths     how many fields of each there are, layer by layer
    kernel     size in pixels
    """
    from escnn import gspaces

    from .. import nn
    space = gspaces.rot2dOnR2(-1, maximum_frequency=frequency) if dimensions == 2 else gspaces.rot3dOnR3()
    convolution = nn.R2Conv if dimensions == 2 else nn.R3Conv
    vector = space.irrep(1) if dimensions == 2 else space.fibergroup.standard_representation()  # (x, y[, z])
    fields, layers = nn.FieldType(space, [space.trivial_repr]), []
    for width in widths:
        out = nn.FieldType(space, [space.irrep(l) for l in range(frequency + 1) for _ in range(width)])
        gates = nn.FieldType(space, len(out) * [space.trivial_repr])
        gated = nn.GatedNonLinearity1(gates + out, len(out) * ["gate"] + len(out) * ["gated"])
        layers += [convolution(fields, gated.in_type, kernel, padding=kernel // 2, bias=False), gated]
        fields = gated.out_type
    out = nn.FieldType(space, [space.trivial_repr, vector])
    return nn.SequentialModule(*layers, convolution(fields, out, kernel, padding=kernel // 2, bias=False))


def conventional(dimensions, parameters, layers, kernel):
    """A CNN with as many layers and kernels of that size, and about as many parameters; 1 channel to 1 + dimensions."""
    def channels(width):
        return pairwise([1, *[width] * (layers - 1), 1 + dimensions])

    def excess(width):
        return abs(kernel ** dimensions * sum(i * o for i, o in channels(width)) - parameters)

    convolution = (torch.nn.Conv2d, torch.nn.Conv3d)[dimensions - 2]
    modules = []
    for i, o in channels(min(range(1, 1000), key=excess)):
        modules += [convolution(i, o, kernel, padding=kernel // 2, bias=False), torch.nn.ELU()]
    return torch.nn.Sequential(*modules[:-1])


def both(dimensions, seed):
    """{name: function from [B, 1, *spatial] to [B, 1 + dimensions, *spatial]}, {name: number of parameters}."""
    torch.manual_seed(seed)
    settings = SETTINGS[dimensions]
    turning = steerable(dimensions, **settings).eval()
    size = _size(turning)
    plain = conventional(dimensions, size, len(settings["widths"]) + 1, settings["kernel"]).eval()
    answers = (lambda x: turning(turning.in_type(x)).tensor), plain
    return dict(zip(NAMES, answers)), dict(zip(NAMES, (size, _size(plain))))


def _size(module):
    return sum(p.numel() for p in module.parameters())
