"""Features of a sequence that stay in the basis of their irreps from one convolution to the next.

A convolution computes between irreps: it applies Q^-1 to the fields x that it reads, and Q to those that it writes.
Where only modules lie between two convolutions of a sequence that can work on Q^-1 x as well, the first one writes that
and the second one reads it, as InIrreps. Such modules are

- linear ones that treat all channels alike, and masks and dropout of whole fields: they commute with Q;
- norm and gated nonlinearities: they multiply fields by numbers, made of norms or of fields that have no Q;
- GNormBatchNorm, whose statistics are those of Q^-1 x;
- IIDBatchNorm, NormBatchNorm and InnerBatchNorm, if Q is orthogonal: their variances are traces, which do not depend on
  the basis, and their means are changed into the other basis;
- pointwise nonlinearities: Q^-1 f(Q x^), which is one pass (ops.fourier_act).

The types of all tensors stay what they are. Graphs (torch.compile, exports) and torch.func compute with fields; so do,
in evaluation, pointwise nonlinearities that `folds` makes part of a convolution.

On a CPU this saves multiplications, but hardly any time: the kernels apply Q while they copy between images and their
own memory, which takes as long without it. Pointwise nonlinearities lose: they apply Q and Q^-1 themselves;
InnerBatchNorm takes more passes when it trains. Time with fields / time with irreps (above 1: irreps are faster), on
two threads of an AMD EPYC, for regular fields of C8 (16, k3), D8 (16, k5) and octahedral ones (4, k3) between two
convolutions:

                           training      inference
nothing                    0.93 - 1.04   0.91 - 0.99
NormNonLinearity           0.99 - 1.05   0.93 - 0.99
GNormBatchNorm             0.97 - 1.00   0.94 - 1.03
GNormBatchNorm, ReLU       0.91 - 0.95   0.94 - 1.00
IIDBatchNorm               0.94 - 0.97   0.92 - 0.96
IIDBatchNorm, ReLU         0.84 - 0.98   0.83 - 0.98
InnerBatchNorm, ReLU       0.82 - 0.86   0.91 - 0.97
ReLU, antialiased pooling  0.84 - 0.97   0.91 - 0.99
the whole C8 CNN, E2SFCNN  0.89, 0.94    0.96, 0.99
"""
from itertools import groupby
from typing import NamedTuple

import escnn.nn
import torch

from ..formats import compute_dtype, like
from ..layout import FilterPlan
from ..ops import field_norm, field_norm_moments, fourier_act
from ..ops.on_fields import has_kernel
from ..reference.fourier_act import FUNCTIONS
from .bases import Bases, InIrreps, changes_of_basis
from .batchnorm import GNormBatchNorm, IIDBatchNorm1d, IIDBatchNorm2d, IIDBatchNorm3d, InnerBatchNorm
from .conv import _Conv
from .dropout import FieldDropout
from .masking import MaskModule
from .nonlinearities import GatedNonLinearity1, NormNonLinearity, function_of
from .norm_batchnorm import NormBatchNorm
from .pooling import (
    PointwiseAdaptiveAvgPool2D,
    PointwiseAdaptiveAvgPool3D,
    PointwiseAvgPool2D,
    PointwiseAvgPool3D,
    PointwiseAvgPoolAntialiased2D,
    PointwiseAvgPoolAntialiased3D,
)
from .synchronised import Moments, SynchronisedMoments, gather_moments, is_synchronised
from .tensors import has_hooks, is_exactly

COMMUTING = (escnn.nn.IdentityModule, escnn.nn.R2Upsampling, escnn.nn.R3Upsampling, FieldDropout, MaskModule,
             PointwiseAdaptiveAvgPool2D, PointwiseAdaptiveAvgPool3D, PointwiseAvgPool2D, PointwiseAvgPool3D,
             PointwiseAvgPoolAntialiased2D, PointwiseAvgPoolAntialiased3D)
BY_TRACES = (IIDBatchNorm1d, IIDBatchNorm2d, IIDBatchNorm3d, NormBatchNorm)
KNOWN = "_known_stretches"  # attribute of a sequence


