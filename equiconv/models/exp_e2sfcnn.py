"""The steerable CNN of the published comparison of fields and nonlinearities: both are options."""
import math
from bisect import bisect_right
from functools import partial, reduce
from itertools import accumulate
from operator import add

import torch

from .c8_steerable_cnn import mlp
from .e2sfcnn import POOLED, check_sizes
from .groups import parse_group, plane_of, restriction
from .harmonic import commutes_with_i
from .registry import register

STEPS = ("normalise", "activate", "pool", "invariants")  # behind a convolution, the last two in some layers only
CONTINUOUS = {"SO2": (False, -1), "O2": (True, -1)}  # (has reflections, rotations)


class Pointwise:
    """Fields whose channels a group permutes: batch norm, ELU, maximum over space and, in the end, over the group.

    reprs  escnn representations, one field of each for each unit of width

    Each step is a module, or a list of those for consecutive fields.

    restrict_after  how many of the steps see the fields of the larger group in a layer with a restriction
    """
    restrict_after = 0

    def __init__(self, reprs):
        self.reprs = reprs

    def fields(self, nn, plane, width):
        return nn.FieldType(plane, [r for r in self.reprs for _ in range(width)])

    def normalise(self, nn, fields):
        return nn.InnerBatchNorm(fields)

    def activate(self, nn, fields):
        return nn.ELU(fields)

    def pool(self, nn, fields):
        return nn.PointwiseMaxPool2D(fields, 2)

    def invariants(self, nn, fields):
        return nn.IdentityModule(fields) if all(r.is_trivial() for r in fields) else nn.GroupPooling(fields)


class Pooled(Pointwise):
    """The maximum over the group comes first."""

    def normalise(self, nn, fields):
        pool = nn.GroupPooling(fields)
        return nn.SequentialModule(pool, nn.InnerBatchNorm(pool.out_type))


class Scalarised(Pointwise):
    """The maximum over the group is part of the nonlinearity."""

    def activate(self, nn, fields):
        pool = nn.GroupPooling(fields)
        return nn.SequentialModule(pool, nn.ELU(pool.out_type))


class Vectors(Pointwise):
    """Regular fields that become vectors: the maximum over the group, in the direction of the rotation of it."""
    restrict_after = len(STEPS)  # the rotations of the larger group

    def activate(self, nn, fields):
        return nn.VectorFieldNonLinearity(fields)

    def pool(self, nn, fields):
        return nn.NormMaxPool(fields, 2)


class Norms(Pointwise):
    """Fields whose norms a group keeps: these are normalised, activated and pooled.

    induced   whether norms are those of the parts of induced representations
    function  of the norm: "n_relu", or "squash" (without a bias)
    """

    def __init__(self, reprs, induced=False, function="n_relu"):
        super().__init__(reprs)
        self.induced, self.function = induced, function
        if induced:
            self.restrict_after = len(STEPS)  # a restricted field is not induced any more

    def normalise(self, nn, fields):
        return (nn.InducedNormBatchNorm if self.induced else nn.NormBatchNorm)(fields)

    def activate(self, nn, fields):
        if self.induced:
            return nn.InducedNormNonLinearity(fields)
        return nn.NormNonLinearity(fields, function=self.function, bias=self.function != "squash")

    def pool(self, nn, fields):
        return nn.NormMaxPool(fields, 2)

    def invariants(self, nn, fields):
        return (nn.InducedNormPool if self.induced else nn.NormPool)(fields)


class WholeNorms(Norms):
    """Fields that hold trivial irreps too: batch norm is by irrep."""

    def normalise(self, nn, fields):
        return nn.GNormBatchNorm(fields)


class Gated(Norms):
    """The same with a gate for each field, which the nonlinearity consumes.

    gate  representation of the gates
    """
    restrict_after = 2  # a gate belongs to a field of the larger group

    def __init__(self, reprs, gate, induced=False):
        super().__init__(reprs, induced)
        self.gate = gate

    def fields(self, nn, plane, width):
        return nn.FieldType(plane, len(self.reprs) * width * [self.gate]) + super().fields(nn, plane, width)

    def normalise(self, nn, fields):
        half = len(fields) // 2
        gates, gated = fields.index_select(list(range(half))), fields.index_select(list(range(half, 2 * half)))
        return [nn.InnerBatchNorm(gates), super().normalise(nn, gated)]

    def activate(self, nn, fields):
        return (nn.InducedGatedNonLinearity1 if self.induced else nn.GatedNonLinearity1)(fields)


