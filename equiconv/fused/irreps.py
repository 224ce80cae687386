"""A layer as the fused kernels see it: linear maps between the irreps of its input and of its output.

    x^_(m, copy) = A x                    of the input's fields: their irreps
    u_h          = x^ * H[h]              scalar harmonics
    z_a          = sum_(b,h) T[a, b, h] u_(b, h)          for each of the few different T from an irrep m to an irrep n
    y^_(n, copy') = sum of W[copy', copy] z_(m, copy)     with W the layer's weights, up to factors
    y            = A' y^

For irreps n of complex type the T come in pairs T, J T with J = [[0, -1], [1, 0]]: z is computed once for both, and
part 0 or 1 of the mixing says which of the two a weight belongs to.
"""
from dataclasses import dataclass

import numpy as np
import torch

from ..layout.folding import symmetrise

ROUNDING = 1e-10  # relative differences below this come from float64
ALIGNMENT = 8     # of the copies of an irrep: they are padded to a multiple
SCALES = 2.0 ** np.linspace(0, 1, 1024, endpoint=False)


class Unsupported(ValueError):
    """A layer that the fused kernels cannot compute; says why."""


@dataclass(frozen=True)
class Block:
    """All copies of an irrep: channels channel + component * copies + copy. Those after the first `used` are zero."""
    irrep: tuple
    size: int
    used: int
    channel: int

    @property
    def copies(self):
        return -(-self.used // ALIGNMENT) * ALIGNMENT


class Side:
    """The input or the output of a layer: fields, and those of their irreps that have weights, in blocks.

    blocks     list of Block
    fields     list of FieldsOf, of the fields
    channels   of the blocks, with padding
    place      {(channels of the fields, field, first component of the irrep): (number of the block, copy)}
    to_packed  [channels, field channels]: of the input x^ = to_packed @ x, of the output y = to_packed.T @ y^
    """

    def __init__(self, slots, field_channels, basis):
        """slots: (FieldsOf, IrrepSlot) of each weight; basis(layout) [size, size]: to irreps"""
        irreps, copies = {slot.irrep for _, slot in slots}, {}
        self.fields = list({f.channels: f for f, _ in slots}.values())
        for f in self.fields:
            for slot in (slot for slot in f.layout.slots if slot.irrep in irreps):
                size, found = copies.setdefault(slot.irrep, (slot.size, []))
                found += [(f, i, slot) for i in range(len(f))]
        self.blocks, self.place, self.channels = [], {}, 0
        for irrep, (size, found) in copies.items():
            block = Block(irrep, size, len(found), self.channels)
            for copy, (f, i, slot) in enumerate(found):
                self.place[f.channels, i, slot.start] = len(self.blocks), copy
            self.blocks.append(block)
            self.channels += size * block.copies
        self.to_packed = np.zeros((self.channels, field_channels))
        for block, (_, found) in zip(self.blocks, copies.values()):
            for copy, (f, i, slot) in enumerate(found):
                rows = block.channel + copy + block.copies * np.arange(slot.size)
                start = f.channels[i]
                self.to_packed[rows, start:start + f.layout.size] = basis(f.layout)[slot.components]


@dataclass(frozen=True)
class Mixing:
    """One row for each factor between a weight and an element of a mixing matrix. Arrays of one length.

    target, target_copy, source, source_copy   of the matrix element: blocks and copies
    z, part                                    see IrrepLayer.tensors
    weight, scale                              the element gets scale * weights[weight]
    """
    target: np.ndarray
    target_copy: np.ndarray
    source: np.ndarray
    source_copy: np.ndarray
    z: np.ndarray
    part: np.ndarray
    weight: np.ndarray
    scale: np.ndarray

    def where(self, mask):
        return Mixing(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


class IrrepLayer:
    """A FilterPlan in one of the two directions: from the input to the output or, the adjoint, from that to the input.

    source, target   Side
    harmonics        [R, *kernel], each even or odd along each axis
    dtype            torch's, of the numbers that the harmonics are rounded to
    stride, up       see Image in csrc/cuda/steerable_conv/structure.cuh
    tensors          {(number of a source block, of a target block): list of T [d_target, d_source, R]}
    is_complex       for each target block, whether its z serve two parts
    mixing           Mixing
    """

    def __init__(self, plan, kernel, sides, adjoint, dtype, stride=1):
        """sides: (input, output); stride: of the layer, along every axis"""
        self.source, self.target = reversed(sides) if adjoint else sides
        self.dtype, (self.stride, self.up) = dtype, (1, stride) if adjoint else (stride, 1)
        harmonics = symmetrise(plan.harmonics, kernel).reshape(-1, *kernel)
        scales = _exact_scales(harmonics, dtype)
        harmonics = scales.reshape(-1, *[1] * len(kernel)) * harmonics
        self.harmonics = np.flip(harmonics, range(1, harmonics.ndim)) if adjoint else harmonics
        paths = list(_paths(plan, scales, self.source, self.target, adjoint))
        self.is_complex = [_is_complex(n, block.size, paths) for n, block in enumerate(self.target.blocks)]
        self.tensors, rows = {}, []
        for path in paths:
            known = self.tensors.setdefault((path.source, path.target), [])
            z, part, scale = _find(path.tensor, known, self.is_complex[path.target])
            ones = np.ones(len(path.weights), int)
            rows.append((path.target * ones, path.target_copies, path.source * ones, path.source_copies, z * ones,
                         part * ones, path.weights, scale * ones))
        self.mixing = Mixing(*map(np.concatenate, zip(*rows)))


def round_to(values, dtype):
    """An array of float64, rounded as the kernels round to a torch.dtype: float32 stands for TF32."""
    if dtype != torch.float32:
        return torch.from_numpy(values).to(dtype).double().numpy()
    bits = values.astype(np.float32).view(np.int32)
    return ((bits + 0x1000) & ~0x1fff).view(np.float32).astype(np.float64)


def sides_of(plan):
    """(Side of the input, Side of the output) of a FilterPlan."""
    pairs = [pair for pair in plan.pairs if pair.paths]
    if not pairs:
        raise Unsupported("the layer has no weights")
    for fields in (f for pair in pairs for f in (pair.in_fields, pair.out_fields)):
        if fields.layout.slots[0].irrep is None:
            raise Unsupported("its kernels are not blocks between irreps")
    paths = [(pair, path) for pair in pairs for path in pair.paths]
    return (Side([(pair.in_fields, path.in_slot) for pair, path in paths], plan.in_channels,
                 lambda layout: layout.change_of_basis_inv),
            Side([(pair.out_fields, path.out_slot) for pair, path in paths], plan.out_channels,
                 lambda layout: layout.change_of_basis.T))


@dataclass(frozen=True)
class _Path:
    """One T of the plan, between two blocks, with its weights and the copies that each of them joins."""
    source: int
    target: int
    tensor: np.ndarray
    source_copies: np.ndarray
    target_copies: np.ndarray
    weights: np.ndarray


def _exact_scales(harmonics, dtype):
    """Factors [R] with which harmonics [R, *kernel] lose least when they are rounded to a torch.dtype.

    A harmonic has few different values: there are factors that make all of them nearly exact.
    """
    def error(values):  # [R, scales]
        rounded = round_to(values, dtype)
        return np.square(rounded - values).sum(-1) / np.square(values).sum(-1)

    return SCALES[np.argmin(error(harmonics.reshape(len(harmonics), 1, -1) * SCALES[:, None]), axis=1)]


def _paths(plan, scales, source, target, adjoint):
    first = 0
    for pair in plan.pairs:
        out_fields, in_fields, count = len(pair.out_fields), len(pair.in_fields), len(pair.paths)
        for p, path in enumerate(pair.paths):
            from_, to = (pair.in_fields, path.in_slot), (pair.out_fields, path.out_slot)
            tensor, weights = path.coefficients / scales, first + p + count * np.arange(out_fields * in_fields)
            weights = weights.reshape(out_fields, in_fields)
            if adjoint:
                from_, to, tensor, weights = to, from_, tensor.transpose(1, 0, 2), weights.T
            m, source_copies = _copies(source, *from_)
            n, target_copies = _copies(target, *to)
            targets, sources = np.meshgrid(target_copies, source_copies, indexing="ij")
            yield _Path(m, n, tensor, sources.ravel(), targets.ravel(), weights.ravel())
        first += out_fields * in_fields * count


def _copies(side, fields, slot):
    """(number of the block, copy of each field)"""
    found = [side.place[fields.channels, i, slot.start] for i in range(len(fields))]
    return found[0][0], np.array([copy for _, copy in found])


def _is_complex(n, size, paths):
    """Whether sharing z between T and J T leaves at most half of the z's."""
    if size != 2:
        return False
    counts = []
    for is_complex in (False, True):
        known = {}
        for path in paths:
            if path.target == n:
                _find(path.tensor, known.setdefault(path.source, []), is_complex)
        counts.append([len(tensors) for tensors in known.values()])
    real, shared = counts
    return bool(real) and sum(shared) <= sum(-(-count // 2) for count in real)


def _find(tensor, known, is_complex):
    """(number among the known tensors, part, factor); a new tensor is added to them."""
    parts = [tensor]
    if is_complex:
        parts.append(np.stack([tensor[1], -tensor[0]]))  # J^-1 tensor
    units = [_unit(t) for t in parts]
    for z, other in enumerate(known):
        for part, (unit, scale) in enumerate(units):
            if np.abs(unit - other).max() <= ROUNDING:
                return z, part, scale
    known.append(units[0][0])
    return len(known) - 1, 0, units[0][1]


def _unit(tensor):
    """(tensor / factor, factor): the first of the largest elements becomes 1."""
    size = np.abs(tensor)
    scale = tensor.flat[np.argmax(size > (1 - ROUNDING) * size.max())]
    return tensor / scale, scale
