"""Complex fields that turn under rotations, convolved with circular harmonics: the layers of harmonic networks.

A complex field of rotation order n is multiplied by e^(i n a) when the image turns by the angle a. It lies as two
channels, its real and its imaginary part: the irrep of frequency n of SO(2), or two scalars where n = 0.

D. Worrall, S. Garbin, D. Turmukhambetov, G. Brostow, Harmonic Networks: Deep Translation and Rotation Equivariance,
CVPR 2017: section 4.

The filters are those kernels steerable by SO(2) that commute with i, so that a convolution with them can be factorised.
"""
import math
from functools import lru_cache

import torch
from escnn.nn import EquivariantModule, GeometricTensor
from torch.nn import functional as F

from .. import nn
from ..nn.construction import built_on_cpu
from ..nn.fields import Tabulated
from ..nn.tensors import like
from ..ops import expand_filter

RING_WIDTH = 0.5  # standard deviation of the Gaussian profile of a ring, in pixels
LEAST_MODULUS = 1e-6  # by which a field is divided


def complex_fields(nn, plane, orders, channels):
    """The field type of `channels` complex fields of each rotation order, order by order.

    plane  gspaces.rot2dOnR2(-1, maximum_frequency=...) with all orders among its frequencies
    """
    from escnn import group

    scalar = group.directsum([plane.trivial_repr] * 2, name="complex_0")
    return nn.FieldType(plane, [plane.irrep(n) if n else scalar for n in orders for _ in range(channels)])


