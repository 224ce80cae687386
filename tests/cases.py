"""Named layers, shared by the tests and the benchmarks. Field types are built only where a case is used.

    case = CASES["c4_regular"]
    module = case.build(escnn.nn)            # and case.build(equiconv.nn): the same weights
    output = module(case.input(batch=4))

SMALL cases are fast and cover the semantics; REAL cases are layers of published networks, at their sizes, for timing;
LARGE cases are for timing their construction.
"""
import zlib
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import equiconv  # noqa: F401  # isort: skip  (before escnn, which it gives Wigner matrices where lie_learn is missing)
import torch
from escnn import group, gspaces
from escnn.nn import FieldType, GeometricTensor

SPACES = {
    **{f"C{n}": lambda n=n: gspaces.rot2dOnR2(n) for n in (1, 2, 3, 4, 8, 16)},
    **{f"D{n}": lambda n=n: gspaces.flipRot2dOnR2(n) for n in (1, 2, 4, 8, 16)},
    "SO(2)": lambda: gspaces.rot2dOnR2(-1),
    "O(2)": lambda: gspaces.flipRot2dOnR2(-1),
    "flip": gspaces.flip2dOnR2,
    "trivial": gspaces.trivialOnR2,
    "SO(3)": gspaces.rot3dOnR3,
    "O(3)": gspaces.flipRot3dOnR3,
    "octahedral": lambda: gspaces.octaOnR3(),
    "icosahedral": lambda: gspaces.icoOnR3(),
    "C4 on R3": lambda: gspaces.rot2dOnR3(4),
    "SO(2) on R3": lambda: gspaces.rot2dOnR3(-1),
    "fan on R3": lambda: gspaces.dihedralOnR3(2),
    "cylinder on R3": lambda: gspaces.cylindricalOnR3(2),
    "cone on R3": lambda: gspaces.conicalOnR3(2),
    "mirror on R3": gspaces.mirOnR3,
    "inversion on R3": gspaces.invOnR3,
    "trivial on R3": gspaces.trivialOnR3,
    "C8 at a point": lambda: gspaces.no_base_space(group.cyclic_group(8)),
    "D4 at a point": lambda: gspaces.no_base_space(group.dihedral_group(4)),
    "SO(2) at a point": lambda: gspaces.no_base_space(group.so2_group(6)),
    "O(2) at a point": lambda: gspaces.no_base_space(group.o2_group(6)),
    "SO(3) at a point": lambda: gspaces.no_base_space(group.so3_group(3)),
    "octahedral at a point": lambda: gspaces.no_base_space(group.octa_group()),
}


@cache
def space(name):
    """The gspace of that name: one object for all cases, so that they share escnn's caches."""
    return SPACES[name]()


# Fields of a type: each function returns a function from the gspace to a list of representations.

def regular(fields):
    return lambda g: fields * [g.regular_repr]


def trivial(fields):
    return lambda g: fields * [g.trivial_repr]


def irreps(*ids, fields=1):
    """The irreps one after the other, each `fields` times."""
    return lambda g: [g.irrep(*(i if isinstance(i, tuple) else (i,))) for i in ids for _ in range(fields)]


def quotient(subgroup, fields):
    return lambda g: fields * [g.quotient_repr(subgroup)]


def induced(subgroup, irrep, fields):
    return lambda g: fields * [g.induced_repr(subgroup, g.fibergroup.subgroup(subgroup)[0].irrep(irrep))]


def functions_on_group(frequency, fields):
    """Band-limited functions on the (continuous) group, as FourierELU has them."""
    return lambda g: fields * [g.fibergroup.bl_regular_representation(frequency)]


def functions_on_sphere(frequency, fields):
    return lambda g: fields * [g.fibergroup.bl_sphere_representation(frequency)]


def polynomials(degree, fields):
    """Polynomials of the coordinates up to that degree: 1 + x + x (x) x + ..., the field type of escnn's SE(3) CNN."""
    def build(g):
        vector, powers = g.irrep(1), [g.trivial_repr]
        for k in range(degree):
            powers.append(powers[-1].tensor(vector) if k else vector)
        return fields * [group.directsum(powers, name=f"polynomial_{degree}")]
    return build


