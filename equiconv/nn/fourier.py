"""Pointwise nonlinearities on a grid of the group or of a quotient of it: sample, apply, project back."""
import escnn.nn
import torch
from torch import nn

from ..formats import compute_dtype
from ..ops import fourier_act
from .tensors import OnTensors, adopting_init, as_for_product, wants_plain


class _Fourier(OnTensors):
    """The computation of FourierPointwise and QuotientFourierPointwise.

    y = Ainv f(A x) for each field: A [G, F] samples the band-limited function on a grid, Ainv [F_out, G] projects back.
    """

    def _adopt(self):
        self._function_name = self._function.__name__.rstrip("_")  # which escnn may apply in place

    def _compute(self, x):
        if wants_plain(x):
            fields = x.unflatten(1, (len(self.in_type), self.rho.size))
            samples = self._function(torch.einsum("bcf...,gf->bcg...", fields, self.A))
            return torch.einsum("bcg...,fg->bcf...", samples, self.Ainv).flatten(1, 2)
        x = as_for_product(x)
        a, a_inv = (matrix.to(compute_dtype(x.dtype)) for matrix in (self.A, self.Ainv))
        return fourier_act(x, a, a_inv, self._function_name)

    def export(self):
        """Two torch.nn.Conv2d or 3d of kernel size 1 with the pointwise function between; sets this to eval mode."""
        self.eval()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}.get(self.in_type.gspace.dimensionality)
        if convolution is None:
            return super().export()
        return nn.Sequential(self._export_map(convolution, self.A), _Pointwise(self._function),
                             self._export_map(convolution, self.Ainv)).eval()

    def _export_map(self, convolution, matrix):
        fields = len(self.in_type)
        out_size, in_size = matrix.shape
        plain = convolution(fields * in_size, fields * out_size, 1, groups=fields, bias=False)
        weight = matrix.repeat(fields, 1)[(...,) + (None,) * (plain.weight.dim() - 2)]
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return plain


class _Pointwise(nn.Module):
    """One of torch's functions as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class FourierPointwise(_Fourier, escnn.nn.FourierPointwise):
    """escnn.nn.FourierPointwise, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.FourierPointwise)


class FourierELU(_Fourier, escnn.nn.FourierELU):
    """escnn.nn.FourierELU, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.FourierELU)


class QuotientFourierPointwise(_Fourier, escnn.nn.QuotientFourierPointwise):
    """escnn.nn.QuotientFourierPointwise, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.QuotientFourierPointwise)


class QuotientFourierELU(_Fourier, escnn.nn.QuotientFourierELU):
    """escnn.nn.QuotientFourierELU, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.QuotientFourierELU)
