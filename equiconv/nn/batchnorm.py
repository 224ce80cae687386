"""Batch normalisation of fields: statistics per field, in operations that neither break a graph nor wait."""
import escnn.nn
import torch
from torch import nn

from .fields import ByField, in_sorted_order, scale, shift, sizes_of
from .tensors import OnTensors, adopting_init, traced

PLAIN = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _BatchNorm(OnTensors, ByField):
    """What the batch normalisations share: their momentum, and their export."""

    def _momentum(self):
        """The weight of this batch in the running statistics; a cumulative average where momentum is None."""
        return 1 / self.num_batches_tracked if self.momentum is None else self.momentum

    def _export_affine(self, mean, var, weight, bias):
        """torch's BatchNorm1d, 2d or 3d in eval mode; each argument [in_type.size], weight and bias None if not affine.

        Raises ValueError where there are no running statistics: those of one batch are not symmetric per channel.
        """
        if not getattr(self, "track_running_stats", True):
            raise ValueError(f"{type(self).__name__}.export: track_running_stats must be True, got False: the "
                             "statistics of one batch are not symmetric, so no conventional batch norm is equivariant")
        self.eval()
        plain = PLAIN[self.in_type.gspace.dimensionality](self.in_type.size, self.eps, self.momentum, self.affine)
        plain = plain.to(mean.device, mean.dtype).eval()
        with torch.no_grad():
            plain.running_mean.copy_(mean)
            plain.running_var.copy_(var)
            if self.affine:
                plain.weight.copy_(weight)
                plain.bias.copy_(bias)
        return plain


class InnerBatchNorm(_BatchNorm, escnn.nn.InnerBatchNorm):
    """escnn.nn.InnerBatchNorm, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.InnerBatchNorm, supports="pointwise")

    def _adopt(self):
        sizes = sizes_of(self.in_type)
        self._group_fields(sizes, sizes)

    def _children(self):
        return [getattr(self, f"batch_norm_[{group.size}]") for group in self._groups]

    def _compute(self, x):
        return self._join([self._normalise(child, part).flatten(1, 2)
                           for child, part in zip(self._children(), self._split(x))])

    def _normalise(self, child, part):
        missing = max(2, self.in_type.gspace.dimensionality + 1) - (part.dim() - 2)
        if not missing:
            return child(part)
        return child(part.reshape(*part.shape, *[1] * missing)).reshape(part.shape)  # points without a grid

    def export(self):
        """torch's BatchNorm1d, 2d or 3d with each field's statistics for all its channels; sets this to eval mode."""
        children, affine = self._children(), self.affine
        mean, var, weight, bias = (
            self._per_channel([getattr(child, name)[:, None] for child in children]) if present else None
            for name, present in (("running_mean", self.track_running_stats), ("running_var", self.track_running_stats),
                                  ("weight", affine), ("bias", affine)))
        plain = self._export_affine(mean, var, weight, bias)
        plain.num_batches_tracked.copy_(children[0].num_batches_tracked)
        return plain


class _IIDBatchNorm(_BatchNorm):
    """The computation of IIDBatchNorm1d, 2d and 3d: one variance per field, a mean for its invariant part.

    No gradient flows through the statistics, as in escnn.
    """

    def _adopt(self):
        in_sorted_order(self)
        representations = self.in_type.representations
        self._group_fields([r.name for r in representations], sizes_of(self.in_type))

    def _named(self, suffix, group):
        """A parameter or buffer of the group, or None."""
        return getattr(self, f"{self._escape_name(group.label)}_{suffix}", None)

    def _compute(self, x):
        parts = self._split(x)
        if self.training:
            self.num_batches_tracked += 1
        if self.training or not self.track_running_stats:
            means, variances = zip(*(self._statistics(*pair) for pair in zip(self._groups, parts)))
            if self.track_running_stats:
                self._update(means, variances)
        else:
            means, variances = ([self._named(f"running_{name}", g) for g in self._groups] for name in ("mean", "var"))
        factors, offsets = self._affine(means, variances)
        return self._join([part.flatten(1, 2) for part in shift(scale(parts, factors), offsets)]).to(x.dtype)

    def _affine(self, means, variances):
        """Factor and offset [fields, 1 or size] of each group."""
        factors, offsets = [], []
        for group, mean, var in zip(self._groups, means, variances):
            factor = torch.rsqrt(var + self.eps)
            if self.affine:
                factor = factor * self._named("weight", group)
            offset = torch.zeros_like(factor) if mean is None else -mean * factor
            bias = self._named("bias", group)
            if bias is not None:
                offset = offset + _apply(self._named("change_of_basis", group), bias)
            factors.append(factor)
            offsets.append(offset)
        return factors, offsets

    @torch.no_grad()
    def _statistics(self, group, part):
        """(mean [fields, size] or None, variance [fields, 1]) of a part [B, fields, size, *spatial]."""
        values = part.detach().to(self._named("running_var", group).dtype)
        axes = [0, *range(3, part.dim())]
        mean = None
        average = self._named("avg", group)
        if average is not None:
            mean = _apply(average, values.mean(axes))
            values = values - mean[(None, ...) + (None,) * (part.dim() - 3)]
        return mean, values.var(axes, unbiased=True).mean(1, keepdim=True)

    @torch.no_grad()
    def _update(self, means, variances):
        momentum = self._momentum()
        for group, mean, var in zip(self._groups, means, variances):
            self._named("running_var", group).mul_(1 - momentum).add_(momentum * var)
            if mean is not None:
                self._named("running_mean", group).mul_(1 - momentum).add_(momentum * mean)

    def export(self):
        """torch's BatchNorm1d, 2d or 3d with the same running statistics; sets this module to eval mode."""
        means, variances, weights, biases = [], [], [], []
        for group in self._groups:
            var, mean, bias = (self._named(name, group) for name in ("running_var", "running_mean", "bias"))
            variances.append(var)
            means.append(torch.zeros_like(var) if mean is None else mean)
            weights.append(self._named("weight", group))
            biases.append(torch.zeros_like(var) if bias is None
                          else _apply(self._named("change_of_basis", group), bias))
        columns = [self._per_channel(values) if values[0] is not None else None
                   for values in (means, variances, weights, biases)]
        plain = self._export_affine(*columns)
        plain.num_batches_tracked.copy_(self.num_batches_tracked)
        return plain