def together(*parts):
    return lambda g: [r for part in parts for r in part(g)]


def alternating(first, second):
    """Fields of two types in turn, so that neither is contiguous."""
    return lambda g: [r for pair in zip(first(g), second(g)) for r in pair]


def dimensions_of(module):
    return {"R2": 2, "R3": 3}.get(module[:2], 0)


@dataclass(frozen=True)
class Case:
    """One layer and the size of its input.

    name         what tests and benchmarks call it
    module       name of the class in escnn.nn
    space        name of the gspace, a key of SPACES
    fields_in, fields_out   functions from the gspace to the list of representations
    arguments    of the class's constructor, by escnn's names (kernel_size, padding, ...)
    batch, size  of the input; size is () for Linear
    cpu_batch    what a benchmark on a few CPU cores uses instead of the network's batch
    tags         small or real; 2d, 3d or linear
    source       the network that the layer comes from
    """
    name: str
    module: str
    space: str
    fields_in: object
    fields_out: object
    arguments: dict = field(default_factory=dict)
    batch: int = 2
    size: tuple = ()
    cpu_batch: int = 2
    tags: frozenset = frozenset()
    source: str = ""

    @cached_property
    def in_type(self):
        return FieldType(space(self.space), self.fields_in(space(self.space)))

    @cached_property
    def out_type(self):
        return FieldType(space(self.space), self.fields_out(space(self.space)))

    @property
    def dimensions(self):
        return dimensions_of(self.module)

    @property
    def is_transposed(self):
        return self.module.endswith("Transposed")

    def batch_on(self, device):
        return self.cpu_batch if torch.device(device).type == "cpu" else self.batch

    def build(self, namespace, **overrides):
        """The module of `namespace` (escnn.nn or equiconv.nn), with the same weights and bias for the same case."""
        arguments = {**self.arguments, "initialize": False, **overrides}
        module = getattr(namespace, self.module)(self.in_type, self.out_type, **arguments)
        if not arguments["initialize"]:  # He's initialisation takes seconds for the real layers
            random = self._random("weights")
            scale = (self.out_type.size / module.weights.numel()) ** 0.5
            with torch.no_grad():
                module.weights.copy_(scale * torch.randn(module.weights.shape, generator=random))
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=random))
        return module

    def input(self, *, dtype=torch.float32, device="cpu", batch=None, size=None, requires_grad=False):
        """A GeometricTensor of normal noise, the same for the same shape."""
        shape = (batch or self.batch, self.in_type.size, *(size or self.size))
        x = torch.randn(shape, generator=self._random("input")).to(device, dtype).requires_grad_(requires_grad)
        return GeometricTensor(x, self.in_type)

    def _random(self, what):
        return torch.Generator().manual_seed(zlib.crc32(f"{self.name} {what}".encode()))


def only_low_frequencies(attributes):
    return attributes["irrep:frequency"] < 2


