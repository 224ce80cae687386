"""Nonlinearities of whole fields: by their norm, by gates, by orientation."""
import itertools
import math

import escnn.nn
import torch
import torch.nn.functional as F
from escnn.nn import GeometricTensor
from escnn.nn.modules.nonlinearities.gated1 import GATES_ID

from ..formats import compute_dtype
from ..ops import concatenated_act, field_pool
from .checks import check_type
from .conv import Activation
from .fields import ByField, Gating, Pooling, shift, sizes_of, subfields_of
from .tensors import OnTensors, adopting_init, is_exactly, is_fused, like, traced


class _NormNonLinearity(OnTensors, ByField, Gating):
    """y = x f(|x| - exp(log_bias)) / |x| for each field or subfield, and 0 where |x| <= eps."""

    def _adopt(self):
        if self._function.__name__ == "<lambda>":  # which does not pickle
            self._function = squash
        if "eps" in self._parameters:  # fully_shard refuses parameters of no dimensions, and this one is constant
            self.register_buffer("eps", self._parameters.pop("eps").detach())
        self._function_name = self._function.__name__
        labels, order = self._labels(), sorted(set(self._labels()))
        self._group_fields(labels, sizes_of(self.in_type), order=order)
        by_group = [f for label in order for f in range(len(labels)) if labels[f] == label]  # as the biases are
        starts, rows = self.in_type.fields_start.tolist(), []
        for f, label in enumerate(labels):
            size, subfield = label if isinstance(label, tuple) else (label, label)
            rows += [(start, start, subfield, -1, -1, by_group.index(f))
                     for start in range(starts[f], starts[f] + size, subfield)]
        self._tabulate(rows, self.in_type.size)

    def _compute(self, x):
        if is_fused(x):
            bias = None if self.log_bias is None else self.log_bias.exp()
            return self._gate(x, bias, self._function_name, eps=self.eps)
        biases = [None] * len(self._groups)
        if self.log_bias is not None:
            biases = self.log_bias.exp().flatten().split([group.fields for group in self._groups])
        parts = self._split(x)
        return self._join([self._activate(parts[i], biases[i], group).flatten(1, 2)
                           for i, group in enumerate(self._groups)]).to(x.dtype)

    def _activate(self, part, bias, group):
        norm = part.norm(dim=2, keepdim=True)  # [B, F, 1, *spatial]
        shifted = norm if bias is None else shift([norm], [-bias[:, None]])[0]
        is_large = norm > self.eps
        return part * torch.where(is_large, self._function(shifted) / torch.where(is_large, norm, 1), 0)


class NormNonLinearity(_NormNonLinearity, escnn.nn.NormNonLinearity):
    """escnn.nn.NormNonLinearity, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.NormNonLinearity, supports="norm")

    def _labels(self):
        return sizes_of(self.in_type)


class InducedNormNonLinearity(_NormNonLinearity, escnn.nn.InducedNormNonLinearity):
    """escnn.nn.InducedNormNonLinearity, with the same arguments, parameters and state: by the norms of subfields."""
    __init__ = adopting_init(escnn.nn.InducedNormNonLinearity)

    def _labels(self):
        return subfields_of(self.in_type)

    def _activate(self, part, bias, group):
        subfields = part.unflatten(2, (-1, group.label[1])).flatten(1, 2)
        if bias is not None:
            bias = bias.repeat_interleave(group.size // group.label[1])
        return super()._activate(subfields, bias, group)


def squash(norm):
    """|x| / (1 + |x|)"""
    return norm / (1 + norm)


class _GatedNonLinearity1(OnTensors, ByField, Gating):
    """y = x sigmoid(gate - bias) for each field, or for each of its subfields if the gate has a channel for each."""

    def _adopt(self):
        sizes, is_gate = sizes_of(self.in_type), self._find_gates()
        labels = [GATES_ID if gate else size for gate, size in zip(is_gate, sizes)]
        out_sizes = [0 if gate and self.drop_gates else size for gate, size in zip(is_gate, sizes)]
        order = sorted({s for s in labels if s != GATES_ID})
        self._group_fields(labels, sizes, out_sizes, order=[GATES_ID, *order])
        starts, out_starts = self.in_type.fields_start.tolist(), [0, *itertools.accumulate(out_sizes)]
        gates = [f for f in range(len(sizes)) if is_gate[f]]
        gated = [f for size in order for f in range(len(sizes)) if labels[f] == size]
        rows = []
        for k, (gate, f) in enumerate(zip(gates, gated, strict=True)):
            subfield = sizes[f] // sizes[gate]
            rows += [(starts[f] + i * subfield, out_starts[f] + i * subfield, subfield, starts[gate] + i,
                      -1 if self.drop_gates else out_starts[gate] + i, k) for i in range(sizes[gate])]
        self._tabulate(rows, out_starts[-1])

    def _find_gates(self):
        """Which fields are gates: those whose channel escnn's table names."""
        channels = self.gates_indices.tolist()
        if self._contiguous[GATES_ID]:
            channels = range(*channels)
        starts = self.in_type.fields_start.tolist()
        return [start in channels for start in starts]

    def _compute(self, x):
        if is_fused(x):
            return self._gate(x, self.bias, "gate")
        parts, (gate, *gated) = self._split(x), self._groups
        gates = torch.sigmoid(shift([parts[0]], [-self.bias.flatten()[:, None]])[0])  # [B, F, subfields, *spatial]
        each = gates.split([group.fields for group in gated], 1)
        gated = [(parts[i + 1].unflatten(2, (gate.size, -1)) * each[i].unsqueeze(3)).flatten(1, 3)
                 for i in range(len(gated))]
        return self._join(([] if self.drop_gates else [gates.flatten(1, 2)]) + gated).to(x.dtype)


