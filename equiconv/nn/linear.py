import escnn.nn
import torch.nn.functional as F
from escnn.nn import GeometricTensor
from torch import nn

from ..library import autocast_dtype
from .checks import check_dtype, check_input, checked_init
from .expanded import Expanded


class Linear(Expanded, escnn.nn.Linear):
    """escnn.nn.Linear, with the same arguments, parameters and state."""

    filter_name = "matrix"
    __init__ = checked_init(escnn.nn.Linear, 0)

    def forward(self, input, norm=None):
        """input: GeometricTensor [B, in_type.size] -> GeometricTensor [B, out_type.size].

        norm  a batch norm of fields in evaluation, to compute with it (see why_not_foldable)
        """
        check_input(self, input)
        x = input.tensor
        if x.dim() != 2:
            raise ValueError(f"Linear: input must have 2 dimensions, got shape {tuple(x.shape)}")
        matrix, bias = self.filter_and_bias(norm=norm)
        if autocast_dtype(x.device.type) is None:
            check_dtype(self, x, matrix)
        return GeometricTensor(F.linear(x, matrix, bias), self.out_type, input.coords)

    def evaluate_output_shape(self, input_shape):
        """Shape of the output for an input of shape [B, in_type.size]."""
        if len(input_shape) != 2 or input_shape[1] != self.in_type.size:
            raise ValueError(f"Linear: input_shape must be (batch, {self.in_type.size}), got {tuple(input_shape)}")
        return (input_shape[0], self.out_type.size)

    def export(self):
        """A torch.nn.Linear with the same matrix; sets this module to eval mode, as escnn does."""
        self.eval()
        return self._fill(nn.Linear(self.in_type.size, self.out_type.size, bias=self.bias is not None))
