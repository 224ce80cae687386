"""One module of every class of escnn.nn, with an input: small, its fields not adjacent where escnn allows it.

    module = MODULES["InnerBatchNorm"].build(equiconv.nn)
    output = module(*MODULES["InnerBatchNorm"].inputs(module))
"""
import zlib
from dataclasses import dataclass
from functools import cache

import torch
from escnn import group, gspaces
from escnn.nn import FieldType, GeometricTensor


@cache
def plane():
    return gspaces.rot2dOnR2(4)


@cache
def circle():
    return gspaces.rot2dOnR2(-1)


@cache
def reflections():
    return gspaces.flipRot2dOnR2(-1)


@cache
def ball():
    return gspaces.rot3dOnR3()


@cache
def point():
    return gspaces.no_base_space(group.cyclic_group(4))


def of(space, *representations):
    return FieldType(space, list(representations))


def first_field(field_type):
    """A type of that field alone."""
    return of(field_type.gspace, field_type.representations[0])


def pointwise(space=plane):
    """Regular and trivial fields in turn."""
    g = space()
    return of(g, g.regular_repr, g.trivial_repr, g.regular_repr, g.trivial_repr)


def mixed(space=plane):
    g = space()
    return of(g, g.regular_repr, g.trivial_repr, g.irrep(1), g.regular_repr, g.irrep(1))


@cache
def reflected_ball():
    return gspaces.mirOnR3()


def solid():
    """Regular and trivial fields in turn, in space."""
    return pointwise(reflected_ball)


def icosahedral():
    g = gspaces.icoOnR3()
    return of(g, g.trivial_repr, g.irrep(1))


def regular():
    return of(plane(), plane().regular_repr, plane().regular_repr)


def entangled():
    """A sum of irreps that is one field, beside others."""
    g = plane()
    return of(g, group.directsum([g.irrep(1), g.trivial_repr], name="vector and scalar"), g.irrep(1), g.trivial_repr)


def vectors():
    """Irreps of the plane in two sizes, in turn."""
    g = plane()
    return of(g, g.irrep(1), g.irrep(2), g.irrep(1))


def adjacent_irreps():
    """escnn's GNormBatchNorm takes no others."""
    g = plane()
    return of(g, g.trivial_repr, g.trivial_repr, g.irrep(1), g.irrep(1), g.irrep(2))


def induced():
    g = reflections()
    return of(g, *2 * [g.induced_repr((None, -1), g.fibergroup.subgroup((None, -1))[0].irrep(1))])


def gated():
    g = plane()
    return of(g, g.trivial_repr, g.irrep(1), g.trivial_repr, g.regular_repr, g.irrep(1), g.trivial_repr)


def uniformly_gated():
    g = ball()
    return of(g, *2 * [group.directsum(2 * [g.trivial_repr] + [g.irrep(1), g.irrep(0)], name="gates and gated")])


def gates_of_induced():
    g = reflections()
    gate = g.induced_repr((None, -1), g.fibergroup.subgroup((None, -1))[0].irrep(0))
    return of(g, gate, gate, *induced().representations)


@dataclass(frozen=True)
class ModuleCase:
    """A class of escnn.nn, how to construct it, and the spatial size of its input."""
    name: str
    make: object
    size: tuple = (6, 6)

    def build(self, namespace):
        torch.manual_seed(zlib.crc32(self.name.encode()))
        module = self.make(namespace)
        with torch.no_grad():
            for name, parameter in sorted(module.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=self._random(name)))
        return module

    def inputs(self, module, **options):
        """GeometricTensors of normal noise, one for each argument of forward (or a dict of them for MergeModule)."""
        if self.name == "MergeModule":
            g = plane()
            return ({"a": self._input(of(g, g.regular_repr), "a", **options),
                     "b": self._input(of(g, g.trivial_repr), "b", **options)},)
        types = module.in_type if isinstance(module.in_type, tuple) else (module.in_type,)
        return tuple(self._input(t, str(i), **options) for i, t in enumerate(types))

    def _input(self, field_type, name, batch=3, dtype=torch.float32, requires_grad=False, memory_format=None):
        x = torch.randn(batch, field_type.size, *self.size, generator=self._random(name)).to(dtype)
        if memory_format is not None:
            x = x.contiguous(memory_format=memory_format)
        return GeometricTensor(x.requires_grad_(requires_grad), field_type)

    def _random(self, what):
        return torch.Generator().manual_seed(zlib.crc32(f"{self.name} {what}".encode()))