class HarmonicConv(Tabulated, EquivariantModule):
    """Convolution of complex fields with filters R(r) e^(i (m p + b)), in polar coordinates r, p of the taps.

    Between fields of orders n and n' the order of the filter is m = n' - n. The radial profile R, a sum of Gaussian
    rings, and the phase b are learned, for each m and each pair of channels: fields of all orders share them.

    in_type      of complex_fields; or scalar fields, taken as real ones of order 0
    out_type     of complex_fields
    kernel_size  in pixels; odd
    rings        of the profile, at equal distances from the centre to the middle of the border
    padding      with zeros, in pixels
    phase        whether b is learned; 0 otherwise
    factorised   whether it is computed as equiconv.nn.R2Conv is, by the method that is faster; else always densely

    method   of the convolution that computes it, as R2Conv has it; always "dense" if not factorised
    profile  [orders m, out channels, in channels, rings]
    phase    [orders m, out channels, in channels], in radians; or None

    forward: GeometricTensor [B, C, H, W] of in_type -> of out_type

    Raises ValueError for other types or an even kernel size.
    """
    d = 2

    def __init__(self, in_type, out_type, kernel_size, *, rings=4, padding=0, phase=True, factorised=True):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.in_type, self.out_type, self.kernel_size, self.padding = in_type, out_type, kernel_size, padding
        in_orders, in_channels, self.is_real = _streams(in_type, "in_type")
        out_orders, out_channels, out_is_real = _streams(out_type, "out_type")
        if out_is_real:
            raise ValueError(f"out_type must be of complex fields, got {out_type}")
        orders = sorted({o - i for o in out_orders for i in in_orders})
        self.pairs = [[orders.index(o - i) for i in in_orders] for o in out_orders]
        shape = len(orders), out_channels, in_channels
        variance = 2 / (len(in_orders) * in_channels * rings)  # He's, for rings of unit norm
        self.profile = torch.nn.Parameter(math.sqrt(variance) * torch.randn(*shape, rings))
        self.phase = torch.nn.Parameter(2 * math.pi * torch.rand(shape)) if phase else None
        # Not registered as a submodule: its weights are made of this module's, and no part of the state.
        self.__dict__["_steerable"] = None
        self._mixed = []  # (order m, buffer) that the weights of each pair of orders are made of
        with built_on_cpu(self):
            self.register_buffer("harmonics", _harmonics(orders, rings, kernel_size), persistent=False)
            if factorised:
                self._make_steerable(in_orders, out_orders, rings)

    def _make_steerable(self, in_orders, out_orders, rings):
        self.__dict__["_steerable"] = _steerable(self.in_type, self.out_type, self.kernel_size, rings, self.padding)
        channels = len(self.in_type) // len(in_orders), len(self.out_type) // len(out_orders)
        for pair in self._steerable.plan.pairs:
            i, o = (fields.channels[0] // fields.layout.size // count
                    for fields, count in zip((pair.in_fields, pair.out_fields), channels))
            mixing = _mixing(None if self.is_real else in_orders[i], out_orders[o], rings, self.kernel_size)
            self._mixed.append((self.pairs[o][i], f"mixing{len(self._mixed)}"))
            self.register_buffer(self._mixed[-1][1], mixing.clone(), persistent=False)

    @property
    def planned(self):
        """The R2Conv that computes it, whose weights are of no use; or None if not factorised."""
        return self._steerable

    @property
    def method(self):
        return "dense" if self._steerable is None else self._steerable.method

    @method.setter
    def method(self, value):
        if self._steerable is None:
            raise ValueError("a HarmonicConv with factorised=False is always dense")
        self._steerable.method = value

    def filter(self):
        """[C out, C in, kernel_size, kernel_size]"""
        real, imaginary = torch.einsum("moir,cmrxy->cmoixy", self.profile, self.harmonics)
        if self.phase is not None:
            cos, sin = self.phase.cos()[..., None, None], self.phase.sin()[..., None, None]
            real, imaginary = cos * real - sin * imaginary, sin * real + cos * imaginary
        columns = [torch.stack([real, imaginary])]  # what the real part of the input is multiplied by
        if not self.is_real:
            columns.append(torch.stack([-imaginary, real]))
        parts = torch.stack(columns)[:, :, self.pairs]  # [in part, out part, out order, in order, out, in, k, k]
        return parts.permute(2, 4, 1, 3, 5, 0, 6, 7).reshape(self.out_type.size, self.in_type.size,
                                                             self.kernel_size, self.kernel_size)

    def steerable_weights(self):
        """Those of an R2Conv that has the same filter."""
        weights = self.profile  # of the harmonics; then also of their products with i
        if self.phase is not None:
            cos, sin = self.phase.cos()[..., None], self.phase.sin()[..., None]
            weights = torch.cat([cos * weights, sin * weights], -1)
        return torch.cat([(weights[m] @ getattr(self, mixing)[:weights.shape[-1]]).flatten()
                          for m, mixing in self._mixed])

    def forward(self, x):
        if x.type != self.in_type:
            raise ValueError(f"the input must be of type {self.in_type}, got {x.type}")
        method = "dense" if self._steerable is None else self._steerable.method_for(x.tensor)
        if method == "dense":
            y = F.conv2d(x.tensor, self.filter(), padding=self.padding)
        else:
            y = self._steerable.factorised(x.tensor, self.steerable_weights(), None, method)
        return GeometricTensor(like(y, x.tensor), self.out_type)

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self._steerable is not None and not self.profile.is_meta:  # nothing would bring its tables back
            self._steerable.to(self.profile.device, self.profile.dtype)
        return self

    def train(self, mode=True):
        if self._steerable is not None:
            self._steerable.train(mode)  # its method depends on it
        return super().train(mode)

    def evaluate_output_shape(self, input_shape):
        batch, _, *spatial = input_shape
        return (batch, self.out_type.size, *(n + 2 * self.padding - self.kernel_size + 1 for n in spatial))


class ModulusReLU(EquivariantModule):
    """z -> relu(|z| + b) z / |z| of complex fields, with b learned for each.

    forward: GeometricTensor of in_type -> GeometricTensor of in_type
    """

    def __init__(self, in_type):
        super().__init__()
        self.in_type = self.out_type = in_type
        self.bias = torch.nn.Parameter(torch.zeros(len(in_type)))

    def forward(self, x):
        return _with_modulus(x, lambda modulus: torch.relu(modulus + self.bias[:, None, None]))

    def evaluate_output_shape(self, input_shape):
        return input_shape


class ModulusBatchNorm(EquivariantModule):
    """z -> relu(n(|z|)) z / |z| of complex fields, with n a batch norm.

    forward: GeometricTensor of in_type -> GeometricTensor of in_type
    """

    def __init__(self, in_type):
        super().__init__()
        self.in_type = self.out_type = in_type
        self.norm = torch.nn.BatchNorm2d(len(in_type))

    def forward(self, x):
        return _with_modulus(x, lambda modulus: torch.relu(self.norm(modulus)))

    def evaluate_output_shape(self, input_shape):
        return input_shape