class GatedNonLinearity1(_GatedNonLinearity1, escnn.nn.GatedNonLinearity1):
    """escnn.nn.GatedNonLinearity1, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.GatedNonLinearity1)


class InducedGatedNonLinearity1(_GatedNonLinearity1, escnn.nn.InducedGatedNonLinearity1):
    """escnn.nn.InducedGatedNonLinearity1, with the same arguments, parameters and state. Also with drop_gates=False."""
    __init__ = adopting_init(escnn.nn.InducedGatedNonLinearity1)


class GatedNonLinearityUniform(OnTensors, ByField, Gating, escnn.nn.GatedNonLinearityUniform):
    """escnn.nn.GatedNonLinearityUniform, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.GatedNonLinearityUniform)

    def _adopt(self):
        sizes = self.expansion.sum(0).long().tolist()  # of the irreps that each gate opens
        starts, rows = list(itertools.accumulate(sizes, initial=0)), []
        for f in range(len(self.in_type)):
            first, first_out = f * self.rho_in.size, f * self.rho_out.size
            rows += [(first + self.n_gates + start, first_out + start, size, first + i, -1, f * self.n_gates + i)
                     for i, (start, size) in enumerate(zip(starts, sizes))]
        self._tabulate(rows, self.out_type.size)

    def _compute(self, x):
        if is_fused(x) and self.gate_function in (torch.sigmoid, F.sigmoid):
            return self._gate(x, self.bias, "gate")
        fields = x.unflatten(1, (len(self.in_type), self.rho_in.size))
        gates, gated = fields[:, :, :self.n_gates], fields[:, :, self.n_gates:]
        gates = self.gate_function(shift([gates], [-self.bias[0]])[0])
        return (torch.einsum("oi,bci...->bco...", self.expansion, gates) * gated).flatten(1, 2).to(x.dtype)


