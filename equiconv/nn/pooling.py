"""Pooling over space."""
import escnn.nn
import torch
import torch.nn.functional as F
from torch import nn

from ..formats import compute_dtype, is_channels_last
from ..ops import norm_max_pool, window_pool
from .fields import ByField, Pooling, sizes_of
from .tensors import OnTensors, adopting_init, as_for_product, is_fused


class NormMaxPool(OnTensors, ByField, Pooling, escnn.nn.NormMaxPool):
    """escnn.nn.NormMaxPool, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.NormMaxPool)
    keeps_coords = False

    def _adopt(self):
        sizes = sizes_of(self.in_type)
        self._group_fields(sizes, sizes)
        self._tabulate_pool(sizes, sizes)

    def _compute(self, x):
        if is_fused(x):
            return norm_max_pool(x, self._fields, self._elements, window=self.kernel_size, stride=self.stride,
                                 padding=self.padding, dilation=self.dilation, ceil_mode=self.ceil_mode)
        return self._join([self._largest(part, group.size) for part, group in zip(self._split(x), self._groups)])

    def _largest(self, part, size):
        wide = part.detach() * part.new_ones(1, dtype=torch.float32)  # rounded norms would be equal too often
        index = F.max_pool2d(wide.square().sum(2).sqrt(), self.kernel_size, self.stride, self.padding, self.dilation,
                             self.ceil_mode, return_indices=True)[1]
        chosen = part.flatten(3).gather(3, index.flatten(2).unsqueeze(2).expand(-1, -1, size, -1))
        return chosen.flatten(1, 2).unflatten(2, (index.size(2), index.size(3)))


def _weights(module, x):
    """The filter of an antialiased pooling as ops.window_pool takes it: [taps, channels]."""
    return module.filter.flatten(1).mT.to(compute_dtype(x.dtype))


class _Antialiased(OnTensors):
    """The computation of PointwiseAvgPoolAntialiased2D and 3D: a depthwise convolution with a Gaussian."""

    keeps_coords = False

    def _compute(self, x):
        if len(self.kernel_size) == 3 and is_fused(x) and x.requires_grad:  # else torch's one kernel is the faster one
            x = as_for_product(x)
            return window_pool(x, _weights(self, x), kernel=self.kernel_size, stride=self.stride, padding=self.padding)
        convolution = (F.conv2d, F.conv3d)[len(self.kernel_size) - 2]
        x = as_for_product(x)
        return convolution(x, self.filter.to(x.dtype), None, self.stride, self.padding, groups=self.in_type.size)

    def export(self):
        """A depthwise torch.nn.Conv2d or Conv3d with the same filter; sets this module to eval mode."""
        self.eval()
        cls = (nn.Conv2d, nn.Conv3d)[len(self.kernel_size) - 2]
        channels = self.in_type.size
        plain = cls(channels, channels, self.kernel_size, self.stride, self.padding, groups=channels, bias=False)
        plain.weight = nn.Parameter(self.filter.clone(), requires_grad=False)
        return plain.eval()


class PointwiseAvgPoolAntialiased2D(_Antialiased, escnn.nn.PointwiseAvgPoolAntialiased2D):
    """escnn.nn.PointwiseAvgPoolAntialiased2D, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.PointwiseAvgPoolAntialiased2D)


class PointwiseAvgPoolAntialiased3D(_Antialiased, escnn.nn.PointwiseAvgPoolAntialiased3D):
    """escnn.nn.PointwiseAvgPoolAntialiased3D, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.PointwiseAvgPoolAntialiased3D)


PointwiseAvgPoolAntialiased = PointwiseAvgPoolAntialiased2D


class _Pool(OnTensors):
    """The computation of a pooling of torch's, channel by channel.

    functions, layers   torch's for two dimensions and for three
    options             the attributes that both take
    """

    keeps_coords = False

    def _each(self, implementations):
        """The implementation for this module's number of dimensions, and its options."""
        options = {name: getattr(self, name) for name in self.options}
        return implementations[self.in_type.gspace.dimensionality - 2], options

    def _compute(self, x):
        function, options = self._each(self.functions)
        return function(x, **options).to(x.dtype)  # autocast widens it in three dimensions

    def export(self):
        """torch's module of the same options; sets this module to eval mode."""
        self.eval()
        cls, options = self._each(self.layers)
        return cls(**options).eval()


class _MaxPool(_Pool):
    functions, layers = (F.max_pool2d, F.max_pool3d), (nn.MaxPool2d, nn.MaxPool3d)
    options = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