class IIDBatchNorm1d(_IIDBatchNorm, escnn.nn.IIDBatchNorm1d):
    """escnn.nn.IIDBatchNorm1d, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.IIDBatchNorm1d)


class IIDBatchNorm2d(_IIDBatchNorm, escnn.nn.IIDBatchNorm2d):
    """escnn.nn.IIDBatchNorm2d, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.IIDBatchNorm2d)


class IIDBatchNorm3d(_IIDBatchNorm, escnn.nn.IIDBatchNorm3d):
    """escnn.nn.IIDBatchNorm3d, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.IIDBatchNorm3d)


class GNormBatchNorm(_BatchNorm, escnn.nn.GNormBatchNorm):
    """escnn.nn.GNormBatchNorm, with the same arguments, parameters and state: one variance per irrep of a field.

    No gradient flows through the statistics, as in escnn. Also for types whose fields are not adjacent, and in space.
    """
    __init__ = adopting_init(escnn.nn.GNormBatchNorm)

    def _adopt(self):
        in_sorted_order(self)
        representations = self.in_type.representations
        self._group_fields([r.name for r in representations], sizes_of(self.in_type))
        for group in self._groups:
            trivials = self._trivial_idxs[group.label].to(self.num_batches_tracked.device)
            self.register_buffer(f"_{self._escape_name(group.label)}_trivials", trivials, persistent=False)

    def _named(self, name, group):
        """A parameter or buffer of the group, or None."""
        return getattr(self, name.format(self._escape_name(group.label)), None)

    def _compute(self, x):
        parts = self._split(x)
        parts = [self._change_basis("{}_change_of_basis_inv", parts[i], g) for i, g in enumerate(self._groups)]
        if self.training:
            self.num_batches_tracked += 1
            statistics = [self._statistics(parts[i], group) for i, group in enumerate(self._groups)]
        else:
            statistics = [[self._named(f"{{}}_running_{name}", g) for name in ("mean", "var")] for g in self._groups]
        factors, offsets = zip(*(self._affine(g, *pair) for g, pair in zip(self._groups, statistics)))
        parts = shift(scale(parts, factors), offsets)
        parts = [self._change_basis("{}_change_of_basis", parts[i], g) for i, g in enumerate(self._groups)]
        return self._join([part.flatten(1, 2) for part in parts]).to(x.dtype)

    def _change_basis(self, name, part, group):
        matrix = self._named(name, group)
        return part if matrix is None else torch.einsum("ds,bcs...->bcd...", matrix, part)

    def _affine(self, group, mean, var):
        """Factor and offset [fields, size] in the irreps' basis; mean [fields, trivials], var [fields, irreps]."""
        weight, bias = (self._named(f"{{}}_{name}", group) for name in ("weight", "bias"))
        factor = torch.rsqrt(var + self.eps)
        if weight is not None:
            factor = factor * weight
        factor = _apply(self._named("vars_propagator_{}", group), factor)
        offset = -factor * self._to_components(mean, group)
        return factor, offset if bias is None else offset + self._to_components(bias, group)

    def _to_components(self, invariant, group):
        """[fields, trivial irreps] -> [fields, size], zero in the other irreps."""
        components = invariant.new_zeros(group.fields, group.size)
        return components.index_copy(1, self._named("_{}_trivials", group), invariant)

    @torch.no_grad()
    def _statistics(self, part, group):
        """(mean [fields, trivials], variance [fields, irreps]) of this batch; updates the running ones."""
        running_mean, running_var = (self._named(f"{{}}_running_{name}", group) for name in ("mean", "var"))
        values = part.detach().to(running_var.dtype)
        axes = [0, *range(3, part.dim())]
        count = values[:, 0, 0].numel()
        mean = values.mean(axes).index_select(1, self._named("_{}_trivials", group))
        square = values.square().mean(axes) - self._to_components(mean, group).square()
        var = _apply(self._named("vars_aggregator_{}", group).mT, square) * (count / max(count - 1, 1))
        momentum = self._momentum()
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * var)
        return mean, var

    def export(self):
        """A module of plain torch operations on tensors [B, C, *spatial]; sets this one to eval mode."""
        return traced(self)


def _apply(matrix, fields):
    """matrix [n, m] applied to fields [F, m] -> [F, n], in full precision also under autocast."""
    return (matrix * fields[:, None, :]).sum(-1)