def is_possible():
    """Whether features may be in another basis now: not in a graph, whose tables would have to be made before it.

    Nor where hooks of all modules would see them.
    """
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
                or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
                or torch.nn.modules.module._has_any_global_hook())


def run(sequence, x):
    """What a sequence makes of a GeometricTensor."""
    for stretch in _known_stretches(sequence):
        if stretch.writes_irreps:
            x = _run_in_irreps(stretch.leaves, x)
        else:
            x = stretch.leaves[0].parent._run([leaf.module for leaf in stretch.leaves], x)
    return x


def bases_of_modules(sequence):
    """{module: Bases} of the modules in a sequence."""
    found, reads = {}, False
    for writes, leaves in _known_stretches(sequence):
        for leaf in leaves:
            found[leaf.module] = Bases(reads, writes)
            reads = writes
    return found


class _Leaf(NamedTuple):
    """A module of a sequence, or of one inside it.

    way  how it computes on irreps: the plan of a convolution, a function(module, x) of other modules; None: not at all
    """
    parent: object
    module: object
    way: object


class _Stretch(NamedTuple):
    """Modules that follow each other. After those that write irreps comes a convolution that reads them."""
    writes_irreps: bool
    leaves: list


def _known_stretches(sequence):
    leaves = list(_leaves(sequence))
    known = sequence.__dict__.get(KNOWN)
    if known is None or known[0] != leaves:
        known = sequence.__dict__[KNOWN] = leaves, _stretches(leaves)
    return known[1]


def sequences():
    """The classes that compute what their modules compute one after the other."""
    from .containers import Sequential, SequentialModule  # which compute by this module
    return Sequential, SequentialModule


def _leaves(sequence):
    for module in sequence._modules.values():
        if has_hooks(module):
            yield _Leaf(sequence, module, None)
        elif getattr(module, "irrep_domain", False) and is_exactly(module, sequences()):
            yield from _leaves(module)
        else:
            way = _way_of(module)
            becomes_part = way is _pointwise and sequence.folds and not sequence.training  # of a convolution
            yield _Leaf(sequence, module, None if becomes_part else way)


def _stretches(leaves):
    """The _Stretches of all leaves of a sequence."""
    writes = [False] * len(leaves)
    for first in range(len(leaves)):
        last = _reader(leaves, first)
        if last is not None:
            writes[first:last] = [True] * (last - first)
    groups = groupby(zip(writes, leaves), lambda pair: (pair[0], None if pair[0] else id(pair[1].parent)))
    return [_Stretch(key[0], [leaf for _, leaf in group]) for key, group in groups]


def _reader(leaves, first):
    """The place of the convolution that reads the irreps that the one at the place `first` writes, or None."""
    _, module, plan = leaves[first]
    if not isinstance(plan, FilterPlan) or not plan.separates()[1] or changes_of_basis(module.out_type).is_split:
        return None
    expected = module.out_type
    for place, (_, module, way) in enumerate(leaves[first + 1:], first + 1):
        if way is None or module.in_type != expected:
            return None
        if isinstance(way, FilterPlan):
            return place if way.separates()[0] else None
        if not _suits(module):
            return None
        expected = module.out_type
    return None


def _run_in_irreps(leaves, x):
    place = 0
    while place < len(leaves):
        parent, module, way = leaves[place]
        if isinstance(way, FilterPlan):
            following = [leaf.module for leaf in leaves[place + 1:place + 2] if leaf.parent is parent]
            folded = [norm for norm in following if parent._folds_into(module, norm)]
            x = module.forward(x, *folded, writes_irreps=True)
            place += len(folded)
        else:
            x = InIrreps(like(way(module, x), x.tensor), module.out_type, x.coords)
        place += 1
    return x


# ---- how modules compute on irreps ----

def _way_of(module):
    """The `way` of a _Leaf: asked in each call, since it depends on more than types."""
    kind = type(module)
    if "forward" in module.__dict__:  # a function of the user's
        return None
    if isinstance(module, _Conv):
        is_ours = kind.forward is _Conv.forward and has_kernel(module.weights.device.type)
        return module.plan if is_ours else None
    if kind is InnerBatchNorm:
        return _inner_batch_norm if module._is_ordinary(module._children()) else None
    if kind in BY_TRACES or kind is GNormBatchNorm:
        return _batch_norm
    if kind in COMMUTING or kind in (GatedNonLinearity1, NormNonLinearity):
        return _as_it_is
    return None if function_of(module, FUNCTIONS) is None else _pointwise


