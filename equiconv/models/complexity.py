"""How large a network is, and how much arithmetic it takes: found from shapes alone, on the meta device."""
import math
from dataclasses import dataclass

import escnn.nn
import torch
from escnn.nn.modules.conv.rd_convolution import _RdConv
from escnn.nn.modules.conv.rd_transposed_convolution import _RdConvTransposed

from .harmonic import HarmonicConv

DENSE = (torch.nn.modules.conv._ConvNd, torch.nn.Linear)
HARMONIC = (HarmonicConv,)
STEERABLE = (_RdConv, _RdConvTransposed, escnn.nn.Linear)


@dataclass(frozen=True)
class Complexity:
    """parameters  trained numbers
    macs        multiplications and additions of convolutions and linear layers for one input, their filters expanded
    """
    parameters: int
    macs: int


def complexity(model, input_shape):
    """Complexity of a model.

    model        its parameters and buffers are moved to the meta device: it is of no other use afterwards
    input_shape  of one input, without the batch: [C, H, W] for images
    """
    model = model.to("meta").eval()
    counts = []

    def count(module, inputs, output):
        x, y = (t if isinstance(t, torch.Tensor) else t.tensor for t in (inputs[0], output))
        counts.append(_macs(module, x.shape, y.shape))

    for module in model.modules():
        if isinstance(module, STEERABLE):
            module.forward = _shapes_only(module)  # expanding a filter takes values
        if isinstance(module, DENSE + HARMONIC + STEERABLE):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, *input_shape, device="meta"))
    return Complexity(sum(p.numel() for p in model.parameters() if p.requires_grad), sum(counts))


def _shapes_only(module):
    def forward(fields):
        shape = module.evaluate_output_shape(tuple(fields.shape))
        return escnn.nn.GeometricTensor(fields.tensor.new_empty(shape), module.out_type)
    return forward


def _macs(module, in_shape, out_shape):
    taps = 1
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        taps = math.prod(module.kernel_size)
    elif not isinstance(module, (torch.nn.Linear, escnn.nn.Linear)):
        taps = module.kernel_size ** module.d
    transposed = isinstance(module, (_RdConvTransposed, torch.nn.modules.conv._ConvTransposeNd))
    positions = math.prod((in_shape if transposed else out_shape)[2:])
    return in_shape[1] * out_shape[1] // getattr(module, "groups", 1) * taps * positions