def _layer(module, name, space, fields_in, fields_out, kernel_size=None, *, batch=2, cpu_batch=None, size=None,
           source="", **arguments):
    d = dimensions_of(module)
    if kernel_size is not None:
        arguments = {"kernel_size": kernel_size, "padding": kernel_size // 2, **arguments}
    tags = frozenset(("real" if source else "small", f"{d}d" if d else "linear"))
    size = size or {0: (), 2: (9, 8), 3: (6, 5, 7)}[d]
    return Case(name, module, space, fields_in, fields_out, arguments, batch, size, cpu_batch or batch, tags, source)


_r2, _r3 = partial(_layer, "R2Conv"), partial(_layer, "R3Conv")
_r2_transposed, _r3_transposed = partial(_layer, "R2ConvTransposed"), partial(_layer, "R3ConvTransposed")
_linear = partial(_layer, "Linear", batch=5)

_C4 = ("C4", regular(2), regular(3))
_MIXED = together(regular(1), irreps(1), trivial(2))
_INTERLEAVED = alternating(regular(2), trivial(2))
_SO3 = ("SO(3)", irreps(0, 1, fields=2), irreps(0, 1, 2))
_ICO = ("icosahedral", irreps(0, 1), irreps(0, 1))

SMALL = [
    # groups and representations on the plane
    *[_r2(f"c{n}_regular", f"C{n}", regular(2), regular(3), 3) for n in (1, 2, 3, 4, 8)],
    *[_r2(f"d{n}_regular", f"D{n}", regular(2), regular(3), 3) for n in (1, 2, 4)],
    _r2("flip_regular", "flip", regular(2), regular(3), 3),
    _r2("trivial_group", "trivial", trivial(3), trivial(4), 3),
    _r2("so2_irreps", "SO(2)", irreps(0, 1, 2, 3, fields=2), irreps(0, 1, 2, 3, fields=3), 5),
    _r2("o2_irreps", "O(2)", irreps((0, 0), (1, 0), (1, 1), (1, 2), fields=2), irreps((0, 0), (1, 1), (1, 2)), 3),
    _r2("o2_induced", "O(2)", together(trivial(1), induced((None, -1), 1, 2)), induced((None, -1), 2, 1), 3),
    _r2("c8_quotient", "C8", together(quotient(2, 2), quotient(4, 1)), together(regular(1), quotient(2, 2)), 3),
    _r2("d4_quotient", "D4", together(quotient((None, 2), 1), quotient((0, 1), 2)),
        together(regular(1), quotient((None, 4), 1)), 3),
    # how the fields of a type are arranged
    _r2("c4_mixed", "C4", _MIXED, _MIXED, 3),
    _r2("c4_interleaved", "C4", _INTERLEAVED, alternating(irreps(1, fields=3), regular(3)), 3),
    _r2("c4_17_fields", "C4", regular(17), regular(3), 3),
    _r2("d2_odd_fields", "D2", together(regular(3), trivial(1)), together(trivial(17), regular(1)), 3),
    _r2("so2_empty_pairs", "SO(2)", irreps(0, 3), irreps(3, 0, 0), 3),  # k3 has no kernel between 0 and 3
    _r2("c4_no_bias_irrep", "C4", trivial(2), irreps(1, fields=2), 3),  # no trivial irrep: escnn makes no bias
    # kernels and their bases
    *[_r2(f"c4_k{k}", *_C4, k) for k in (1, 4, 5, 7)],
    _r2("d4_k5", "D4", regular(1), regular(2), 5),
    _r2("c4_basis_filter", *_C4, 5, basis_filter=only_low_frequencies),
    _r2("c4_rings", *_C4, 5, rings=[0.0, 1.5, 2.5], sigma=0.5, frequencies_cutoff=2.0),
    # geometry
    _r2("c4_stride2", *_C4, 3, stride=2),
    _r2("c4_dilation2", *_C4, 3, dilation=2, padding=2),
    _r2("c4_stride2_dilation2", *_C4, 5, stride=2, dilation=2, padding=1, size=(13, 11)),
    _r2("c4_no_padding", *_C4, 3, padding=0),
    _r2("c4_tuple_padding", *_C4, 5, padding=(1, 3)),
    *[_r2(f"c4_{mode}", *_C4, 5, padding_mode=mode) for mode in ("reflect", "replicate", "circular")],
    _r2("c4_circular_tuple", *_C4, 3, padding=(2, 1), padding_mode="circular"),
    _r2("c4_groups2", "C4", regular(4), regular(6), 3, groups=2),
    _r2("c4_depthwise", "C4", regular(5), regular(5), 3, groups=5),
    _r2("c4_no_bias", *_C4, 3, bias=False),
    _r2("c8_one_pixel", "C8", regular(2), regular(2), 5, padding=0, size=(5, 5)),
    # transposed
    _r2_transposed("c4_transposed", *_C4, 3),
    _r2_transposed("c4_transposed_stride2", *_C4, 5, stride=2, output_padding=1),
    _r2_transposed("c4_transposed_dilation2", *_C4, 3, padding=0, dilation=2),
    _r2_transposed("c4_transposed_groups2", "C4", regular(4), regular(2), 3, groups=2),
    _r2_transposed("c4_transposed_mixed", "C4", _MIXED, _INTERLEAVED, 3),
    # space
    _r3("so3_irreps", *_SO3, 3),
    _r3("so3_irreps_k5", *_SO3, 5),
    _r3("so3_functions", "SO(3)", trivial(2), functions_on_group(1, 2), 3),
    _r3("so3_sphere", "SO(3)", functions_on_sphere(2, 2), functions_on_sphere(2, 1), 3),
    _r3("o3_irreps", "O(3)", irreps((0, 0), (1, 0), (1, 1)), irreps((0, 0), (0, 1), (1, 1)), 3),
    _r3("octahedral_regular", "octahedral", trivial(2), regular(1), 3),
    _r3("octahedral_quotient", "octahedral", together(quotient((False, 4), 1), irreps(1)), quotient((False, 4), 2), 3),
    _r3("icosahedral_irreps", "icosahedral", irreps(0, 1), irreps(1, 0), 3),
    _r3("c4_on_r3", "C4 on R3", regular(1), regular(2), 3),
    _r3("so2_on_r3", "SO(2) on R3", irreps(0, 1), irreps(0, 1, 2), 3),
    *[_r3(f"{name}_on_r3", f"{name} on R3", regular(1), regular(2), 3)
      for name in ("fan", "cylinder", "cone", "mirror", "inversion")],
    _r3("trivial_on_r3", "trivial on R3", trivial(2), trivial(3), 3),
    _r3("so3_stride2", *_SO3, 3, stride=2),
    _r3("so3_dilation2", *_SO3, 3, dilation=2, padding=2),
    _r3("so3_tuple_padding", *_SO3, 3, padding=(0, 1, 2)),
    *[_r3(f"so3_{mode}", *_SO3, 3, padding_mode=mode) for mode in ("reflect", "replicate", "circular")],
    _r3("so3_groups2", "SO(3)", irreps(0, 1, 0, 1), irreps(1, 0, 1, 0), 3, groups=2),
    _r3_transposed("so3_transposed", *_SO3, 3),
    _r3_transposed("so3_transposed_stride2", *_SO3, 3, stride=2, output_padding=1),
    *[_layer("R3IcoConv", f"ico_{samples}", *_ICO, 3, samples=samples) for samples in ("ico", "dodeca", "icosidodeca")],
    _layer("R3IcoConv", "ico_regular", "icosahedral", trivial(1), regular(1), 3),
    _layer("R3IcoConvTransposed", "ico_transposed", *_ICO, 3, stride=2, output_padding=1),
    # at a point
    _linear("linear_c8", "C8 at a point", together(regular(2), trivial(1)), regular(3)),
    _linear("linear_d4", "D4 at a point", regular(2), together(trivial(3), regular(1))),
    _linear("linear_so2", "SO(2) at a point", irreps(0, 1, 2, fields=3), irreps(2, 1, 0, fields=2)),
    _linear("linear_o2", "O(2) at a point", irreps((0, 0), (1, 1), fields=2), irreps((1, 1), (0, 0), (1, 2))),
    _linear("linear_so3", "SO(3) at a point", irreps(0, 1, 2, fields=3), irreps(1, 2, 0)),
    _linear("linear_octahedral", "octahedral at a point", regular(2), regular(1)),
    _linear("linear_no_bias", "C8 at a point", regular(1), regular(2), bias=False),
]

_e2sfcnn = partial(_r2, batch=64, source="E2SFCNN C16")                                     # 28 x 28 images
_c8_cnn = partial(_r2, batch=64, source="C8 steerable CNN")                                 # 29 x 29
_wrn = partial(_r2, batch=32, bias=False, frequencies_cutoff=3.0, source="WRN-28-10 D8D4D1")  # 32 x 32
_se3_cnn = partial(_r3, batch=8, bias=False, source="SE(3) CNN 2_96")                       # 33 x 33 x 33
_plane = {"batch": 64, "cpu_batch": 8, "source": "sweep of groups"}
_volume = {"batch": 8, "size": (16, 16, 16), "source": "sweep of groups"}


def _same(name, space, fields, kernel_size, **options):
    """A layer from a type to itself: `name_k<kernel size>`."""
    return _r2(f"{name}_k{kernel_size}", space, fields, fields, kernel_size, **{**_plane, "size": (32, 32), **options})


_SO2_IRREPS, _O2_IRREPS = irreps(0, 1, 2, 3, fields=16), irreps((0, 0), (1, 1), (1, 2), (1, 3), fields=16)
_SO3_IRREPS = irreps(0, 1, 2, fields=16)
_SPHERE = functions_on_sphere(3, 8)

REAL = [
    # layers of published networks
    _e2sfcnn("e2sfcnn_c16_layer2", "C16", regular(24), regular(32), 7, cpu_batch=2, size=(20, 20)),
    _e2sfcnn("e2sfcnn_c16_layer5", "C16", regular(36), regular(64), 7, cpu_batch=4, size=(5, 5)),
    _e2sfcnn("e2sfcnn_c16_layer6", "C16", regular(64), regular(96), 5, padding=0, cpu_batch=16, size=(5, 5)),
    _c8_cnn("c8_cnn_layer1", "C8", trivial(1), regular(24), 7, padding=1, cpu_batch=16, size=(29, 29)),
    _c8_cnn("c8_cnn_layer2", "C8", regular(24), regular(48), 5, cpu_batch=2, size=(25, 25)),
    _c8_cnn("c8_cnn_layer5", "C8", regular(96), regular(96), 5, cpu_batch=4, size=(7, 7)),
    _wrn("wrn28_10_d8", "D8", regular(40), regular(40), 5, cpu_batch=1, size=(32, 32)),
    _wrn("wrn28_10_d4", "D4", regular(113), regular(113), 3, cpu_batch=1, size=(16, 16)),
    _wrn("wrn28_10_d1", "D1", regular(452), regular(452), 3, cpu_batch=2, size=(8, 8)),
    _wrn("wrn10_4_d4", "D4", regular(22), regular(22), 3, batch=128, cpu_batch=4, size=(33, 33), source="WRN-10-4 D4"),
    _se3_cnn("se3_cnn_stem", "SO(3)", trivial(1), polynomials(2, 3), 5, cpu_batch=1, size=(33, 33, 33)),
    _se3_cnn("se3_cnn_block1", "SO(3)", polynomials(2, 3), functions_on_group(2, 2), 3, cpu_batch=1, size=(33, 33, 33)),
    _se3_cnn("se3_cnn_block2_stride2", "SO(3)", functions_on_group(2, 5), polynomials(3, 6), 3, stride=2,
             size=(17, 17, 17), cpu_batch=2),
    _linear("so3_mlp_layer3", "SO(3) at a point", _SPHERE, _SPHERE, batch=4096, cpu_batch=1024,
            source="equivariant MLP"),
    # one width over groups and kernels
    _same("c4_32", "C4", regular(32), 3),
    *[_same("c8_16", "C8", regular(16), k) for k in (3, 5)],
    _same("c16_32", "C16", regular(32), 5, cpu_batch=1),
    *[_same("d4_16", "D4", regular(16), k) for k in (3, 5)],
    *[_same("d8_16", "D8", regular(16), k, cpu_batch=4) for k in (3, 5)],
    _same("so2_16", "SO(2)", _SO2_IRREPS, 5),
    _same("o2_16", "O(2)", _O2_IRREPS, 5),
    _r2("c8_16_k5_stride2", "C8", regular(16), regular(16), 5, stride=2, size=(32, 32), **_plane),
    _r2_transposed("c8_16_k5_transposed", "C8", regular(16), regular(16), 5, stride=2, output_padding=1, size=(16, 16),
                   **_plane),
    *[_r3(f"so3_16_k{k}", "SO(3)", _SO3_IRREPS, _SO3_IRREPS, k, cpu_batch=2, **_volume) for k in (3, 5)],
    *[_r3(f"octahedral_8_k{k}", "octahedral", regular(8), regular(8), k, cpu_batch=1, **_volume) for k in (3, 5)],
]

# layers that are only built: they take escnn long, and a process of their own
LARGE = [
    _same("d16_16", "D16", regular(16), 5, source=""),
    _same("d8_64", "D8", regular(64), 5, source=""),
    _r3("octahedral_1_k5", "octahedral", regular(1), regular(1), 5),
    _r3("icosahedral_1_k5", "icosahedral", regular(1), regular(1), 5),
]

CASES = {case.name: case for case in SMALL + REAL + LARGE}
