"""Maps of each field to one invariant channel: its largest value, or its norm."""
import escnn.nn
import torch

from ..ops import field_pool
from ..ops.on_fields import has_kernel
from .fields import ByField, sizes_of, subfields_of
from .tensors import OnTensors, adopting_init, wants_plain


class _Invariant(OnTensors, ByField):
    """`_invariant(part, group)` maps the fields of a group [B, F, size, *spatial] to [B, F, *spatial]."""

    def _adopt(self):
        sizes = sizes_of(self.in_type)
        self._group_fields(self._labels(), sizes, out_sizes=[1] * len(sizes))
        subfields, elements, part = self._subfields(), [], 0
        for f, (size, subfield) in enumerate(zip(sizes, subfields)):
            elements += [(f, part + i // subfield) for i in range(size)]
            part += size // subfield
        rows = list(zip(self.in_type.fields_start.tolist(), sizes, subfields))
        device = next((t.device for t in self.buffers()), None)
        self.register_buffer("_fields", torch.tensor(rows, device=device), persistent=False)
        self.register_buffer("_elements", torch.tensor(elements, device=device), persistent=False)

    _of_norms = True

    def _labels(self):
        return sizes_of(self.in_type)

    def _subfields(self):
        """Channels of the subfields of each field, whose norms are compared."""
        return sizes_of(self.in_type)

    def _compute(self, x):
        if not wants_plain(x) and has_kernel(x.device.type):
            return field_pool(x, self._fields, self._elements, self._of_norms)
        parts = self._split(x)
        return self._join([self._invariant(parts[i], group) for i, group in enumerate(self._groups)])


class GroupPooling(_Invariant, escnn.nn.GroupPooling):
    """escnn.nn.GroupPooling, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.GroupPooling, supports="pointwise")
    _of_norms = False

    def _subfields(self):
        return [1] * len(self.in_type)

    def _invariant(self, part, group):  # not amax: the gradient goes to one of equal maxima, as in escnn
        return part.max(2)[0]


class NormPool(_Invariant, escnn.nn.NormPool):
    """escnn.nn.NormPool, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.NormPool)

    def _invariant(self, part, group):
        return part.norm(dim=2)


class InducedNormPool(_Invariant, escnn.nn.InducedNormPool):
    """escnn.nn.InducedNormPool, with the same arguments and state: the largest norm of a subfield."""
    __init__ = adopting_init(escnn.nn.InducedNormPool)

    def _labels(self):
        return subfields_of(self.in_type)

    def _subfields(self):
        return [subfield for _, subfield in subfields_of(self.in_type)]

    def _invariant(self, part, group):
        return part.unflatten(2, (-1, group.label[1])).norm(dim=3).max(2)[0]
