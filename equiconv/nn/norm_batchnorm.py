"""Batch normalisation of fields, or of their subfields, by their norms."""
import escnn.nn
import torch

from .batchnorm import _BatchNorm
from .fields import scale, sizes_of, subfields_of
from .tensors import adopting_init


class _NormBatchNorm(_BatchNorm):
    """One variance per field, no mean: for fields without an invariant part.

    The running variance serves while training, too, as in escnn; no gradient flows through it.
    """

    def _adopt(self):
        self._group_fields(self._labels(), sizes_of(self.in_type))

    def _running_var(self, group):
        return getattr(self, f"{group.label}_running_var")  # [1, fields, 1...]

    def _weight(self, group):
        return getattr(self, f"{group.label}_weight").view(-1, 1)

    def _compute(self, x):
        parts = self._split(x)
        if self.training:
            self.num_batches_tracked += 1
            for group, part in zip(self._groups, parts):
                self._update(group, part)
        factors = [torch.rsqrt(self._running_var(group).view(-1, 1) + self.eps) for group in self._groups]
        if self.affine:
            factors = [factor * self._weight(group) for factor, group in zip(factors, self._groups)]
        return self._join([scale([parts[i]], [factor])[0].flatten(1, 2)
                           for i, factor in enumerate(factors)]).to(x.dtype)

    @torch.no_grad()
    def _update(self, group, part):
        running = self._running_var(group)
        values = part.detach().to(running.dtype)
        count = values[:, 0].numel() // self._subfield_size(group)  # of norms
        var = values.square().mean([0, *range(2, part.dim())]) * (count / max(count - 1, 1))
        momentum = self._momentum()
        running.mul_(1 - momentum).add_(momentum * var.view_as(running))

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
