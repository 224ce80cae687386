"""The tensor product of a field with itself, mapped to the output by an expanded matrix."""
import escnn.nn
import torch
from escnn.nn import GeometricTensor

from .checks import check_input
from .expanded import Expanded
from .tensors import adopting_init, like


class TensorProductModule(Expanded, escnn.nn.TensorProductModule):
    """escnn.nn.TensorProductModule, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.TensorProductModule)
    filter_name = "matrix"
    bias = None

    @classmethod
    def construct(cls, gspace, channels, in_repr, out_repr, initialize=True):
        """The module from `channels` fields of in_repr to as many of out_repr."""
        return cls(gspace.type(*[in_repr] * channels), gspace.type(*[out_repr] * channels), initialize=initialize)

    def forward(self, input):
        """input: GeometricTensor [B, in_type.size, *spatial] -> GeometricTensor [B, out_type.size, *spatial]."""
        check_input(self, input)
        y = tensor_product(input.tensor, self.filter_and_bias()[0], self._C)
        return GeometricTensor(like(y, input.tensor), self.out_type, input.coords)

    def export(self):
        """A module of plain torch operations on tensors, with the same matrix; sets this one to eval mode."""
        self.eval()
        return _TensorProduct(self.expand_parameters().detach(), self._C).eval()

    def expand_parameters(self):
        """The matrix [out_type.size, size of the product], differentiable."""
        return self._expand(self.weights, None)[0]


def tensor_product(x, matrix, fields):
    """x [B, fields * n, *spatial], matrix [fields * m, n^2] -> [B, fields * m, *spatial], matrix (x tensor x) each."""
    parts = x.unflatten(1, (fields, -1))
    products = torch.einsum("bci...,bco...->bcio...", parts, parts).flatten(2, 3)
    return torch.einsum("coi,bci...->bco...", matrix.unflatten(0, (fields, -1)), products).flatten(1, 2)


class _TensorProduct(torch.nn.Module):
    """TensorProductModule on bare tensors, with a fixed matrix."""

    def __init__(self, matrix, fields):
        super().__init__()
        self.fields = fields
        self.register_buffer("matrix", matrix)

    def forward(self, x):
        return tensor_product(x, self.matrix, self.fields)
