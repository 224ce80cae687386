"""Dropout of whole fields, and of channels."""
import escnn.nn
import torch
import torch.nn.functional as F

from ..ops import field_dropout
from .fields import Tabulated, sizes_of
from .tensors import OnTensors, adopting_init

FEW = 4096  # numbers, for which torch's own dropout is faster: it is called at less cost, and slower for each


class _Dropout(OnTensors, Tabulated):
    """Its masks are drawn from torch's generator, by one number for each call: they are not escnn's masks."""

    def _tabulate_dropout(self, sizes):
        """The table of ops.field_dropout; sizes: of what is dropped as a whole."""
        sizes = torch.tensor(sizes)
        rows = torch.stack([sizes.cumsum(0) - sizes, sizes], 1)
        device = next((t.device for t in self.buffers()), None)
        self.register_buffer("_fields", rows.to(device), persistent=False)

    def _compute(self, x):
        if not self.training:
            return x
        y = self._drop(x)
        return x.copy_(y) if self.inplace else y

    def _drop(self, x):
        return field_dropout(x, self._fields, self.p)


class FieldDropout(_Dropout, escnn.nn.FieldDropout):
    """escnn.nn.FieldDropout, with the same arguments and state: drops fields, at each pixel for itself."""
    __init__ = adopting_init(escnn.nn.FieldDropout)

    def _adopt(self):
        self._tabulate_dropout(sizes_of(self.in_type))


class PointwiseDropout(_Dropout, escnn.nn.PointwiseDropout):
    """escnn.nn.PointwiseDropout, with the same arguments: drops numbers, each for itself."""
    __init__ = adopting_init(escnn.nn.PointwiseDropout, supports="pointwise")

    def _adopt(self):
        self._tabulate_dropout([1] * self.in_type.size)

    def _drop(self, x):
        if x.numel() < FEW:
            return F.dropout(x.contiguous(), self.p)  # in one order: the same numbers in either memory format
        return super()._drop(x)

    def export(self):
        """torch.nn.Dropout; sets this module to eval mode."""
        return escnn.nn.PointwiseDropout.export(self)
