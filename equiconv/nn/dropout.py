"""Dropout of whole fields."""
import escnn.nn
import torch

from .fields import ByField, sizes_of
from .tensors import OnTensors, adopting_init


class FieldDropout(OnTensors, ByField, escnn.nn.FieldDropout):
    """escnn.nn.FieldDropout, with the same arguments and state; on the CPU it draws escnn's mask from the generator."""
    __init__ = adopting_init(escnn.nn.FieldDropout)

    def _adopt(self):
        sizes = sizes_of(self.in_type)
        self._group_fields(sizes, sizes)

    def _compute(self, x):
        if not self.training:
            return x
        y = self._join([(part * self._mask(part)).flatten(1, 2) for part in self._split(x)])
        return x.copy_(y) if self.inplace else y

    def _mask(self, part):
        """0 or 1 / (1 - p) for each field and pixel, [B, F, 1, *spatial]."""
        kept = torch.rand(part[:, :, :1].shape, device=part.device) > self.p
        return kept.to(part.dtype) / max(1 - self.p, torch.finfo(part.dtype).tiny)
