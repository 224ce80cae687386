"""What steerable_conv is made of: folded harmonics, the stages of a factorised plan, and the geometry of both ways."""
from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from equiconv.layout import PAIR, Geometry, complex_products, factorise
from equiconv.layout.conv_tables import HEADER, MAX_EVEN, MAX_ODD, PHASE, conv_tables
from equiconv.layout.folding import fold, point_symmetrise, symmetrise
from equiconv.reference.steerable_conv import steerable_conv
from tests.cases import CASES, SMALL
from tests.steerable_calls import Call, errors

SPATIAL = [case for case in SMALL if case.dimensions]
each_case = pytest.mark.parametrize("case", SPATIAL, ids=lambda case: case.name)


def three(axes):
    return (axes[0], 1, axes[1]) if len(axes) == 2 else tuple(axes)


# ---- folding ----

def unfolded(classes, harmonics, kernel):
    """The harmonics [R, *kernel] that FoldClasses compute: each tap's coefficient, by the signs of its position."""
    found = np.zeros((len(harmonics), *kernel))
    for c in classes:
        for position, row in zip(c.positions, c.coefficients, strict=True):
            for (o, outer), (m, middle), (i, inner) in product(*map(enumerate, (position.outer, position.middle,
                                                                                position.inner))):
                sign = (-1) ** (m * c.middle_odd + i * c.inner_odd)
                for place, r in enumerate((*c.even, *c.odd)):
                    is_odd = place >= len(c.even)
                    if is_odd and len(position.outer) == 1:
                        continue  # no part of odd harmonics
                    found[r, outer, middle, inner] += sign * (-1) ** (o * is_odd) * row[place]
    return found


@each_case
def test_folding_keeps_the_harmonics(case):
    """Of all taps and of those of each phase of strides 2 and 3."""
    call = Call.of(case)
    kernel = three(call.kernel)
    harmonics = symmetrise(call.plan.harmonics, kernel)
    for stride in (1, 2, 3):
        for residue in product(range(stride), repeat=3):
            taps = [list(range(r, k, stride)) for r, k in zip(residue, kernel)]
            grid = harmonics.reshape(-1, *kernel)
            want = np.zeros_like(grid)
            want[np.ix_(range(len(grid)), *taps)] = grid[np.ix_(range(len(grid)), *taps)]
            classes = fold(harmonics, kernel, taps)
            assert np.abs(unfolded(classes, harmonics, kernel) - want).max(initial=0) <= 1e-15
            assert sorted(r for c in classes for r in (*c.even, *c.odd)) == list(range(len(grid)))


@pytest.mark.parametrize("name,most", [("c8_16_k5", 100), ("so3_irreps_k5", 450)])
def test_folding_saves_multiplications(name, most):
    """C8, k5: 275 multiplications without folding; SO(3), k5: 1000."""
    call = Call.of(CASES[name])
    kernel = three(call.kernel)
    classes = fold(symmetrise(call.plan.harmonics, kernel), kernel, [range(k) for k in kernel])
    multiplications = sum(len(c.even) + (len(c.odd) if len(p.outer) == 2 else 0) for c in classes for p in c.positions)
    assert multiplications <= most < call.plan.harmonics.size / 2


def test_folding_of_functions_without_symmetry():
    generator = np.random.default_rng(0)
    kernel = (3, 1, 4)
    odd = np.array([-1.0, 0, 1])[:, None, None] * np.array([2.0, -1, -1, 2])
    harmonics = np.stack([generator.standard_normal(kernel), odd, generator.standard_normal(kernel)]).reshape(3, -1)
    assert np.array_equal(symmetrise(harmonics, kernel), harmonics)
    classes = fold(harmonics, kernel, [range(k) for k in kernel])
    assert np.array_equal(unfolded(classes, harmonics, kernel).reshape(3, -1), harmonics)
    folded, = (c for c in classes if c.odd)
    assert folded.odd == (1,) and len(folded.positions) == 4 and not folded.inner_odd


def test_noise_is_symmetrised_away():
    exact = np.outer([-1.0, 0, 1], [1.0, 2, 1]).reshape(1, -1)
    noise = 1e-7 * np.random.default_rng(0).standard_normal(exact.shape)
    found = symmetrise(exact + noise, (3, 1, 3)).reshape(3, 3)
    assert np.array_equal(found, -found[::-1]) and np.array_equal(found, found[:, ::-1])
    assert np.abs(found - exact.reshape(3, 3)).max() <= 1e-6


@each_case
def test_pairs_say_which_harmonics_are_even(case):
    """All harmonics have a parity, but some of icosahedral orbits; each pair's tables have the even ones first."""
    plan = Call.of(case).plan
    assert plan.parities.all() or case.module.startswith("R3Ico")
    symmetric = plan.parities != 0
    assert (plan.harmonics == plan.parities[:, None] * plan.harmonics[:, ::-1])[symmetric].all()
    pairs, _, values = plan.tables(torch.device("cpu"), torch.float64)
    for row in pairs.tolist():
        pair = dict(zip(PAIR, row))
        if pair["paths"]:
            even = pair["even_harmonics"]
            if even < 0:
                assert not plan.parities.all()
                continue
            h = values[pair["harmonics_start"]:][:pair["harmonics"] * plan.taps].view(-1, plan.taps)
            assert torch.equal(h[:even], h[:even].flip(1)) and torch.equal(h[even:], -h[even:].flip(1))