class Functions(Pointwise):
    """Functions of the group up to a frequency, by their Fourier coefficients: batch norm by function, ELU of samples.

    gspace, frequency  whose irreps they are of
    """

    def __init__(self, gspace, frequency):
        self.irreps, self.samples = gspace.fibergroup.bl_irreps(frequency), 4 * frequency + 4
        super().__init__([gspace.fibergroup.spectral_regular_representation(*self.irreps)])

    def normalise(self, nn, fields):
        return nn.IIDBatchNorm2d(fields)

    def activate(self, nn, fields):
        return nn.FourierELU(fields.gspace, len(fields), self.irreps, N=self.samples, type="regular")

    def pool(self, nn, fields):
        return nn.NormMaxPool(fields, 2)


class Symmetry:
    """A group of the plane, and its representations.

    rotations  by multiples of 360/rotations degrees; -1: by all angles, with irreps up to `frequency`
    """

    def __init__(self, reflections, rotations, frequency):
        self.reflections, self.rotations, self.frequency = reflections, rotations, frequency
        self.plane = plane_of(reflections, rotations, frequency)
        group = self.plane.fibergroup
        found = [group.irrep(*i) for i in group.bl_irreps(frequency)] if rotations == -1 else group.irreps()
        self.trivial, self.others = self.plane.trivial_repr, [r for r in found if not r.is_trivial()]

    @property
    def regular(self):
        return self.plane.regular_repr

    def irreps(self, highest=math.inf):
        """Up to that frequency and without the trivial one, each as often as a regular field holds it."""
        return [r for r in self.others if r.attributes["frequency"] <= highest
                for _ in range(r.size // r.sum_of_squares_constituents)]

    def induced(self):
        """(representation induced from scalars, [those induced from the other irreps]) of the rotations."""
        rotations = Symmetry(False, self.rotations, self.frequency)
        induce = partial(self.plane.induced_repr, (None, self.rotations))
        return induce(rotations.trivial), [induce(r) for r in rotations.others]


def _regular(symmetry, last, make=Pointwise):
    return [(Pooled if last else make)([symmetry.regular])]


def _regular_and_vectors(symmetry, last):
    return _regular(symmetry, last) if last else _regular(symmetry, last) + _regular(symmetry, last, Vectors)


def _quotients(symmetry, last):
    plane, n = symmetry.plane, symmetry.rotations
    subgroups = [2, 4 if n % 4 == 0 else 3]
    if symmetry.reflections:
        subgroups = [*[(axis, 1) for axis in (0, round(n / 4), round(n / 2))], (None, 2)]
    reprs = [*5 * [symmetry.regular], *[r for g in subgroups for r in 2 * [plane.quotient_repr(g)]],
             *(symmetry.regular.size // 4) * [symmetry.trivial]]
    return [(Pooled if last else Pointwise)(reprs)]


def _scalars(symmetry, last):
    return [Pointwise([symmetry.trivial])]


def _irreps(symmetry, last, end="conv", gated=False, shared=False, induced=False, function="n_relu"):
    """end: the last convolution leads to scalars alone ("conv"), or to all irreps, and then their norms are taken."""
    if induced:
        scalar, others = symmetry.induced()
        others = [] if last and end == "conv" else others
    else:
        scalar, others = symmetry.trivial, symmetry.irreps(0 if last and end == "conv" else math.inf)
    parts = [Pointwise([scalar])]
    if others:
        others = [_together(others)] if shared else others
        parts.append(Gated(others, scalar, induced) if gated else Norms(others, induced, function))
    return parts


def _whole_norms(symmetry, last):
    return [WholeNorms([_together([symmetry.trivial, *symmetry.irreps()])])]


def _functions(symmetry, last):
    return _scalars(symmetry, last) if last else [Functions(symmetry.plane, symmetry.frequency)]


def _together(reprs):
    from escnn import group

    return group.directsum(reprs, name=f"irreps_{'_'.join(r.name for r in reprs)}")


#: {name: parts(Symmetry, whether of the last layer)}, by the names of the published comparison, which has no "fourier"
FIELDS = {
    "regular": _regular,
    "quotient": _quotients,
    "scalarfield": partial(_regular, make=Scalarised),
    "vectorfield": partial(_regular, make=Vectors),
    "regvector": _regular_and_vectors,
    "trivial": _scalars,
    "hnet_conv": _irreps,
    "hnet_norm": partial(_irreps, end="norm"),
    "squash": partial(_irreps, function="squash"),
    "realhnet": _irreps,
    "realhnet2": _irreps,
    "sharednorm": partial(_irreps, end="norm", shared=True),
    "sharednorm2": _whole_norms,
    "gated_conv": partial(_irreps, gated=True),
    "gated_norm": partial(_irreps, end="norm", gated=True),
    "gated_conv_shared": partial(_irreps, gated=True, shared=True),
    "gated_norm_shared": partial(_irreps, end="norm", gated=True, shared=True),
    "inducedhnet_conv": partial(_irreps, induced=True),
    "inducedgated_conv": partial(_irreps, gated=True, induced=True),
    "inducedgated_norm": partial(_irreps, end="norm", gated=True, induced=True),
    "fourier": _functions,
}
FINITE = ("regular", "quotient", "scalarfield", "vectorfield", "regvector")
COMPLEX_LINEAR = ("realhnet", "realhnet2")
CONTINUOUS_ONLY = (*COMPLEX_LINEAR, "fourier")


@register(citation="Weiler, Cesa: General E(2)-Equivariant Steerable CNNs, NeurIPS 2019; "
                   "e2cnn_experiments, models/exp_e2sfcnn.py",
          input_shape=(1, 28, 28), group="C16")
def exp_e2sfcnn(nn, *, fields="regular", group="C16", frequency=3, restricted=None, fixed_parameters=True,
                widths=(16, 24, 32, 32, 48, 64), kernels=(7, 5, 5, 5, 5, 5), paddings=(1, 2, 2, 2, 2, 0), hidden=64,
                image_size=28, in_channels=1, classes=10):
    """ExpE2SFCNN, a classifier invariant to the rotations, and reflections, of its group.

    The bases of the kernels are escnn's defaults, which hold fewer angular frequencies than the published ones.

    nn                namespace of layers: escnn.nn or equiconv.nn
    fields            key of FIELDS, which names the fields and their nonlinearity:
                      regular, quotient    of finite groups, with ELU; quotient: also fields that subgroups leave alone
                      scalarfield, vectorfield, regvector
                                           regular fields that the nonlinearity makes scalars, vectors (of groups
                                           without reflections), or vectors for one half of them
                      trivial              scalars
                      hnet_*, squash       irreps, with a ReLU of their norms or squashing; realhnet, realhnet2 (of all
                                           rotations): with the kernels of harmonic networks, which are fewer:
                                           realhnet2 makes up for them in width
                      sharednorm*          all irreps in one field with one norm; sharednorm2: the scalar too
                      gated_*              irreps with a gate for each, *_shared: for all in one field
                      induced*             the same, induced from the rotations of a group with reflections
                      fourier              functions of all rotations, with ELU of their samples; in the last layer,
                                           only scalars
                      *_conv, *_norm       in the last layer, only scalars, or the norms of irreps
    group             C16 (rotations by multiples of 360/16 degrees), D16 (reflections too), SO2, O2, ...
    frequency         highest of the irreps, where rotations are by all angles
    restricted        (layer, group): from within that layer on, counted from 1, equivariance is only to that subgroup:
                      behind the convolution; with gates behind these; with vectors and induced fields behind the layer
    fixed_parameters  whether widths of the second to fifth layer are scaled so that convolutions between these have
                      about as many weights as with regular fields of C16
    widths            fields of the six layers for each representation of the option; the sixth: invariants
    kernels           their kernel sizes, in pixels; odd
    paddings          their zero padding, in pixels
    hidden            units of the head's hidden layer
    image_size        height and width of the input, in pixels
    in_channels       scalar channels of the input
    classes           outputs

    Raises ValueError for an unknown option, a group that it does not work with, or sizes that do not fit.
    """
    check_sizes(widths, kernels, paddings, image_size)
    if fields not in FIELDS:
        raise ValueError(f"fields must be one of {', '.join(FIELDS)}, got {fields!r}")
    symmetries = _symmetries(group, restricted, frequency)
    for symmetry in symmetries:
        _check_group(fields, symmetry)
    return ExpE2SFCNN(nn, fields, symmetries, fixed_parameters, widths, kernels, paddings, hidden, image_size,
                      in_channels, classes)


class ExpE2SFCNN(torch.nn.Module):
    """Six blocks of R2Conv, batch norm, nonlinearity and pooling; invariants at the end; then an MLP.

    forward: images [B, in_channels, H, W] -> logits [B, classes]
    in_type: field type of the images
    """

    def __init__(self, nn, fields, symmetries, fixed_parameters, widths, kernels, paddings, hidden, image_size,
                 in_channels, classes):
        super().__init__()
        self.image_size = image_size
        self.options = {"basis_filter": commutes_with_i} if fields in COMPLEX_LINEAR else {}
        plane = symmetries[0].plane
        self.in_type = current = nn.FieldType(plane, in_channels * [plane.trivial_repr])
        layers = []
        after = symmetries[1:] + symmetries[-1:]
        for i, (symmetry, width, kernel, padding) in enumerate(zip(symmetries, widths, kernels, paddings)):
            last = i == len(widths) - 1
            parts = FIELDS[fields](symmetry, last)
            if last:
                width /= sum(len(part.reprs) for part in parts)
            elif fixed_parameters and i > 0:
                width *= _fixing_scale(parts, symmetry.plane, kernel, self.options if fields != "realhnet" else {})
            else:
                width *= _scale(fields, symmetry)
            steps = [s for s in STEPS if (s != "pool" or i in POOLED) and (s != "invariants" or last)]
            restricted = after[i] if after[i] is not symmetry else None
            layers += self._layer(nn, current, parts, max(1, round(width)), kernel, padding, steps, restricted)
            current = layers[-1].out_type
        layers.append(nn.PointwiseAdaptiveMaxPool2D(current, 1))
        self.features = nn.SequentialModule(*layers)
        self.head = mlp(current.size, hidden, classes)

    def _layer(self, nn, in_type, parts, width, kernel, padding, steps, restricted):
        types = [part.fields(nn, in_type.gspace, width) for part in parts]
        layers = [nn.R2Conv(in_type, reduce(add, types), kernel, padding=padding, **self.options)]
        if restricted is not None:
            count = max(part.restrict_after for part in parts)
            before, steps = steps[:count], steps[count:]
            made, types = _by_parts(nn, parts, types, before)
            modules, parts, types = _restrict(nn, parts, types, restricted)
            layers += made + modules
        return layers + _by_parts(nn, parts, types, steps)[0]

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        invariant = self.features(self.in_type(images)).tensor  # [B, C, 1, 1]
        return self.head(invariant.flatten(1).to(images.dtype))  # escnn's group pooling always returns float32


def _by_parts(nn, parts, types, steps):
    """(modules that do the steps, each on all parts of a layer; the types of the parts after them)"""
    modules = []
    for step in steps:
        made = [getattr(part, step)(nn, fields) for part, fields in zip(parts, types)]
        made = [found if isinstance(found, list) else [found] for found in made]  # of consecutive fields
        every = [module for found in made for module in found]
        labels = [str(i) for i, module in enumerate(every) for _ in module.in_type]
        modules.append(every[0] if len(every) == 1 else nn.MultipleModule(
            reduce(add, types), labels, [(module, str(i)) for i, module in enumerate(every)]))
        types = [reduce(add, [module.out_type for module in found]) for found in made]
    return modules, types


def _restrict(nn, parts, types, symmetry):
    """(modules that take the fields as fields of a subgroup, the parts, their types); scalars go to the first part."""
    modules = restriction(nn, reduce(add, types), symmetry.reflections, symmetry.rotations)
    fields = modules[-1].out_type
    for r in fields:
        if r.is_trivial():  # escnn does not see that in a part of a sum of irreps
            r.supported_nonlinearities.add("pointwise")
    ends = list(accumulate(t.size for t in types))
    starts = [0, *accumulate(r.size for r in fields)][:-1]
    owners = [bisect_right(ends, start) for start in starts]
    owners = [0 if r.is_trivial() and isinstance(parts[o], Norms) else o for r, o in zip(fields, owners)]
    of_parts = [[n for n, owner in enumerate(owners) if owner == p] for p in range(len(parts))]
    order = sum(of_parts, [])
    if order != list(range(len(fields))):
        modules.append(nn.ReshuffleModule(fields, order))
    kept = [(part, fields.index_select(own)) for part, own in zip(parts, of_parts) if own]
    return modules, *zip(*kept)


def _fixing_scale(parts, plane, kernel, options):
    """Of the width, so that a convolution has as many weights as one between regular fields of C16."""
    from escnn import gspaces

    from .. import nn

    def weights(in_type, out_type, **options):
        return nn.R2Conv(in_type, out_type, kernel, bias=False, initialize=False, **options).weights.numel()

    types = [part.fields(nn, plane, 1) for part in parts]
    active = _by_parts(nn, parts, types, ["normalise", "activate"])[0][-1].out_type
    c16 = gspaces.rot2dOnR2(16)
    regular = nn.FieldType(c16, [c16.regular_repr])
    return math.sqrt(weights(regular, regular) / weights(active, reduce(add, types), **options))


def _scale(fields, symmetry):
    """Of the width, so that channels are about as many as with regular fields of the same group."""
    if fields == "quotient":
        return symmetry.regular.size / sum(r.size for part in _quotients(symmetry, False) for r in part.reprs)
    if fields == "vectorfield":
        return math.sqrt(symmetry.regular.size / 2)
    if fields == "scalarfield":
        return math.sqrt(symmetry.regular.size)
    return 1 / 2 if fields == "regvector" else 1


def _symmetries(group, restricted, frequency):
    """The Symmetry of each of the six layers."""
    before = _parse(group)
    if restricted is None:
        return 6 * [Symmetry(*before, frequency)]
    layer, subgroup = restricted
    after = _parse(subgroup)
    if not 1 <= layer <= 5:
            raise ValueError(f"restricted must name a layer from 1 to 5, got {layer}")
    divides = before[1] == -1 or (after[1] != -1 and before[1] % after[1] == 0)
    if after[0] > before[0] or not divides or before == after:
        raise ValueError(f"restricted must name a subgroup of {group}, got {subgroup!r}")
    return layer * [Symmetry(*before, frequency)] + (6 - layer) * [Symmetry(*after, frequency)]


def _parse(name):
    return CONTINUOUS[name] if name in CONTINUOUS else parse_group(name)


def _check_group(fields, symmetry):
    rotations, reflections = symmetry.rotations, symmetry.reflections
    needs = {
        "finitely many rotations": fields not in FINITE or rotations != -1,
        "all rotations (SO2 or O2)": fields not in CONTINUOUS_ONLY or rotations == -1,
        "no reflections": fields not in ("vectorfield", "regvector") or not reflections,
        "reflections": not fields.startswith("induced") or reflections,
        "more than one rotation": not fields.startswith(("induced", "vectorfield", "regvector")) or rotations != 1,
        "rotations whose number is even, and without reflections a multiple of 3 or 4":
            fields != "quotient" or (rotations % 2 == 0 and (reflections or rotations % 3 == 0 or rotations % 4 == 0)),
    }
    for need, is_met in needs.items():
        if not is_met:
            raise ValueError(f"fields {fields!r} need a group with {need}, got {symmetry.plane.name}")
