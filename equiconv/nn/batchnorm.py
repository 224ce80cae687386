"""Batch normalisation of fields: statistics per field, in operations that neither break a graph nor wait."""
import escnn.nn
import torch
from escnn.nn import GeometricTensor
from escnn.nn.modules.batchnormalization.inner import BatchNorm4d
from torch import nn

from ..formats import compute_dtype
from ..ops import field_batch_norm, field_norm, field_norm_moments, field_norm_statistics
from ..ops.on_fields import has_kernel
from ..reference.field_batch_norm import FUNCTIONS
from .checks import check_type
from .fields import ByField, in_sorted_order, scale, shift, sizes_of
from .norm_parts import FieldPart, parts_table
from .synchronised import SynchronisedMoments, gather_moments, is_synchronised
from .tensors import OnTensors, adopting_init, like, traced, wants_plain

ORDINARY = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm4d)
PLAIN = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _BatchNorm(OnTensors, ByField):
    """What the batch normalisations share: their tables, their two passes over the fields, and their export.

    statistics     by what they normalise while training: one of ops.field_batch_norm.STATISTICS
    synchronised   whether statistics are those of all processes of `process_group` (see convert_sync_batchnorm)
    process_group  of torch.distributed; None: the default one
    """

    statistics, track_running_stats = "estimate", True
    synchronised, process_group = False, None

    def _basis(self, group):
        """(Q, Q^-1) of a group's fields, where their statistics are those of the components of Q^-1 x; or None."""
        return None

    def _matrices_of(self, group):
        """The matrices (projection of the mean, from biases to channels) of a group's fields; or None."""
        return None

    def _parts_of(self, group, starts):
        """The FieldParts of each field of a group; starts: where its matrices begin among all, or None."""
        raise NotImplementedError

    def _affine_of(self, group):
        """(weights, biases) of the components Q^-1 x of a group's fields, [fields, 1 or size] each; or None."""
        raise NotImplementedError

    def _numbers_of(self, name):
        """For each group the tensor of that name: "weight", "bias", "running_mean" or "running_var"; or None."""
        return [self._named(name, group) for group in self._groups]

    def _lists(self, *names):
        """The tensors of these names, for the ops."""
        return [[t for t in self._numbers_of(name) if t is not None] for name in names]

    def _counters(self):
        """Of batches, that are to be counted up."""
        return [self.num_batches_tracked] if self.training else []

    def _momentum(self):
        """How far running statistics move; None: they are averages of all batches."""
        return self.momentum

    def _tabulate(self):
        """The tables of ops.field_norm and ops.field_batch_norm."""
        labels, starts, size = self._labels(), {}, 0
        for group in self._groups:
            if self._basis(group) is not None:
                starts[group.label], size = size, size + 2 * group.size ** 2
        fields = [(channel, r.size, starts.get(label, -1)) for channel, r, label in zip(
            self.in_type.fields_start.tolist(), self.in_type.representations, labels)]
        parts, size = {}, 0
        for group in self._groups:
            begin = []
            for matrix in self._matrices_of(group) or ():
                begin.append(size)
                size += matrix.numel()
            parts[group.label] = self._parts_of(group, begin or None)
        has = ([t is not None for t in self._numbers_of(name)] for name in ("running_mean", "bias"))
        table = parts_table(labels, self._groups, parts, *has)
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        for name, values in (("_fields", torch.tensor(fields)), ("_parts", table), *self._flat_matrices()):
            self.register_buffer(name, values.to(device), persistent=False)
        matrices = [m for group in self._groups for of in (self._basis, self._matrices_of) for m in of(group) or ()]
        self._matrix_names = [name for name, b in self._buffers.items() if any(b is m for m in matrices)]
        self._versions = self._matrix_versions()

    def _flat_matrices(self):
        """("_bases", changes of basis) and ("_matrices", the others), of all groups, one after the other."""
        dtype = next((t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), None)
        for name, of in (("_bases", self._basis), ("_matrices", self._matrices_of)):
            found = [matrix.flatten() for group in self._groups for matrix in of(group) or ()]
            yield name, torch.cat(found) if found else torch.empty(0, dtype=dtype)

    def _matrix_versions(self):
        """Change when the matrices are written to (an inference tensor does not count)."""
        buffers = [self._buffers[name] for name in self._matrix_names]
        return [None if b.is_inference() else b._version for b in buffers]

    def _refresh_matrices(self):
        for name, values in self._flat_matrices():
            if values.numel() and not (values.is_meta or self._buffers[name].is_meta):
                self._buffers[name].copy_(values)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._refresh_matrices()  # a checkpoint has them, too

    def _tables(self, x):
        """The tables of ops.field_batch_norm, for x."""
        if self._matrix_names and not is_in_graph() and (versions := self._matrix_versions()) != self._versions:
            self._refresh_matrices()
            self._versions = versions
        dtype, bases, matrices = compute_dtype(x.dtype), self._bases, self._matrices
        if bases.dtype != dtype:
            bases, matrices = bases.to(dtype), matrices.to(dtype)
        return self._fields, bases, self._parts, matrices

    def _compute(self, x):
        if wants_plain(x) or not self._reads_batch() and (is_in_graph() or not has_kernel(x.device.type)):
            return self._normalise(x, *self._evaluation())
        return self._normalise_by(x, *self._lists("weight", "bias"))

    def _reads_batch(self):
        """Whether the statistics are those of the input."""
        return self.training or not self.track_running_stats

    def _normalise_by(self, x, weights, biases, **options):
        """The two passes over the fields; options of ops.field_batch_norm."""
        tables = self._tables(x)
        numbers = self._statistics(x, tables, weights, biases)
        return field_batch_norm(x, numbers, tables, weights, biases, self.eps, **options)

    def _statistics(self, x, tables, weights, biases, moments=None):
        """By what the channels are normalised; moves the running statistics. moments: of ops.field_norm_statistics."""
        batch = self._reads_batch()
        if batch and not is_synchronised(self):
            self._check_values(x)
        elif batch and moments is None:
            moments = self._moments_of_all(x, tables)
        running = self._lists("running_mean", "running_var") if self.track_running_stats else ([], [])
        return field_norm_statistics(x, tables, weights, biases, *running, self._counters(), self.eps,
                                     self._momentum(), self.statistics if batch else "running", batch=batch,
                                     moments=moments)

    def _least_values(self):
        """How many values of each channel its statistics need."""
        return 1

    def _check_values(self, x):
        """Raises ValueError where there are too few values, which would spoil the running statistics."""
        if torch.compiler.is_compiling():
            return
        name, values = type(self).__name__, x.numel() // x.shape[1]
        if not values:
            raise ValueError(f"{name}: expected values to train with, got an input of {list(x.shape)}")
        if values < self._least_values():
            raise ValueError(f"{name}: expected more than 1 value per channel when training, got input size {x.shape}")

    def _moments_of_all(self, x, tables):
        """Mean and variance of each channel, and the number of values, of all processes."""
        moments = field_norm_moments(x, *tables[:2])
        return torch.cat([t.double().view(-1) for t in gather_moments(
            *moments, x.numel() // x.shape[1], self.process_group)])

    def _normalise(self, x, factors, offsets=None):
        """Q (factor * (Q^-1 x) + offset); factors and offsets: for each group [fields, 1 or size]."""
        if has_kernel(x.device.type) and not wants_plain(x):
            factor = self._per_channel(factors).to(compute_dtype(x.dtype))
            offset = torch.zeros_like(factor) if offsets is None else self._per_channel(offsets).to(factor.dtype)
            return field_norm(x, factor, offset, *self._tables(x)[:2])
        parts = [self._to_irreps(part, group) for part, group in zip(self._split(x), self._groups)]
        parts = scale(parts, factors)
        parts = parts if offsets is None else shift(parts, offsets)
        parts = [self._from_irreps(part, group) for part, group in zip(parts, self._groups)]
        return self._join([part.flatten(1, 2) for part in parts]).to(x.dtype)

    def _to_irreps(self, part, group):
        return part if (basis := self._basis(group)) is None else torch.einsum("ds,bcs...->bcd...", basis[1], part)

    def _from_irreps(self, part, group):
        return part if (basis := self._basis(group)) is None else torch.einsum("ds,bcs...->bcd...", basis[0], part)

    def why_not_affine(self):
        """Why it is no affine map of each channel of Q^-1 x in eval mode, or None."""
        if self.track_running_stats:
            return None
        return "without running statistics it normalises by those of each batch, also in evaluation"

    def _running_of(self, group):
        """(running mean or None, 1 / running deviation) of the components Q^-1 x of a group's fields, as _affine_of."""
        raise NotImplementedError

    def _evaluation(self):
        """For each group (factors, offsets) of the components Q^-1 x in eval mode, [fields, 1 or size]; or None."""
        factors, offsets = [], []
        for group in self._groups:
            mean, factor = self._running_of(group)
            weight, bias = self._affine_of(group)
            factors.append(factor if weight is None else factor * weight)
            offset = torch.zeros_like(factor) if mean is None else -mean * factors[-1]
            offsets.append(offset if bias is None else offset + bias)
        return factors, offsets

    def scale_in_evaluation(self):
        """[in_type.size]: what the components Q^-1 x are multiplied by in eval mode."""
        return self._per_channel(self._evaluation()[0])

    def _export_affine(self, mean, var, weight, bias):
        """torch's BatchNorm1d, 2d or 3d in eval mode; each argument [in_type.size], weight and bias None if not affine.

        Raises ValueError where there are no running statistics: those of one batch are not symmetric per channel.
        """
        if not self.track_running_stats:
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
    statistics = "values"

    def _adopt(self):
        sizes = sizes_of(self.in_type)
        self._group_fields(sizes, sizes)
        self._names = [f"batch_norm_[{group.size}]" for group in self._groups]
        self._tabulate()

    def _labels(self):
        return sizes_of(self.in_type)

    def _parts_of(self, group, starts):
        return [FieldPart(group.size, "average", means=1, biases=1, samples=group.size)]

    def _least_values(self):
        return 2 if any(group.size == 1 for group in self._groups) else 1  # as torch, of all channels of a field

    def _children(self):
        return [self._modules[name] for name in self._names]

    def _numbers_of(self, name):
        return [getattr(child, name) for child in self._children()]

    def _lists(self, *names):
        children = self._children()
        return [[getattr(child, name) for child in children] if self._has(name) else [] for name in names]

    def _has(self, name):
        return self.affine if name in ("weight", "bias") else self.track_running_stats

    def _counters(self):
        return [child.num_batches_tracked for child in self._children()] if self.track_running_stats else []

    def _momentum(self):
        return self._children()[0].momentum

    def forward(self, input, function="identity"):
        """input: GeometricTensor [B, in_type.size, *spatial] -> GeometricTensor [B, out_type.size, *spatial].

        function  applied to the result, in the same pass where there is a kernel: see ops.field_batch_norm
        """
        check_type(self, input)
        return GeometricTensor(like(self._compute(input.tensor, function), input.tensor), self.out_type, input.coords)

    def _compute(self, x, function="identity"):
        children = self._children()
        if self._exchanges(children):
            moments = SynchronisedMoments.apply(x, self._fields, self.process_group)
            return FUNCTIONS[function](self._normalise(x, *self._affine_through(x, *moments)))
        if wants_plain(x) or not has_kernel(x.device.type) or not self._is_ordinary(children):
            return FUNCTIONS[function](self._join([self._normalise_part(child, part).flatten(1, 2)
                                                   for child, part in zip(children, self._split(x))]))
        if self._reads_batch():
            return self._normalise_by(x, *self._lists("weight", "bias"), through=True, function=function)
        return FUNCTIONS[function](super()._compute(x))

    def _reads_batch(self):
        return not self.track_running_stats or self._children()[0].training

    def _exchanges(self, children):
        """Whether the statistics of this call are those of all processes."""
        if not is_synchronised(self) or (self.track_running_stats and not any(child.training for child in children)):
            return False
        if not self._is_ordinary(children):
            raise RuntimeError("InnerBatchNorm: the batch norms in one that is synchronised must be those that escnn "
                               "made, all in one mode")
        return True

    def _affine_through(self, x, mean, var, count):
        """For each group (factors, offsets), [fields, 1], through which gradients flow; moves the running statistics.

        mean, var, count  of the values of each channel, [C], and how many they are: a tensor of one number
        """
        factors, offsets = [], []
        for group, m, v in zip(self._groups, *([part[0] for part in self._split(t[None])] for t in (mean, var))):
            weight, bias = self._affine_of(group)
            field_mean = m.mean(1, keepdim=True)
            field_var = (v + (m - field_mean).square()).mean(1, keepdim=True)
            factor = torch.rsqrt(field_var + self.eps)
            factors.append(factor if weight is None else factor * weight)
            offset = -field_mean * factors[-1]
            offsets.append(offset if bias is None else offset + bias)
        moments = torch.cat([t.detach().double().view(-1) for t in (mean, var, count)])
        self._statistics(x, self._tables(x), *self._lists("weight", "bias"), moments)
        return factors, offsets

    def _affine_of(self, group):
        child = self._modules[f"batch_norm_[{group.size}]"]
        return (child.weight[:, None], child.bias[:, None]) if self.affine else (None, None)

    def _running_of(self, group):
        child = self._modules[f"batch_norm_[{group.size}]"]
        return child.running_mean[:, None], torch.rsqrt(child.running_var + child.eps)[:, None]

    def _is_ordinary(self, children):
        """Whether the children are those that escnn made, all alike: none synchronised, changed or frozen."""
        first = children[0]
        return all(isinstance(child, ORDINARY) and child.training == first.training and child.eps == self.eps
                   and child.momentum == first.momentum for child in children)

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

    def _least_values(self):
        return 2  # its variance is unbiased

    def _matrices_of(self, group):
        average = self._named("avg", group)
        return None if average is None else (average, self._named("change_of_basis", group))

    def _parts_of(self, group, starts):
        if starts is None:
            return [FieldPart(group.size, "own")]
        biases = self._named("change_of_basis", group).shape[1]
        return [FieldPart(group.size, "projected", group.size, biases, 1, *starts)]

    def _affine_of(self, group):
        weight, bias = (self._named(name, group) for name in ("weight", "bias"))
        return weight, None if bias is None else _apply(self._named("change_of_basis", group), bias)

    def _running_of(self, group):
        return self._named("running_mean", group), torch.rsqrt(self._named("running_var", group) + self.eps)

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
            self.register_buffer(f"_trivials_{self._escape_name(group.label)}", trivials, persistent=False)

    def _labels(self):
        return [r.name for r in self.in_type.representations]

    def _basis(self, group):
        basis = self._named("change_of_basis", group)
        return None if basis is None else (basis, self._named("change_of_basis_inv", group))

    def _named(self, suffix, group):
        """A parameter or buffer of the group, or None."""
        return getattr(self, f"{self._escape_name(group.label)}_{suffix}", None)

    def _parts_of(self, group, starts):
        trivials = set(self._trivial_idxs[group.label].tolist())
        parts, channel = [], 0
        for size in self._named_of("vars_propagator", group).sum(0).long().tolist():
            parts.append(FieldPart(size, "average", 1, 1) if channel in trivials else FieldPart(size, "zero"))
            channel += size
        return parts

    def _named_of(self, prefix, group):
        return getattr(self, f"{prefix}_{self._escape_name(group.label)}")

    def _affine_of(self, group):
        weight, bias = (self._named(name, group) for name in ("weight", "bias"))
        return (None if weight is None else self._of_irreps(weight, group),
                None if bias is None else self._of_trivial_irreps(bias, group))

    def _running_of(self, group):
        inverse = torch.rsqrt(self._named("running_var", group) + self.eps)
        return self._of_trivial_irreps(self._named("running_mean", group), group), self._of_irreps(inverse, group)

    def _of_irreps(self, numbers, group):
        """[fields, irreps] -> [fields, size], for all components of an irrep."""
        return _apply(self._named_of("vars_propagator", group), numbers)

    def _of_trivial_irreps(self, invariant, group):
        """[fields, trivial irreps] -> [fields, size], zero in the other irreps."""
        components = invariant.new_zeros(group.fields, group.size)
        return components.index_copy(1, self._named_of("_trivials", group), invariant)

    def export(self):
        """A module of plain torch operations on tensors [B, C, *spatial]; sets this one to eval mode."""
        return traced(self)


def is_in_graph():
    """Whether operations become a graph, or are transformed, in which what changes a tensor is out of place."""
    return (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            or torch.jit.is_tracing())


def _apply(matrix, fields):
    """matrix [n, m] applied to fields [F, m] -> [F, n], in full precision also under autocast."""
    return (matrix * fields[:, None, :]).sum(-1)