def outputs(result):
    """The tensors of what a module returned."""
    return [t.tensor for t in ([result[k] for k in sorted(result)] if isinstance(result, dict) else [result])]


def _branches(nn):
    g = plane()
    return [(nn.ReLU(of(g, g.regular_repr, g.regular_repr)), "a"), (nn.IdentityModule(of(g, g.trivial_repr)), "b")]


SO3_IRREPS, QUOTIENT_IRREPS = [(0,), (1,)], [(0,), (1,), (2,)]
CUBE = (5, 5, 5)
MODULES = {case.name: case for case in (
    ModuleCase("Linear", lambda nn: nn.Linear(mixed(point), pointwise(point)), ()),
    ModuleCase("R2Conv", lambda nn: nn.R2Conv(mixed(), pointwise(), 3, padding=1)),
    ModuleCase("R2ConvTransposed", lambda nn: nn.R2ConvTransposed(mixed(), pointwise(), 3, stride=2, output_padding=1)),
    ModuleCase("R3Conv", lambda nn: nn.R3Conv(solid(), solid(), 3), CUBE),
    ModuleCase("R3ConvTransposed", lambda nn: nn.R3ConvTransposed(solid(), solid(), 3), CUBE),
    ModuleCase("R3IcoConv", lambda nn: nn.R3IcoConv(icosahedral(), icosahedral(), 3), CUBE),
    ModuleCase("R3IcoConvTransposed", lambda nn: nn.R3IcoConvTransposed(icosahedral(), icosahedral(), 3), CUBE),
    ModuleCase("BranchingModule", lambda nn: nn.BranchingModule(mixed(), ["a", "b", "a", "c", "c"])),
    ModuleCase("MergeModule", lambda nn: nn.MergeModule([
        (nn.ReLU(of(plane(), plane().regular_repr)), "a"), (nn.ELU(of(plane(), plane().trivial_repr)), "b")])),
    ModuleCase("MultipleModule", lambda nn: nn.MultipleModule(
        of(plane(), plane().regular_repr, plane().trivial_repr, plane().regular_repr), ["a", "b", "a"], _branches(nn))),
    ModuleCase("R2Upsampling", lambda nn: nn.R2Upsampling(mixed(), 2)),
    ModuleCase("R3Upsampling", lambda nn: nn.R3Upsampling(solid(), 2), CUBE),
    ModuleCase("GatedNonLinearity1", lambda nn: nn.GatedNonLinearity1(
        gated(), ["gate", "gated", "gate", "gated", "gated", "gate"])),
    ModuleCase("GatedNonLinearity2", lambda nn: nn.GatedNonLinearity2(
        (of(plane(), *5 * [plane().trivial_repr]), mixed()))),
    ModuleCase("GatedNonLinearityUniform", lambda nn: nn.GatedNonLinearityUniform(uniformly_gated()), CUBE),
    ModuleCase("InducedGatedNonLinearity1", lambda nn: nn.InducedGatedNonLinearity1(gates_of_induced())),
    ModuleCase("NormNonLinearity", lambda nn: nn.NormNonLinearity(vectors())),
    ModuleCase("InducedNormNonLinearity", lambda nn: nn.InducedNormNonLinearity(induced())),
    ModuleCase("PointwiseNonLinearity", lambda nn: nn.PointwiseNonLinearity(pointwise(), "p_tanh")),
    ModuleCase("ConcatenatedNonLinearity", lambda nn: nn.ConcatenatedNonLinearity(regular())),
    ModuleCase("VectorFieldNonLinearity", lambda nn: nn.VectorFieldNonLinearity(regular())),
    ModuleCase("ReLU", lambda nn: nn.ReLU(pointwise())),
    ModuleCase("ELU", lambda nn: nn.ELU(pointwise())),
    ModuleCase("LeakyReLU", lambda nn: nn.LeakyReLU(pointwise())),
    ModuleCase("FourierPointwise", lambda nn: nn.FourierPointwise(circle(), 2, SO3_IRREPS, N=8, type="regular")),
    ModuleCase("FourierELU", lambda nn: nn.FourierELU(ball(), 2, SO3_IRREPS, N=4, type="thomson"), CUBE),
    ModuleCase("QuotientFourierPointwise", lambda nn: nn.QuotientFourierPointwise(
        ball(), (False, -1), 2, QUOTIENT_IRREPS, N=8, type="thomson"), CUBE),
    ModuleCase("QuotientFourierELU", lambda nn: nn.QuotientFourierELU(
        ball(), (False, -1), 2, QUOTIENT_IRREPS, N=8, type="thomson"), CUBE),
    ModuleCase("TensorProductModule", lambda nn: nn.TensorProductModule(
        of(plane(), *2 * [plane().irrep(1)]), of(plane(), *2 * [plane().regular_repr]))),
    ModuleCase("ReshuffleModule", lambda nn: nn.ReshuffleModule(mixed(), [4, 2, 0, 1, 3])),
    ModuleCase("NormMaxPool", lambda nn: nn.NormMaxPool(mixed(), 2)),
    ModuleCase("PointwiseMaxPool2D", lambda nn: nn.PointwiseMaxPool2D(pointwise(), 2)),
    ModuleCase("PointwiseMaxPool3D", lambda nn: nn.PointwiseMaxPool3D(solid(), 2), CUBE),
    ModuleCase("PointwiseMaxPoolAntialiased2D", lambda nn: nn.PointwiseMaxPoolAntialiased2D(pointwise(), 2)),
    ModuleCase("PointwiseMaxPoolAntialiased3D", lambda nn: nn.PointwiseMaxPoolAntialiased3D(solid(), 2), CUBE),
    ModuleCase("PointwiseAvgPool2D", lambda nn: nn.PointwiseAvgPool2D(mixed(), 2)),
    ModuleCase("PointwiseAvgPool3D", lambda nn: nn.PointwiseAvgPool3D(solid(), 2), CUBE),
    ModuleCase("PointwiseAvgPoolAntialiased2D", lambda nn: nn.PointwiseAvgPoolAntialiased2D(mixed(), 0.6, 2)),
    ModuleCase("PointwiseAvgPoolAntialiased3D", lambda nn: nn.PointwiseAvgPoolAntialiased3D(solid(), 0.6, 2), CUBE),
    ModuleCase("PointwiseAdaptiveAvgPool2D", lambda nn: nn.PointwiseAdaptiveAvgPool2D(pointwise(), 1)),
    ModuleCase("PointwiseAdaptiveAvgPool3D", lambda nn: nn.PointwiseAdaptiveAvgPool3D(solid(), 1), CUBE),
    ModuleCase("PointwiseAdaptiveMaxPool2D", lambda nn: nn.PointwiseAdaptiveMaxPool2D(pointwise(), 1)),
    ModuleCase("PointwiseAdaptiveMaxPool3D", lambda nn: nn.PointwiseAdaptiveMaxPool3D(solid(), 1), CUBE),
    ModuleCase("GroupPooling", lambda nn: nn.GroupPooling(pointwise())),
    ModuleCase("NormPool", lambda nn: nn.NormPool(mixed())),
    ModuleCase("InducedNormPool", lambda nn: nn.InducedNormPool(induced())),
    ModuleCase("InnerBatchNorm", lambda nn: nn.InnerBatchNorm(pointwise())),
    ModuleCase("NormBatchNorm", lambda nn: nn.NormBatchNorm(vectors())),
    ModuleCase("InducedNormBatchNorm", lambda nn: nn.InducedNormBatchNorm(induced())),
    ModuleCase("GNormBatchNorm", lambda nn: nn.GNormBatchNorm(adjacent_irreps())),
    ModuleCase("IIDBatchNorm1d", lambda nn: nn.IIDBatchNorm1d(mixed(point)), ()),
    ModuleCase("IIDBatchNorm2d", lambda nn: nn.IIDBatchNorm2d(mixed())),
    ModuleCase("IIDBatchNorm3d", lambda nn: nn.IIDBatchNorm3d(solid()), CUBE),
    ModuleCase("RestrictionModule", lambda nn: nn.RestrictionModule(mixed(), 2)),
    ModuleCase("DisentangleModule", lambda nn: nn.DisentangleModule(entangled())),
    ModuleCase("FieldDropout", lambda nn: nn.FieldDropout(mixed())),
    ModuleCase("PointwiseDropout", lambda nn: nn.PointwiseDropout(pointwise())),
    ModuleCase("SequentialModule", lambda nn: nn.SequentialModule(
        nn.R2Conv(mixed(), pointwise(), 3), nn.InnerBatchNorm(pointwise()), nn.ReLU(pointwise()))),
    ModuleCase("IdentityModule", lambda nn: nn.IdentityModule(mixed())),
    ModuleCase("MaskModule", lambda nn: nn.MaskModule(mixed(), 6)),
    ModuleCase("HarmonicPolynomialR3", lambda nn: nn.HarmonicPolynomialR3(2), ()),
)}