def modulus(fields):
    """[B, fields, H, W] of complex fields, a GeometricTensor [B, 2 * fields, H, W]; at least LEAST_MODULUS."""
    parts = fields.tensor.unflatten(1, (-1, 2))
    return parts.square().sum(2).clamp(min=LEAST_MODULUS ** 2).sqrt()


def _with_modulus(fields, function):
    """The fields with function(modulus) in the place of their modulus."""
    length = modulus(fields)
    scaled = fields.tensor.unflatten(1, (-1, 2)) * (function(length) / length)[:, :, None]
    return GeometricTensor(scaled.flatten(1, 2), fields.type)


def _streams(fields, name):
    """(orders, channels of each, whether the fields are real) of a type of complex_fields or scalar fields."""
    if all(r.is_trivial() for r in fields):
        return [0], len(fields), True
    found = [r.attributes["frequency"] if r.irreducible else 0 for r in fields]
    orders, channels = sorted(set(found)), len(fields) // len(set(found))
    if (any(r.size != 2 or len(set(r.irreps)) > 1 for r in fields)
            or found != [n for n in orders for _ in range(channels)]):
        raise ValueError(f"{name} must be a type of complex_fields: equally many of each order, got {fields}")
    return orders, channels, False


def commutes_with_i(attributes):
    """Whether an element of the basis of a kernel between irreps of rotations is linear over complex numbers."""
    orders = attributes["in_irrep"][-1], attributes["out_irrep"][-1]
    return attributes["irrep:frequency"] == abs(orders[0] - orders[1])


def _steerable(in_type, out_type, size, rings, padding=0):
    """The R2Conv whose kernels are the filters of HarmonicConv, and between fields of order 0 more."""
    highest = max(irrep[-1] for r in (*in_type, *out_type) for irrep in r.irreps)
    return nn.R2Conv(in_type, out_type, size, padding=padding, bias=False, initialize=False, sigma=rings * [RING_WIDTH],
                  rings=_radii(rings, size).tolist(), frequencies_cutoff=lambda _: 2.0 * highest,
                  basis_filter=commutes_with_i)


@lru_cache(64)
def _mixing(in_order, out_order, rings, size):
    """[2 * rings, weights] of _steerable() between two fields, the first of them real where its order is None: the
    weights for each of the harmonics on the rings, and for each times i."""
    from escnn import gspaces

    plane = gspaces.rot2dOnR2(-1, maximum_frequency=max(in_order or 0, out_order))
    into = nn.FieldType(plane, [plane.trivial_repr]) if in_order is None else complex_fields(nn, plane, [in_order], 1)
    conv = _steerable(into, complex_fields(nn, plane, [out_order], 1), size, rings)
    kernels = [expand_filter(w, conv.plan, conv.kernel).flatten()
               for w in torch.eye(conv.weights.numel(), dtype=torch.float64)]
    real, imaginary = _harmonics([out_order - (in_order or 0)], rings, size)[:, 0].double()
    one, i = torch.stack([real, imaginary], 1), torch.stack([-imaginary, real], 1)  # [rings, out part, size, size]
    columns = [torch.cat([one, i]), torch.cat([i, -one])][:into.size]  # of the parts of the input
    filters = torch.stack(columns, 2).flatten(1)
    return torch.linalg.lstsq(torch.stack(kernels, 1), filters.T).solution.T.float()


def _radii(rings, size):
    return torch.linspace(0, size // 2, rings)


def _harmonics(orders, rings, size):
    """[real and imaginary part, orders, rings, size, size]: rings times e^(i m p), each of unit norm."""
    positions = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(-positions, positions, indexing="ij")
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    profiles = torch.exp(-0.5 * ((radius - _radii(rings, size)[:, None, None]) / RING_WIDTH) ** 2)
    waves = torch.tensor(orders)[:, None, None, None] * angle
    found = torch.stack([waves.cos(), waves.sin()]) * profiles
    for harmonic, order in zip(found.unbind(1), orders):
        if order:
            harmonic[..., size // 2, size // 2] = 0  # where the angle means nothing
    return found / found.square().sum((0, 3, 4), keepdim=True).sqrt()
