"""Batch normalisation of fields: statistics per field, in operations that neither break a graph nor wait."""
import escnn.nn
import torch
from escnn.nn import GeometricTensor
from escnn.nn.modules.batchnormalization.inner import BatchNorm4d
from torch import nn

from ..formats import compute_dtype
from ..ops import field_norm, field_norm_inner, field_norm_moments
from ..ops.on_fields import has_kernel
from ..reference.field_norm import FUNCTIONS
from .checks import check_type
from .fields import ByField, in_sorted_order, scale, shift, sizes_of
from .synchronised import SynchronisedMoments, gather_moments, is_synchronised
from .tensors import OnTensors, adopting_init, like, traced, wants_plain

ORDINARY = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm4d)
PLAIN = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _BatchNorm(OnTensors, ByField):
    """What the batch normalisations share: their two passes over the fields, their momentum, and their export.

    synchronised   whether statistics are those of all processes of `process_group` (see convert_sync_batchnorm)
    process_group  of torch.distributed; None: the default one
    """

    synchronised, process_group = False, None

    def _basis(self, group):
        """(Q, Q^-1) of a group's fields, where their statistics are those of the components of Q^-1 x; or None."""
        return None

    def _tabulate(self):
        """The table of the fields, for ops.field_norm."""
        starts, size = {}, 0
        for group in self._groups:
            if self._basis(group) is not None:
                starts[group.label], size = size, size + 2 * group.size ** 2
        fields = [(channel, r.size, starts.get(label, -1)) for channel, r, label in zip(
            self.in_type.fields_start.tolist(), self.in_type.representations, self._labels())]
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        self.register_buffer("_fields", torch.tensor(fields, device=device), persistent=False)

    def _bases(self, x, in_irreps=False):
        """(fields, bases) of all groups, for ops.field_norm, in the dtype that x is computed in."""
        bases = [matrix.flatten() for group in self._groups for matrix in self._basis(group) or ()]
        fields = self._fields
        if bases and in_irreps:
            fields, bases = torch.cat([fields[:, :2], torch.full_like(fields[:, :1], -1)], 1), ()
        return fields, (torch.cat(bases) if bases else fields.new_empty(0)).to(compute_dtype(x.dtype))

    def _compute(self, x):
        return self._normalise(x, *self._factors_and_offsets(lambda: self._moments(x)))

    def _factors_and_offsets(self, moments):
        """For each group what _normalise takes; moments: a function that returns what _moments does."""
        raise NotImplementedError

    @torch.no_grad()
    def _moments(self, x, in_irreps=False):
        """For each group the mean and the variance of the components of its fields, [fields, size] each.

        in_irreps  whether x is Q^-1 x already: see nn/irrep_domain.py

        Returns (means, variances, the number of values of each component: an int, or a tensor of one number).
        """
        count = x.numel() // x.shape[1]
        if has_kernel(x.device.type):
            mean, var = field_norm_moments(x, *self._bases(x, in_irreps))
            means, variances = ([part[0] for part in self._split(v[None])] for v in (mean, var))
        else:
            x = x.detach().to(compute_dtype(x.dtype))
            parts = self._change_basis(self._split(x), 1, in_irreps)
            both = [torch.var_mean(part, [0, *range(3, part.dim())], correction=0) for part in parts]
            variances, means = zip(*both)
        if not is_synchronised(self):
            return means, variances, count
        flat = (torch.cat([v.flatten() for v in values]) for values in (means, variances))
        *both, count = gather_moments(*flat, count, self.process_group)
        sizes = [mean.numel() for mean in means]
        return *([v.view_as(mean) for v, mean in zip(values.split(sizes), means)] for values in both), count

    def _normalise(self, x, factors, offsets=None, in_irreps=False):
        """Q (factor * (Q^-1 x) + offset); factors and offsets: for each group [fields, 1 or size].

        in_irreps  whether Q^-1 is applied to x already, and is to be to the result
        """
        if has_kernel(x.device.type) and not wants_plain(x):
            factor = self._per_channel(factors).to(compute_dtype(x.dtype))
            offset = torch.zeros_like(factor) if offsets is None else self._per_channel(offsets).to(factor.dtype)
            return field_norm(x, factor, offset, *self._bases(x, in_irreps))
        parts = scale(self._change_basis(self._split(x), 1, in_irreps), factors)
        parts = parts if offsets is None else shift(parts, offsets)
        parts = self._change_basis(parts, 0, in_irreps)
        return self._join([part.flatten(1, 2) for part in parts]).to(x.dtype)

    def _change_basis(self, parts, which, in_irreps):
        """Each group's Q (0) or Q^-1 (1) times its fields."""
        bases = [None if in_irreps else self._basis(group) for group in self._groups]
        return [part if basis is None else torch.einsum("ds,bcs...->bcd...", basis[which], part)
                for part, basis in zip(parts, bases)]

    def why_not_affine(self):
        """Why it is no affine map of each channel of Q^-1 x in eval mode, or None."""
        if getattr(self, "track_running_stats", True):
            return None
        return "without running statistics it normalises by those of each batch, also in evaluation"

    def _evaluation(self):
        """For each group (factors, offsets) of the components Q^-1 x in eval mode, [fields, 1 or size]; or None."""
        raise NotImplementedError

    def scale_in_evaluation(self):
        """[in_type.size]: what the components Q^-1 x are multiplied by in eval mode."""
        return self._per_channel(self._evaluation()[0])

    def _momentum(self):
        """The weight of this batch in the running statistics; a cumulative average where momentum is None."""
        return 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum

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
        self._tabulate()
        places = iter(range(len(sizes)))
        by_group = [torch.tensor([[next(places)] for _ in range(group.fields)]) for group in self._groups]
        self.register_buffer("_field_of_channel", self._per_channel(by_group).to(self._fields.device), persistent=False)

    def _labels(self):
        return sizes_of(self.in_type)

    def _children(self):
        return [getattr(self, f"batch_norm_[{group.size}]") for group in self._groups]

    def forward(self, input, function="identity"):
        """input: GeometricTensor [B, in_type.size, *spatial] -> GeometricTensor [B, out_type.size, *spatial].

        function  applied to the result, in the same pass where there is a kernel: see ops.field_norm_inner
        """
        check_type(self, input)
        return GeometricTensor(like(self._compute(input.tensor, function), input.tensor), self.out_type, input.coords)

    def _compute(self, x, function="identity"):
        children = self._children()
        if self._exchanges(children):
            moments = SynchronisedMoments.apply(x, self._fields, self.process_group)
            return FUNCTIONS[function](self._normalise_by_channels(x, children, *moments))
        if wants_plain(x) or not has_kernel(x.device.type) or not self._is_ordinary(children):
            return FUNCTIONS[function](self._join([self._normalise_part(child, part).flatten(1, 2)
                                                   for child, part in zip(children, self._split(x))]))
        if not children[0].training and self.track_running_stats:
            return FUNCTIONS[function](self._normalise(x, *self._evaluation()))
        weight, bias = self._affine(x, children)
        y, mean, var = field_norm_inner(x, weight, bias, self._field_of_channel, self.eps, function)
        if self.track_running_stats:
            self._update(x.numel() // x.shape[1], children, mean, var)
        return y

    def _exchanges(self, children):
        """Whether the statistics of this call are those of all processes."""
        if not is_synchronised(self) or (self.track_running_stats and not any(child.training for child in children)):
            return False
        if not self._is_ordinary(children):
            raise RuntimeError("InnerBatchNorm: the batch norms in one that is synchronised must be those that escnn "
                               "made, all in one mode")
        return True

    def _normalise_by_channels(self, x, children, mean, var, count, one=None):
        """field_norm_inner by the mean, the variance and the number of values of each channel.

        one  [in_type.size]: the fields that are 1 everywhere, in the basis of x, if that is another one (orthogonal)
        """
        one = torch.ones_like(mean) if one is None else one
        weight, bias = self._affine(x, children)
        places = self._field_of_channel
        sizes = torch.zeros_like(weight).index_add(0, places, torch.ones_like(mean))
        field_mean = torch.zeros_like(weight).index_add(0, places, mean * one) / sizes
        square = var + (mean - field_mean.index_select(0, places) * one).square()
        field_var = torch.zeros_like(weight).index_add(0, places, square) / sizes
        factor = weight * torch.rsqrt(field_var + self.eps)
        offset = bias - field_mean * factor
        if self.track_running_stats:
            self._update(count, children, field_mean.detach(), field_var.detach())
        return field_norm(x, factor.index_select(0, places), offset.index_select(0, places) * one, *self._bases(x))

    def _evaluation(self):
        children = self._children()
        factors = [torch.rsqrt(child.running_var + child.eps) for child in children]
        if self.affine:
            factors = [factor * child.weight for factor, child in zip(factors, children)]
        offsets = [-child.running_mean * factor for factor, child in zip(factors, children)]
        if self.affine:
            offsets = [offset + child.bias for offset, child in zip(offsets, children)]
        return [v[:, None] for v in factors], [v[:, None] for v in offsets]

    def _is_ordinary(self, children):
        """Whether the children are those that escnn made, all in one mode: neither synchronised nor frozen in part."""
        return all(isinstance(child, ORDINARY) and child.training == children[0].training for child in children)

    def _affine(self, x, children):
        """weight and bias of all fields, in the order of the children."""
        dtype, fields = compute_dtype(x.dtype), len(self.in_type)
        if not self.affine:
            return x.new_ones(fields, dtype=dtype), x.new_zeros(fields, dtype=dtype)
        if len(children) == 1:
            return children[0].weight.to(dtype), children[0].bias.to(dtype)
        return [torch.cat([getattr(child, name) for child in children]).to(dtype) for name in ("weight", "bias")]

    @torch.no_grad()
    def _update(self, count, children, mean, var):
        sizes = [group.fields for group in self._groups]
        for child, group, m, v in zip(children, self._groups, mean.split(sizes), var.split(sizes)):
            child.num_batches_tracked.add_(1)
            momentum = 1 / child.num_batches_tracked.double() if child.momentum is None else child.momentum
            move(child.running_mean, m, momentum)
            move(child.running_var, v * unbiasing(count * group.size), momentum)

    def _normalise_part(self, child, part):
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
        self._group_fields(self._labels(), sizes_of(self.in_type))
        self._tabulate()

    def _labels(self):
        return [r.name for r in self.in_type.representations]

    def _named(self, suffix, group):
        """A parameter or buffer of the group, or None."""
        return getattr(self, f"{self._escape_name(group.label)}_{suffix}", None)

    def _factors_and_offsets(self, moments):
        if self.training:
            self.num_batches_tracked.add_(1)
        if self.training or not self.track_running_stats:
            means, variances = self._statistics(*moments())
            if self.track_running_stats:
                self._update(means, variances)
            return self._affine(means, variances)
        return self._evaluation()

    def _evaluation(self):
        return self._affine(*([self._named(f"running_{name}", g) for g in self._groups] for name in ("mean", "var")))

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
    def _statistics(self, means, variances, count):
        """For each group (mean [fields, size] or None), and variance [fields, 1]."""
        averages = [self._named("avg", group) for group in self._groups]
        means = [None if average is None else _apply(average, mean.to(average.dtype))
                 for average, mean in zip(averages, means)]
        return means, [var.mean(1, keepdim=True) * unbiasing(count) for var in variances]

    @torch.no_grad()
    def _update(self, means, variances):
        momentum = self._momentum()
        for group, mean, var in zip(self._groups, means, variances):
            move(self._named("running_var", group), var, momentum)
            if mean is not None:
                move(self._named("running_mean", group), mean, momentum)

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
        self._group_fields(self._labels(), sizes_of(self.in_type))
        self._tabulate()
        for group in self._groups:
            trivials = self._trivial_idxs[group.label].to(self.num_batches_tracked.device)
            self.register_buffer(f"_{self._escape_name(group.label)}_trivials", trivials, persistent=False)

    def _labels(self):
        return [r.name for r in self.in_type.representations]

    def _basis(self, group):
        basis = self._named("{}_change_of_basis", group)
        return None if basis is None else (basis, self._named("{}_change_of_basis_inv", group))

    def _named(self, name, group):
        """A parameter or buffer of the group, or None."""
        return getattr(self, name.format(self._escape_name(group.label)), None)

    def _factors_and_offsets(self, moments):
        if self.training:
            self.num_batches_tracked.add_(1)
            return self._affines(self._statistics(*moments()))
        return self._evaluation()

    def _evaluation(self):
        return self._affines([[self._named(f"{{}}_running_{name}", g) for name in ("mean", "var")]
                              for g in self._groups])

    def _affines(self, statistics):
        return list(zip(*(self._affine(group, *pair) for group, pair in zip(self._groups, statistics))))

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
    def _statistics(self, means, variances, count):
        """(mean [fields, trivials], variance [fields, irreps]) of each group; updates the running ones."""
        unbiased, momentum = unbiasing(count), self._momentum()
        statistics = []
        for group, mean, var in zip(self._groups, means, variances):
            running_mean, running_var = (self._named(f"{{}}_running_{name}", group) for name in ("mean", "var"))
            invariant = mean.index_select(1, self._named("_{}_trivials", group))
            square = var + (mean - self._to_components(invariant, group)).square()  # about zero, if not invariant
            var = _apply(self._named("vars_aggregator_{}", group).mT, square.to(running_var.dtype)) * unbiased
            move(running_mean, invariant, momentum)
            move(running_var, var, momentum)
            statistics.append((invariant.to(running_mean.dtype), var))
        return statistics

    def export(self):
        """A module of plain torch operations on tensors [B, C, *spatial]; sets this one to eval mode."""
        return traced(self)


def unbiasing(count):
    """Factor between the variance of `count` values and its unbiased estimate; 1 for a single one."""
    return count / ((count - 1).clamp(min=1) if isinstance(count, torch.Tensor) else max(count - 1, 1))


def move(running, value, momentum):
    """Moves a running average towards a value, by a number or a tensor of one."""
    weight = momentum.to(running.dtype) if isinstance(momentum, torch.Tensor) else momentum
    running.lerp_(value.to(running.dtype), weight)


def _apply(matrix, fields):
    """matrix [n, m] applied to fields [F, m] -> [F, n], in full precision also under autocast."""
    return (matrix * fields[:, None, :]).sum(-1)