def _suits(module):
    """Whether the representations of a module, other than a convolution, are such that it can compute on irreps."""
    if type(module) in (*BY_TRACES, InnerBatchNorm, NormNonLinearity):
        return changes_of_basis(module.in_type).is_orthogonal
    if type(module) is GatedNonLinearity1:
        fields = zip(module.in_type.representations, module._find_gates())
        return all(r.size == 1 and r.change_of_basis == 1 for r, is_gate in fields if is_gate)
    return True


def _as_it_is(module, x):
    return module.forward(x).tensor


def _pointwise(module, x):
    name = function_of(module, FUNCTIONS)

    def apply(part, q, q_inv):
        return FUNCTIONS[name][0](part) if q is None else fourier_act(part, q, q_inv, name)

    return changes_of_basis(module.in_type).map(x.tensor, apply)


def _batch_norm(norm, x):
    """Statistics are those of fields, except that variances, being traces, are given in the basis of irreps."""
    x, change, is_of_irreps = x.tensor, changes_of_basis(norm.in_type), isinstance(norm, GNormBatchNorm)
    if norm._reads_batch():
        mean, var, count = _moments(norm, x)
        moments = [mean if is_of_irreps else change.to_fields(mean), var, torch.as_tensor(count)]
        moments = torch.cat([t.double().view(-1).to(x.device) for t in moments])
        _, _, mean, deviation = norm._statistics(x, norm._tables(x), *norm._lists("weight", "bias"), moments)
        weights, biases = zip(*map(norm._affine_of, norm._groups))
        factor = deviation * _per_channel(norm, weights, deviation.new_ones(1, 1))
        offset = _per_channel(norm, biases, mean.new_zeros(1, 1)) - mean * factor
    else:
        factors, offsets = norm._evaluation()
        factor = norm._per_channel(factors)
        offset = torch.zeros_like(factor) if offsets is None else norm._per_channel(offsets)
    return _normalise(norm, x, factor, offset if is_of_irreps else change.to_irreps(offset))


def _inner_batch_norm(norm, x):
    """As _batch_norm, with gradients through the statistics."""
    if not norm._reads_batch():
        return _batch_norm(norm, x)
    x, change, fields = x.tensor, changes_of_basis(norm.in_type), _fields(norm)
    if norm._exchanges(norm._children()):
        mean, var, count = SynchronisedMoments.apply(x, fields, norm.process_group)
    else:
        mean, var = Moments.apply(x, fields)
        count = mean.new_tensor(x.numel() // x.shape[1], dtype=torch.float64)
    factors, offsets = norm._affine_through(x, change.to_fields(mean), var, count)
    return _normalise(norm, x, norm._per_channel(factors), change.to_irreps(norm._per_channel(offsets)))


def _moments(norm, x):
    """(mean, variance, count) of each component; of all processes if the batch norm is synchronised."""
    mean, var = field_norm_moments(x, _fields(norm), _no_bases(x))
    count = x.numel() // x.shape[1]
    return gather_moments(mean, var, count, norm.process_group) if is_synchronised(norm) else (mean, var, count)


def _normalise(norm, x, factor, offset):
    dtype = compute_dtype(x.dtype)
    return field_norm(x, factor.to(dtype), offset.to(dtype), _fields(norm), _no_bases(x))


def _fields(norm):
    """The table of ops.field_norm of a batch norm, without changes of basis."""
    return torch.cat([norm._fields[:, :2], torch.full_like(norm._fields[:, :1], -1)], 1)


def _no_bases(x):
    return x.new_empty(0, dtype=compute_dtype(x.dtype))


def _per_channel(norm, values, missing):
    """For each group [fields, 1 or size], or None where it is `missing` -> [C]."""
    return norm._per_channel([missing if v is None else v for v in values])
