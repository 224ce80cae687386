"""Batch normalisation of fields, or of their subfields, by their norms."""
import escnn.nn
import torch

from .batchnorm import _BatchNorm, move, unbiasing
from .fields import sizes_of, subfields_of
from .tensors import adopting_init


class _NormBatchNorm(_BatchNorm):
    """One variance per field, no mean: for fields without an invariant part.

    The running variance serves while training, too, as in escnn; no gradient flows through it.
    """

    def _adopt(self):
        self._group_fields(self._labels(), sizes_of(self.in_type))
        self._tabulate()

    def _running_var(self, group):
        return getattr(self, f"{group.label}_running_var")  # [1, fields, 1...]

    def _weight(self, group):
        return getattr(self, f"{group.label}_weight").view(-1, 1)

    def _factors_and_offsets(self, moments):
        if self.training:
            self.num_batches_tracked.add_(1)
            self._update(*moments())
        return self._evaluation()

    def _evaluation(self):
        factor = torch.rsqrt(torch.cat([self._running_var(group).flatten() for group in self._groups]) + self.eps)
        if self.affine:
            factor = factor * torch.cat([self._weight(group).flatten() for group in self._groups])
        factors = factor.split([group.fields for group in self._groups])
        return [factor[:, None] for factor in factors], None

    @torch.no_grad()
    def _update(self, means, variances, count):
        momentum = self._momentum()
        for group, mean, var in zip(self._groups, means, variances):
            norms = count * (group.size // self._subfield_size(group))
            square = torch.addcmul(var, mean, mean).mean(1) * unbiasing(norms)
            running = self._running_var(group)
            move(running, square.view_as(running), momentum)

    def export(self):
        """torch's BatchNorm1d, 2d or 3d with the same running variance; sets this module to eval mode."""
        var = self._per_channel([self._running_var(group).view(-1, 1) for group in self._groups])
        weight = self._per_channel([self._weight(group) for group in self._groups]) if self.affine else None
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
