"""Steerable convolutions: factorised, by one op; or the filter by one op for all pairs, the convolution by torch."""
from dataclasses import dataclass
from functools import partial

import escnn.nn
import torch.nn.functional as F
from escnn.nn import GeometricTensor
from torch import nn

from .. import fused
from ..formats import LOW_PRECISION
from ..library import autocast_dtype
from ..ops import fused_steerable_conv, pack_weights, steerable_conv
from .bases import FIELDS, Bases, InIrreps
from .checks import check_dtype, check_input, checked_init
from .construction import IcosahedralOrbits, SteerableShells
from .expanded import Expanded
from .planner import BACKENDS, Planned
from .tensors import is_channels_last, like

IN_PLACE = {"identity": lambda y, alpha: y, "relu": lambda y, alpha: y.relu_(), "leaky_relu": F.leaky_relu_,
            "elu": F.elu_, "sigmoid": lambda y, alpha: y.sigmoid_(), "tanh": lambda y, alpha: y.tanh_()}


@dataclass(frozen=True)
class Activation:
    """A pointwise function, by the names of ops.steerable_conv."""
    name: str = "identity"
    alpha: float = 1.0

    def apply_(self, y):
        return IN_PLACE[self.name](y, self.alpha)


IN_FUSED_KERNELS = tuple(map(Activation, fused.ACTIVATIONS))


class _Conv(SteerableShells, Planned, Expanded):
    """The computation of R2Conv and R3Conv."""

    @property
    def kernel(self):
        return (self.kernel_size,) * self.d

    def forward(self, input, norm=None, activation=Activation(), writes_irreps=False):
        """input: GeometricTensor [B, in_type.size, *spatial] -> GeometricTensor [B, out_type.size, *spatial].

        norm           a batch norm of fields in evaluation, to compute with it (see why_not_foldable)
        activation     an Activation of the result
        writes_irreps  whether to return an InIrreps; one is read in any case (see irrep_domain)
        """
        check_input(self, input)
        x, bases = input.tensor, Bases(isinstance(input, InIrreps), writes_irreps)
        method = self.method_for(x, bases, norm)
        if method == "dense":
            y = activation.apply_(self._dense(x, norm, bases))
        else:
            pack = partial(self._pack, bases=bases) if BACKENDS[method] == "native" else None
            weights, bias, packed = self.weights_and_bias(norm, bases, pack)
            y = self.factorised(x, weights, bias, method, bases, activation, packed)
        y = like(y, x)  # torch's convolutions with kernels of size 1 lose channels_last
        return (InIrreps if writes_irreps else GeometricTensor)(y, self.out_type, coords=None)

    def _dense(self, x, norm, bases):
        filter, bias = self.filter_and_bias(is_channels_last(x), norm, bases)
        if autocast_dtype(x.device.type) is None:
            check_dtype(self, x, filter)
        return self._convolve(x, filter, bias)

    def _pack(self, weights, bases):
        return pack_weights(weights, self.plan.in_irreps(*bases), self.kernel, stride=self.stride,
                            dilation=self.dilation, groups=self.groups, transposed=self.transposed)

    def factorised(self, x, weights, bias, method, bases=FIELDS, activation=Activation(), packed=None):
        """The convolution of a tensor x with these weights, and the bias of each channel or None.

        method  one of METHODS but "dense"
        packed  the same weights packed, or None
        """
        dtype = autocast_dtype(x.device.type)
        if dtype is not None:
            x = x.to(dtype)
        if x.dtype in LOW_PRECISION:
            weights, bias = weights.float(), None if bias is None else bias.to(x.dtype)
        plan = self.plan.in_irreps(*bases)
        if method == "fused":
            inside = activation if activation in IN_FUSED_KERNELS else Activation()
            y = fused_steerable_conv(x, weights, plan, self.kernel, bias=bias, stride=self.stride, padding=self.padding,
                                     padding_mode=self.padding_mode, activation=inside.name)
            return y if inside is activation else activation.apply_(y)
        return steerable_conv(x, weights, plan, self.kernel, bias=bias, stride=self.stride, dilation=self.dilation,
                              padding=self.padding, groups=self.groups, backend=BACKENDS[method],
                              activation=activation.name, alpha=activation.alpha, packed=packed, **self._options())

    def _options(self):
        """What a convolution and a transposed one do not have in common, for ops.steerable_conv."""
        return {"padding_mode": self.padding_mode}

    def _convolve(self, x, filter, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), 0
        convolution = (F.conv2d, F.conv3d)[self.d - 2]
        return convolution(x, filter, bias, self.stride, padding, self.dilation, self.groups)

    def evaluate_output_shape(self, input_shape):
        """Shape of the output for an input of shape [B, in_type.size, *spatial]."""
        self._check_shape(input_shape)
        spatial = [(size + 2 * padding - self.dilation * (self.kernel_size - 1) - 1) // stride + 1
                   for size, padding, stride in zip(input_shape[2:], self._each(self.padding), self._each(self.stride))]
        return (input_shape[0], self.out_type.size, *spatial)

    def export(self):
        """A torch.nn.Conv2d or Conv3d with the same filter; sets this module to eval mode, as escnn does."""
        self.eval()
        return self._export((nn.Conv2d, nn.Conv3d)[self.d - 2], padding_mode=self.padding_mode)

    def _export(self, cls, **options):
        return self._fill(cls(self.in_type.size, self.out_type.size, self.kernel_size, stride=self.stride,
                              padding=self.padding, dilation=self.dilation, groups=self.groups,
                              bias=self.bias is not None, **options))

    def _each(self, value):
        return value if isinstance(value, (tuple, list)) else (value,) * self.d

    def _check_shape(self, input_shape):
        if len(input_shape) != 2 + self.d or input_shape[1] != self.in_type.size:
            raise ValueError(f"{type(self).__name__}: input_shape must have {2 + self.d} elements, the second of them "
                             f"{self.in_type.size}, got {tuple(input_shape)}")


