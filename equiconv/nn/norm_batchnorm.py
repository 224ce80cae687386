"""Batch normalisation of fields, or of their subfields, by their norms."""
import escnn.nn
import torch

from .batchnorm import _BatchNorm
from .fields import sizes_of, subfields_of
from .norm_parts import FieldPart
from .tensors import adopting_init


class _NormBatchNorm(_BatchNorm):
    """One variance per field, no mean: for fields without an invariant part.

    The running variance serves while training, too, as in escnn; no gradient flows through it.
    """
    statistics = "running"

    def _adopt(self):
        self._group_fields(self._labels(), sizes_of(self.in_type))
        self._tabulate()

    def _named(self, suffix, group):
        """A parameter or buffer of the group, [1, fields, 1...]; or None."""
        return getattr(self, f"{group.label}_{suffix}", None)

    def _parts_of(self, group, starts):
        return [FieldPart(group.size, "zero", samples=group.size // self._subfield_size(group))]

    def _affine_of(self, group):
        return self._named("weight", group).view(-1, 1) if self.affine else None, None

    def _running_of(self, group):
        return None, torch.rsqrt(self._named("running_var", group).view(-1, 1) + self.eps)

    def _evaluation(self):
        return super()._evaluation()[0], None

    def export(self):
        """torch's BatchNorm1d, 2d or 3d with the same running variance; sets this module to eval mode."""
        var, weight = (self._per_channel([t.view(-1, 1) for t in self._numbers_of(name)]) if present else None
                       for name, present in (("running_var", True), ("weight", self.affine)))
        plain = self._export_affine(torch.zeros_like(var), var, weight, torch.zeros_like(var))
        plain.num_batches_tracked.copy_(self.num_batches_tracked)
        return plain


class NormBatchNorm(_NormBatchNorm, escnn.nn.NormBatchNorm):
    """escnn.nn.NormBatchNorm, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.NormBatchNorm)

    def _labels(self):
        return sizes_of(self.in_type)

    def _subfield_size(self, group):
        return group.size


class InducedNormBatchNorm(_NormBatchNorm, escnn.nn.InducedNormBatchNorm):
    """escnn.nn.InducedNormBatchNorm, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.InducedNormBatchNorm)

    def _labels(self):
        return subfields_of(self.in_type)

    def _subfield_size(self, group):
        return group.label[1]