def test_harmonics_without_parity_stay_as_they_are():
    harmonics = np.array([[1.0, 2, 1 + 1e-9], [1, 0, -1], [1, 2, 3]])
    symmetric, parities = point_symmetrise(harmonics)
    assert parities.tolist() == [1, -1, 0] and (symmetric[1:] == harmonics[1:]).all()
    assert symmetric[0, 0] == symmetric[0, 2] and np.abs(symmetric[0] - harmonics[0]).max() <= 1e-9


# ---- factorised plans ----

def geometry_of(call):
    """As steerable_conv has it, for a call without padding modes."""
    d = len(call.kernel)
    each = {name: (value,) * d if isinstance(value, int) else tuple(value)
            for name, value in call.options.items() if name in ("stride", "padding", "dilation")}
    target = call.dense(*call.tensors()).shape[2:]
    return Geometry(call.kernel, each["stride"], each["padding"], each["dilation"], call.options["groups"],
                    call.transposed, *call.channels, tuple(call.size), tuple(target))


NOT_PADDED = [case for case in SPATIAL if case.arguments.get("padding_mode", "zeros") == "zeros"]


@pytest.mark.parametrize("case", NOT_PADDED, ids=lambda case: case.name)
def test_stages_equal_the_dense_convolution_both_ways(case):
    """The plan's stages give the convolution, and the adjoint's stages its gradient with respect to the input."""
    call, geometry = Call.of(case), geometry_of(Call.of(case))
    x, weights, bias = call.tensors()
    x.requires_grad_()
    want = call.dense(x, weights, bias)
    got = steerable_conv(x, weights, bias, factorise(call.plan, call.kernel), geometry)
    grad = torch.randn_like(want)
    expected, = torch.autograd.grad(want, x, grad)
    back = steerable_conv(grad, weights, None, factorise(call.plan, call.kernel, adjoint=True), geometry.adjoint)
    assert max(errors([got.detach(), back], [want.detach(), expected])) <= 1e-11


@each_case
def test_plans_are_complete(case):
    """Every weight has an entry, every channel of the target one target that does not add, every row its place."""
    call = Call.of(case)
    for adjoint in (False, True):
        plan = factorise(call.plan, call.kernel, adjoint)
        used = {(b.weights_start, path) for b in plan.blocks for *_, path, _ in b.entries}
        assert used == {(b.weights_start, path) for b in plan.blocks for path in range(b.paths)}
        assert sum(b.paths * b.out_fields * b.in_fields for b in plan.blocks) == call.plan.weights
        written = [channel + i for target in plan.targets if not target.adds for channel in target.fields.channels
                   for i in range(target.fields.layout.size)]
        assert sorted(written) == list(range(call.plan.in_channels if adjoint else call.plan.out_channels))
        for source in plan.sources:
            places = [(row.group, row.k, row.component) for row in source.rows]
            assert len(set(places)) == len(places) == sum(
                depth * plan.components[group] for group, depth in source.depth.items())
        for block in plan.blocks:
            for group, m, k, *_ in block.entries:
                assert m < block.target.height[group] and k < block.source.depth[group]


# ---- complex products ----

def mixed(plan):
    """{(target, component of its y^): value} for some u's and weights, of the first fields, by the plan's own rows."""
    y = defaultdict(float)
    for block in plan.blocks:
        z = {(row.group, row.k, row.component): sum(c * np.sin(b + 7 * h + 1) for b, h, c in row.terms)
             for row in block.source.rows}
        components = defaultdict(list)
        for component, (group, m, a) in block.target.places.items():
            components[group, m].append((component, a))
        for group, m, k, path, scale in block.entries:
            for component, a in components[group, m]:
                y[plan.targets.index(block.target), component] += (
                    scale * np.cos(block.weights_start + 3 * path) * _factor(plan, z, group, k, a))
    return y


def _factor(plan, z, group, k, a):
    """What element k of row m of W is multiplied with to give component a."""
    if group not in plan.complex:
        return z[group, k, a]
    pair, row = divmod(k, complex_products.ROWS)
    c, d = z[group, pair, 0], z[group, pair, 1]
    return (c + d, 0 if a == 0 else c, d if a == 0 else 0)[row]


@each_case
@pytest.mark.parametrize("adjoint", [False, True])
def test_complex_products_are_the_real_ones(case, adjoint):
    plan = factorise(Call.of(case).plan, Call.of(case).kernel, adjoint)
    found = complex_products.with_complex_products(plan)
    want, got = mixed(plan), mixed(found)
    assert want.keys() == got.keys() and want
    scale = max(map(abs, want.values()))
    assert max(abs(got[key] - value) for key, value in want.items()) <= 1e-9 * scale