class GatedNonLinearity2(ByField, Gating, escnn.nn.GatedNonLinearity2):
    """escnn.nn.GatedNonLinearity2, with the same arguments, parameters and state."""
    __init__ = adopting_init(escnn.nn.GatedNonLinearity2)

    def _adopt(self):
        sizes = sizes_of(self.out_type)
        order = sorted(set(sizes))
        self._group_fields(sizes, sizes, order=order)
        starts = self.in_type[1].fields_start.tolist()
        gated = [f for size in order for f in range(len(sizes)) if sizes[f] == size]
        self._tabulate([(starts[f], starts[f], sizes[f], k, -1, k) for k, f in enumerate(gated)], sum(sizes))

    def forward(self, gates, input):
        """GeometricTensors [B, in_type[0].size, *spatial] and [B, in_type[1].size, *spatial] -> one of out_type."""
        check_type(self, gates, self.in_type[0])
        check_type(self, input, self.in_type[1])
        if gates.shape[2:] != input.shape[2:] or gates.shape[0] != input.shape[0] or not gates.has_same_coords(input):
            raise ValueError("GatedNonLinearity2: gates and input must have the same batch, spatial size and coords, "
                             f"got shapes {tuple(gates.shape)} and {tuple(input.shape)}")
        y = like(self._compute(gates.tensor, input.tensor), input.tensor)
        return GeometricTensor(y, self.out_type, input.coords)

    def _compute(self, gates, x):
        if is_fused(x):
            return self._gate(x, self.bias, "gate", gates=gates)
        opened = torch.sigmoid(shift([gates.unsqueeze(2)], [-self.bias.flatten()[:, None]])[0])
        each = opened.split([group.fields for group in self._groups], 1)
        parts = self._split(x)
        return self._join([(parts[i] * each[i]).flatten(1, 2) for i in range(len(self._groups))]).to(x.dtype)

    def export(self):
        """A module of plain torch operations on the two tensors; sets this one to eval mode."""
        return traced(self)


class PointwiseNonLinearity(OnTensors, escnn.nn.PointwiseNonLinearity):
    """escnn.nn.PointwiseNonLinearity, with the same arguments."""
    __init__ = adopting_init(escnn.nn.PointwiseNonLinearity, supports="pointwise")

    def _compute(self, x):
        return self._function(x)


POINTWISE = {F.relu: Activation("relu"), F.elu: Activation("elu"), F.sigmoid: Activation("sigmoid"),
             F.tanh: Activation("tanh")}


def activation_of(module):
    """The Activation that a pointwise nonlinearity computes; or None.

    Of those classes themselves: their subclasses may compute something else.
    """
    if is_exactly(module, (escnn.nn.ReLU,)):
        return Activation("relu")
    if is_exactly(module, (escnn.nn.ELU,)) and module.alpha >= 0:
        return Activation("elu", module.alpha)
    if is_exactly(module, (escnn.nn.LeakyReLU,)) and module._negative_slope >= 0:
        return Activation("leaky_relu", module._negative_slope)
    if is_exactly(module, (escnn.nn.PointwiseNonLinearity, PointwiseNonLinearity)):
        return POINTWISE.get(module._function)
    return None


def function_of(module, names):
    """The name of the function without parameters that a pointwise nonlinearity computes, if it is one of these."""
    found = activation_of(module)
    return found.name if found is not None and found.name in names and found == Activation(found.name) else None


class VectorFieldNonLinearity(OnTensors, Pooling, escnn.nn.VectorFieldNonLinearity):
    """escnn.nn.VectorFieldNonLinearity, with the same arguments."""
    __init__ = adopting_init(escnn.nn.VectorFieldNonLinearity, supports="vectorfield")

    def _adopt(self):
        self._tabulate_pool(sizes_of(self.in_type), [1] * len(self.in_type))
        angle = torch.arange(self._rotations, dtype=torch.float64) * (2 * math.pi / self._rotations)
        directions = torch.stack([angle.cos(), angle.sin()], 1)
        self.register_buffer("_directions", directions.view(torch.int64), persistent=False)  # half() leaves integers

    def _compute(self, x):
        if is_fused(x) and not torch.jit.is_tracing():
            directions = self._directions.view(torch.float64).to(compute_dtype(x.dtype))
            return field_pool(x, self._fields, self._elements, False, directions=directions)
        length, orientation = x.unflatten(1, (len(self.in_type), self._rotations)).max(2)  # [B, fields, *spatial]
        angle = orientation * (2 * math.pi / self._rotations)
        return (torch.stack([angle.cos(), angle.sin()], 2) * length.relu().unsqueeze(2)).flatten(1, 2).to(x.dtype)


class ConcatenatedNonLinearity(OnTensors, escnn.nn.ConcatenatedNonLinearity):
    """escnn.nn.ConcatenatedNonLinearity, with the same arguments."""
    __init__ = adopting_init(escnn.nn.ConcatenatedNonLinearity, supports="concatenated")

    def _compute(self, x):
        if is_fused(x):
            return concatenated_act(x, self._function.__name__)
        return torch.stack([self._function(x), self._function(-x)], 2).flatten(1, 2)