class PointwiseMaxPool2D(_MaxPool, escnn.nn.PointwiseMaxPool2D):
    """escnn.nn.PointwiseMaxPool2D, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseMaxPool2D, supports="pointwise")


class PointwiseMaxPool3D(_MaxPool, escnn.nn.PointwiseMaxPool3D):
    """escnn.nn.PointwiseMaxPool3D, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseMaxPool3D, supports="pointwise")


PointwiseMaxPool = PointwiseMaxPool2D


class _AvgPool(_Pool):
    functions, layers = (F.avg_pool2d, F.avg_pool3d), (nn.AvgPool2d, nn.AvgPool3d)
    options = ("kernel_size", "stride", "padding", "ceil_mode")


class PointwiseAvgPool2D(_AvgPool, escnn.nn.PointwiseAvgPool2D):
    """escnn.nn.PointwiseAvgPool2D, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseAvgPool2D)


class PointwiseAvgPool3D(_AvgPool, escnn.nn.PointwiseAvgPool3D):
    """escnn.nn.PointwiseAvgPool3D, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseAvgPool3D)

    def _compute(self, x):
        wide = x.float() if x.device.type == "cpu" and x.itemsize < 4 else x  # torch has no narrower one on the CPU
        return super()._compute(wide).to(x.dtype)


PointwiseAvgPool = PointwiseAvgPool2D


class _AdaptiveAvgPool(_Pool):
    functions = (F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    layers = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    options = ("output_size",)


class PointwiseAdaptiveAvgPool2D(_AdaptiveAvgPool, escnn.nn.PointwiseAdaptiveAvgPool2D):
    """escnn.nn.PointwiseAdaptiveAvgPool2D, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseAdaptiveAvgPool2D, supports="pointwise")


class PointwiseAdaptiveAvgPool3D(_AdaptiveAvgPool, escnn.nn.PointwiseAdaptiveAvgPool3D):
    """escnn.nn.PointwiseAdaptiveAvgPool3D, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseAdaptiveAvgPool3D, supports="pointwise")


PointwiseAdaptiveAvgPool = PointwiseAdaptiveAvgPool2D


class _AdaptiveMaxPool(_Pool):
    functions = (F.adaptive_max_pool2d, F.adaptive_max_pool3d)
    layers = (nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
    options = ("output_size",)


class PointwiseAdaptiveMaxPool2D(_AdaptiveMaxPool, escnn.nn.PointwiseAdaptiveMaxPool2D):
    """escnn.nn.PointwiseAdaptiveMaxPool2D, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseAdaptiveMaxPool2D, supports="pointwise")


class PointwiseAdaptiveMaxPool3D(_AdaptiveMaxPool, escnn.nn.PointwiseAdaptiveMaxPool3D):
    """escnn.nn.PointwiseAdaptiveMaxPool3D, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseAdaptiveMaxPool3D, supports="pointwise")


PointwiseAdaptiveMaxPool = PointwiseAdaptiveMaxPool2D


class _AntialiasedMaxPool(OnTensors):
    """The computation of PointwiseMaxPoolAntialiased2D and 3D: a maximum around every pixel, then a Gaussian."""

    keeps_coords = False

    def _compute(self, x):
        if is_fused(x) and not (self.d == 2 and x.device.type == "cpu" and is_channels_last(x)):  # torch is faster
            x = as_for_product(x)
            return window_pool(x, _weights(self, x), window=self.kernel_size, window_padding=self.padding,
                               dilation=self.dilation, kernel=self.filter.shape[2:], stride=self.stride,
                               padding=self._pad)
        pool, convolution = ((F.max_pool2d, F.conv2d), (F.max_pool3d, F.conv3d))[self.d - 2]
        largest = pool(x, self.kernel_size, 1, self.padding, self.dilation, self.ceil_mode)
        return convolution(largest, self.filter, None, self.stride, self._pad, groups=self.in_type.size)


class PointwiseMaxPoolAntialiased2D(_AntialiasedMaxPool, escnn.nn.PointwiseMaxPoolAntialiased2D):
    """escnn.nn.PointwiseMaxPoolAntialiased2D, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.PointwiseMaxPoolAntialiased2D, supports="pointwise")


class PointwiseMaxPoolAntialiased3D(_AntialiasedMaxPool, escnn.nn.PointwiseMaxPoolAntialiased3D):
    """escnn.nn.PointwiseMaxPoolAntialiased3D, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.PointwiseMaxPoolAntialiased3D, supports="pointwise")


PointwiseMaxPoolAntialiased = PointwiseMaxPoolAntialiased2D