@pytest.mark.parametrize("name,count", [("c3_regular", 1), ("c8_regular", 3), ("so2_irreps", 3), ("so2_on_r3", 2),
                                        ("d4_regular", 0), ("o2_irreps", 0), ("so3_irreps", 0)])
def test_complex_irreps_are_found(name, count):
    """All those of C_N and SO(2) with two components; none where each component has z's of its own."""
    plan = factorise(Call.of(CASES[name]).plan, Call.of(CASES[name]).kernel)
    assert len(complex_products.with_complex_products(plan).complex) == count


def test_what_is_not_complex_stays_real():
    """One scale of one path that differs between the components makes their group real, and no other."""
    plan = factorise(Call.of(CASES["c8_regular"]).plan, Call.of(CASES["c8_regular"]).kernel)
    block, = plan.blocks
    group = next(iter(complex_products.with_complex_products(plan).complex))
    at = next(i for i, entry in enumerate(block.entries) if entry[0] == group)
    block.entries[at] = (*block.entries[at][:4], 1.001 * block.entries[at][4])
    found = complex_products.with_complex_products(plan)
    assert len(found.complex) == 2 and group not in found.complex
    want, got = mixed(plan), mixed(found)
    assert all(abs(got[key] - value) <= 1e-9 for key, value in want.items())


@pytest.mark.parametrize("name,most", [("c8_16_k5", 1408), ("d8_16_k5", 2816), ("so2_16_k5", 1904), ("o2_16_k5", 976),
                                       ("so3_16_k5", 1776)])
def test_equal_rows_are_computed_once(name, most):
    """z's for one pixel of a layer of 16 fields."""
    plan = factorise(Call.of(CASES[name]).plan, Call.of(CASES[name]).kernel)
    assert sum(len(s.fields) * len(s.rows) for s in plan.sources) <= most


@pytest.mark.parametrize("name", ["c8_16_k5", "so3_irreps_k5", "octahedral_quotient", "c4_k7"])
@pytest.mark.parametrize("stride,up", [(1, False), (2, False), (2, True), (3, True)])
def test_tables_keep_to_what_the_kernels_were_compiled_for(name, stride, up):
    call = Call.of(CASES[name])
    d = len(call.kernel)
    index, values = conv_tables(factorise(call.plan, call.kernel), call.kernel, (stride,) * d, (1,) * d, 1, up)
    assert index.dtype == torch.int32 and values.dtype == torch.float64
    header = dict(zip(HEADER, index.tolist()))
    phases = index[header["phases_start"]:].tolist()
    assert header["phases"] == (stride ** d if up else 1)
    for i in range(header["phases"]):
        phase = dict(zip(PHASE, phases[i * len(PHASE):]))
        harmonics = []
        for c in range(phase["classes"]):
            even, odd, start, *_ = index[phase["classes_start"] + 7 * c:][:7].tolist()
            assert even <= MAX_EVEN and odd <= MAX_ODD and even + odd > 0
            harmonics += index[start:start + even + odd].tolist()
        assert sorted(harmonics) == list(range(header["harmonics"]))


# ---- geometry ----

@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("stride,padding,dilation,rest", [(1, 0, 1, 0), (2, 1, 1, 1), (3, 2, 2, 0), (2, 4, 3, 1)])
def test_geometry_is_that_of_torchs_convolutions(up, stride, padding, dilation, rest):
    """p + padding = stride * q + dilation * j says which numbers meet; the adjoint has the same pairs."""
    kernel, size = 3, 9
    reach = dilation * (kernel - 1)
    target = (size + 2 * padding - reach - 1) // stride + 1
    if up:
        target = (size - 1) * stride - 2 * padding + reach + rest + 1
    geometry = Geometry((kernel,), (stride,), (padding,), (dilation,), 1, up, 1, 1, (size,), (target,))
    matrix = torch.zeros(target, size, kernel, dtype=torch.float64)
    for j, source, place in product(range(kernel), range(size), range(target)):
        p, q = (place, source) if geometry.up else (source, place)
        if p + geometry.padding[0] == geometry.stride[0] * q + geometry.dilation[0] * j:
            matrix[place, source, j] = 1
    x, filter = (torch.randn(1, 1, n, dtype=torch.float64) for n in (size, kernel))
    want = (F.conv_transpose1d(x, filter, None, stride, padding, rest, 1, dilation) if up
            else F.conv1d(x, filter, None, stride, padding, dilation))
    torch.testing.assert_close(torch.einsum("tsj,s,j->t", matrix, x[0, 0], filter[0, 0]), want[0, 0])
    adjoint = geometry.adjoint
    assert adjoint.adjoint == geometry and adjoint.up != up
    assert (adjoint.source_size, adjoint.target_size) == (geometry.target_size, geometry.source_size)


def test_geometry_counts_the_fields_of_a_group():
    """Of p, a plan has the fields of one group; of q, those of all groups."""
    for up in (False, True):
        geometry = Geometry((3,), (1,), (1,), (1,), 3, up, 4, 12, (5,), (5,))
        assert geometry.fields(range(6), of_source=up) == 2 and geometry.fields(range(6), of_source=not up) == 6