class _ConvTransposed(_Conv):
    """The computation of R2ConvTransposed and R3ConvTransposed."""

    transposed = True

    def _options(self):
        return {"transposed": True, "output_padding": self.output_padding}

    def _convolve(self, x, filter, bias):
        convolution = (F.conv_transpose2d, F.conv_transpose3d)[self.d - 2]
        return convolution(x, filter, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def evaluate_output_shape(self, input_shape):
        """Shape of the output for an input of shape [B, in_type.size, *spatial]."""
        self._check_shape(input_shape)
        options = (self._each(self.padding), self._each(self.stride), self._each(self.output_padding))
        spatial = [(size - 1) * stride - 2 * padding + self.dilation * (self.kernel_size - 1) + output_padding + 1
                   for size, padding, stride, output_padding in zip(input_shape[2:], *options)]
        return (input_shape[0], self.out_type.size, *spatial)

    def export(self):
        """A torch.nn.ConvTranspose2d or 3d with the same filter; sets this module to eval mode, as escnn does."""
        self.eval()
        return self._export((nn.ConvTranspose2d, nn.ConvTranspose3d)[self.d - 2], output_padding=self.output_padding)


class R2Conv(_Conv, escnn.nn.R2Conv):
    """escnn.nn.R2Conv, with the same arguments, parameters and state."""
    __init__ = checked_init(escnn.nn.R2Conv, 2)


class R3Conv(_Conv, escnn.nn.R3Conv):
    """escnn.nn.R3Conv, with the same arguments, parameters and state."""
    __init__ = checked_init(escnn.nn.R3Conv, 3)


class R3IcoConv(IcosahedralOrbits, R3Conv, escnn.nn.R3IcoConv):
    """escnn.nn.R3IcoConv, with the same arguments, parameters and state."""
    __init__ = checked_init(escnn.nn.R3IcoConv, 3)


class R2ConvTransposed(_ConvTransposed, escnn.nn.R2ConvTransposed):
    """escnn.nn.R2ConvTransposed, with the same arguments, parameters and state."""
    __init__ = checked_init(escnn.nn.R2ConvTransposed, 2)


class R3ConvTransposed(_ConvTransposed, escnn.nn.R3ConvTransposed):
    """escnn.nn.R3ConvTransposed, with the same arguments, parameters and state."""
    __init__ = checked_init(escnn.nn.R3ConvTransposed, 3)


class R3IcoConvTransposed(IcosahedralOrbits, R3ConvTransposed, escnn.nn.R3IcoConvTransposed):
    """escnn.nn.R3IcoConvTransposed, with the same arguments, parameters and state."""
    __init__ = checked_init(escnn.nn.R3IcoConvTransposed, 3)
