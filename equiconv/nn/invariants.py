"""Maps of each field to one invariant channel: its largest value, or its norm."""
import escnn.nn

from ..ops import field_pool
from .fields import ByField, Pooling, sizes_of, subfields_of
from .tensors import OnTensors, adopting_init, is_fused


class _Invariant(OnTensors, ByField, Pooling):
    """`_invariant(part, group)` maps the fields of a group [B, F, size, *spatial] to [B, F, *spatial]."""

    def _adopt(self):
        sizes = sizes_of(self.in_type)
        self._group_fields(self._labels(), sizes, out_sizes=[1] * len(sizes))
        self._tabulate_pool(sizes, self._subfields())

    _of_norms = True

    def _labels(self):
        return sizes_of(self.in_type)

    def _subfields(self):
        """Channels of the subfields of each field, whose norms are compared."""
        return sizes_of(self.in_type)

    def _compute(self, x):
        if is_fused(x):
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
