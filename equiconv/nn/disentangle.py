"""Fields that are split into their smallest independent parts."""
import escnn.nn
import torch

from .fields import ByField, in_sorted_order, sizes_of
from .tensors import OnTensors, adopting_init


class DisentangleModule(OnTensors, ByField, escnn.nn.DisentangleModule):
    """escnn.nn.DisentangleModule, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.DisentangleModule)

    def _adopt(self):
        in_sorted_order(self)
        self._group_fields([r.name for r in self.in_type.representations], sizes_of(self.in_type))

    def _compute(self, x):
        parts = self._split(x)
        return self._join([self._transform(parts[i], group) for i, group in enumerate(self._groups)]).to(x.dtype)

    def _transform(self, part, group):
        matrix = getattr(self, f"change_of_basis_{group.label}")
        return torch.einsum("oi,bci...->bco...", matrix, part).flatten(1, 2)
