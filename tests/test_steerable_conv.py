"""steerable_conv, native against the reference, and both against a dense convolution with the expanded filter."""
import re
from pathlib import Path

import pytest
import torch
from escnn import nn
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import equiconv.nn
from equiconv.layout import basis_block, complex_products, conv_tables
from equiconv.ops import pack_weights, steerable_conv
from equiconv.reference.steerable_conv import ACTIVATIONS
from tests.cases import CASES, REAL, SMALL, alternating, irreps, regular, space, together, trivial
from tests.steerable_calls import Call, errors, plan_between, results

EXACT, SINGLE = 1e-11, 1e-5  # relative errors, in float64 and in float32
SPATIAL = [case for case in SMALL if case.dimensions]
each_case = pytest.mark.parametrize("case", SPATIAL, ids=lambda case: case.name)
# each for a feature: mixed and interleaved types, changes of basis, 3D, transposed, an odd number of fields
LAYERS = ("c4_mixed", "c4_interleaved", "d4_quotient", "so3_irreps", "c4_transposed_stride2", "c4_17_fields")
each_activation = pytest.mark.parametrize("activation,alpha", [
    ("relu", 1.0), ("leaky_relu", 0.1), ("elu", 1.0), ("elu", 0.3), ("sigmoid", 1.0), ("tanh", 1.0)])
_FIELDS = together(regular(1), irreps(1), trivial(2))
_IRREPS = irreps(0, 1)


def assert_equals_reference(call, dtypes=(torch.float64, torch.float32)):
    want = results(call.reference, call.tensors())
    for dtype in dtypes:
        got = results(call, call.tensors(dtype))
        assert all(g.dtype == dtype for g in got)
        assert max(errors(got, want)) <= (EXACT if dtype == torch.float64 else SINGLE), errors(got, want)


def assert_equals_dense(call):
    assert max(errors(results(call, call.tensors()), results(call.dense, call.tensors()))) <= EXACT


def plane(kernel_size, size=(9, 8), batch=2, **options):
    return Call(plan_between("C4", _FIELDS, _FIELDS, kernel_size), (kernel_size,) * 2,
                {"padding": kernel_size // 2, **options}, batch, size)


def volume(kernel_size, size=(6, 5, 7), batch=2, **options):
    return Call(plan_between("SO(3)", _IRREPS, _IRREPS, kernel_size), (kernel_size,) * 3,
                {"padding": kernel_size // 2, **options}, batch, size)


@each_case
def test_equals_reference(case):
    assert_equals_reference(Call.of(case))


@each_case
def test_equals_dense_convolution(case):
    assert_equals_dense(Call.of(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in REAL if case.dimensions], ids=lambda case: case.name)
def test_real_layers_equal_the_dense_convolution(case):
    """In float32: sizes of published networks, whose tiles are cut along every axis."""
    call = Call.of(case).with_(batch=1)
    want = results(call.dense, call.tensors())
    assert max(errors(results(call, call.tensors(torch.float32)), want)) <= SINGLE


# ---- sizes and options ----

@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 129), (129, 7), (33, 31), (2, 300)], ids=str)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_sizes_of_the_plane(size, kernel_size):
    assert_equals_dense(plane(kernel_size, size))


@pytest.mark.parametrize("size", [(1, 1, 1), (65, 3, 4), (3, 65, 4), (3, 4, 65), (9, 17, 8)], ids=str)
def test_sizes_of_space(size):
    assert_equals_dense(volume(3, size))


@pytest.mark.parametrize("kernel_size,size,batch", [(3, (3, 3), 300), (3, (1, 1), 301), (5, (4, 3), 299)])
def test_many_small_images(kernel_size, size, batch):
    assert_equals_dense(plane(kernel_size, size, batch))


@pytest.mark.parametrize("layer,options", [(plane, {}), (volume, {}), (plane, dict(stride=2, transposed=True))])
def test_empty_batch(layer, options):
    call = layer(3, batch=0, **options)
    y, *gradients = results(call, call.tensors())
    want, *expected = results(call.dense, call.tensors())
    assert y.shape == want.shape
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("kernel_size", range(1, 10))
def test_kernel_sizes_of_the_plane(kernel_size):
    assert_equals_dense(plane(kernel_size, (11, 10)))


@pytest.mark.parametrize("kernel_size", range(1, 6))
def test_kernel_sizes_of_space(kernel_size):
    assert_equals_dense(volume(kernel_size))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_strides_and_dilations(kernel_size, stride, dilation):
    options = dict(stride=stride, dilation=dilation, padding=(dilation * (kernel_size // 2), 1))
    assert_equals_dense(plane(kernel_size, (13, 10), **options))
    assert_equals_dense(plane(kernel_size, (5, 6), **options, transposed=True))
    each = (stride, stride) if isinstance(stride, int) else stride
    rest = tuple(max(s, dilation) - 1 for s in each)  # the most that torch allows
    assert_equals_dense(plane(kernel_size, (5, 6), **options, transposed=True, output_padding=rest))


@pytest.mark.parametrize("options", [
    dict(stride=2), dict(stride=(1, 2, 3)), dict(dilation=2, padding=2), dict(stride=2, dilation=2, padding=(1, 0, 3)),
    dict(stride=2, transposed=True, output_padding=1),
    dict(stride=(3, 1, 2), transposed=True, output_padding=(2, 0, 1)),
    dict(dilation=(1, 2, 2), transposed=True)], ids=str)
def test_strides_and_dilations_of_space(options):
    assert_equals_dense(volume(3, **options))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, 2, (0, 3)], ids=str)
def test_padding_modes(mode, padding):
    assert_equals_dense(plane(5, padding=padding, padding_mode=mode))
    assert_equals_dense(volume(3, padding=padding if isinstance(padding, int) else (*padding, 1), padding_mode=mode))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [2, 5])
def test_groups(groups, stride, transposed):
    """Fields of p are those of one group, those of q of all of them: see layout.Geometry."""
    few, many = _FIELDS, lambda g: groups * _FIELDS(g)
    plan = plan_between("C4", few, many, 3) if not transposed else plan_between("C4", many, few, 3)
    options = dict(padding=1, stride=stride, groups=groups, transposed=transposed)
    assert_equals_dense(Call(plan, (3, 3), options, 2, (9, 8)))


@pytest.mark.parametrize("name", LAYERS)
def test_memory_formats(name):
    call = Call.of(CASES[name])
    x, weights, bias = call.tensors()
    want = results(call, (x, weights, bias))
    last = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    every_other = x.repeat_interleave(2, -1)[..., ::2]
    for other in (last, every_other, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = results(call, (other, weights.repeat_interleave(3)[::3], bias))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    x, weights, bias = (t.requires_grad_() for t in call.tensors())
    y = call(x, weights, bias)
    grad = torch.randn_like(y)
    for other in (grad.transpose(-1, -2).contiguous().transpose(-1, -2), grad[:1, :1].expand_as(grad)):
        got = torch.autograd.grad(y, (x, weights, bias), other, retain_graph=True)
        want = torch.autograd.grad(y, (x, weights, bias), other.contiguous(), retain_graph=True)
        assert max(errors(got, want)) <= EXACT


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("isa")
def test_instruction_sets(name):
    assert_equals_reference(Call.of(CASES[name]))


# ---- derivatives, graphs ----

def small(name):
    call = Call.of(CASES[name])
    return call.with_(batch=1, size=(4, 3) if len(call.size) == 2 else (3, 2, 3))


def with_a_basis_of_its_own(name):
    """A call whose plan has two targets for the same fields: one of its bases does not separate into irreps."""
    call, module = small(name), CASES[name].build(equiconv.nn)
    for pair in module.basisexpansion._representations_pairs[:1]:
        basis = basis_block(module.basisexpansion, pair).sampled_basis
        mixing = torch.linalg.qr(torch.randn(len(basis), len(basis), generator=torch.Generator().manual_seed(0)))[0]
        basis.copy_(torch.einsum("de,eois->dois", mixing, basis))
    assert any(target.adds for target in module.plan.factorised(call.kernel).targets)
    return call.with_(plan=module.plan)


def overloads(call, x):
    """The two ops without their tables, and shape and options: what the public function makes of a call."""
    d = len(call.kernel)
    each = {key: [value] * d if isinstance(value, int) else list(value)
            for key, value in call.options.items() if key in ("stride", "padding", "dilation")}
    stride, padding, dilation = (each.get(key, [default] * d) for key, default in
                                 (("stride", 1), ("padding", 0), ("dilation", 1)))
    groups, up = call.options.get("groups", 1), call.transposed
    shape = (call.kernel, tuple(stride), tuple(dilation), groups)
    tables = [*call.plan.conv_tables(*shape, up, False, x.device, x.dtype),
              *call.plan.conv_tables(*shape, not up, True, x.device, x.dtype)]
    options = [list(call.kernel), stride, padding, dilation, groups]
    target = list(call(*call.tensors()).shape[1:])
    return (*tables, *options, up, target), (*tables[2:], *tables[:2], *options, not up, list(x.shape[1:]))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(name, dtype):
    call = small(name)
    x, weights, bias = call.tensors(dtype)
    same, adjoint = overloads(call, x)
    tolerance = dict(atol=1e-4, rtol=1e-4)
    forward, backward = torch.ops.equiconv.steerable_conv.default, torch.ops.equiconv.steerable_conv_bwd.default
    y = forward(x, weights, bias, *same)
    for grad in (False, True):
        inputs = [t.detach().clone().requires_grad_(grad) for t in (x, weights, bias, torch.randn_like(y))]
        opcheck(forward, (*inputs[:3], *same), **tolerance)
        opcheck(forward, (*inputs[:2], None, *same), **tolerance)
        for wants in ((True, True), (True, False), (False, True)):
            opcheck(backward, (inputs[3], inputs[1], inputs[0], *adjoint, *wants), **tolerance)
    index, values, *shape = same[:2] + same[4:]
    pack, of_packed = torch.ops.equiconv.steerable_conv_pack.default, torch.ops.equiconv.steerable_conv_packed.default
    opcheck(pack, (weights, index, values, shape[4]))
    opcheck(of_packed, (x, pack(weights, index, values, shape[4]), bias, 1, 1.0, index, values, *shape))


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name):
    call = small(name)
    tensors = [t.requires_grad_() for t in call.tensors()]
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)
    same, adjoint = overloads(call, tensors[0])  # the registered formulas, not the eager functions'

    def forward(x, weights, bias):
        return torch.ops.equiconv.steerable_conv(x, weights, bias, *same)

    def backward(grad, weights, x):
        return torch.ops.equiconv.steerable_conv_bwd(grad, weights, x, *adjoint, True, True)

    assert torch.autograd.gradcheck(forward, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, tensors, fast_mode=True)
    grad = torch.randn_like(forward(*tensors)).requires_grad_()
    assert torch.autograd.gradcheck(backward, (grad, tensors[1], tensors[0]), fast_mode=True)


@each_activation
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("isa")
def test_activations(name, activation, alpha):
    """Values and gradients, first and second, against the definition and against the function after the op."""
    call = small(name)
    activated = call.with_(options={**call.options, "activation": activation, "alpha": alpha})
    tensors = call.tensors()
    got, want = (results(f, tensors) for f in (activated, activated.reference))
    assert max(errors(got, want)) <= EXACT
    after = results(lambda *t: ACTIVATIONS[activation][0](call(*t), alpha), tensors)
    assert max(errors(got, after)) <= EXACT
    single = results(activated, [None if t is None else t.float() for t in tensors])
    assert max(errors(single[:1], want[:1])) <= 1e-6


def test_activations_of_fields_of_several_targets():
    call = with_a_basis_of_its_own("d4_quotient")
    activated = call.with_(options={**call.options, "activation": "elu"})
    assert max(errors(results(activated, call.tensors()), results(activated.reference, call.tensors()))) <= EXACT


@each_activation
def test_gradients_of_activations(activation, alpha):
    call = small("c4_mixed")
    call = call.with_(options={**call.options, "activation": activation, "alpha": alpha})
    tensors = [t.requires_grad_() for t in call.tensors()]
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)
    same, _ = overloads(call, tensors[0])
    number = list(ACTIVATIONS).index(activation)
    op = torch.ops.equiconv.steerable_conv_activated.default
    opcheck(op, (*tensors, number, alpha, *same), atol=1e-4, rtol=1e-4)
    opcheck(op, (*[t.detach() for t in tensors], number, alpha, *same), atol=1e-4, rtol=1e-4)
    call(*tensors)  # makes the tables
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(results(compiled, tensors), results(call, tensors))


def test_activations_of_bad_numbers():
    call = plane(3)
    x, weights, bias = call.tensors()
    bias[0], bias[1], bias[2] = float("nan"), float("inf"), -float("inf")
    for activation in ACTIVATIONS:
        activated = call.with_(options={**call.options, "activation": activation})
        torch.testing.assert_close(activated(x, weights, bias), activated.reference(x, weights, bias), equal_nan=True)


@pytest.mark.parametrize("wanted", range(1, 7))
def test_only_the_gradients_that_are_needed(wanted):
    call = small("c4_mixed")
    want = results(call, call.tensors())[1:]
    tensors = [t.requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(call.tensors())]
    y = call(*tensors)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(grad)
    for tensor, gradient in zip(tensors, want, strict=True):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        assert tensor.grad is None or max(errors([tensor.grad], [gradient])) <= EXACT


@pytest.mark.parametrize("name", LAYERS)
def test_compile(name):
    call = Call.of(CASES[name])
    tensors = call.tensors(torch.float32)
    call(*tensors)  # makes the tables

    def function(x, weights, bias):
        return call(2 * x, weights, bias).sin()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(results(compiled, tensors), results(function, tensors))


def test_compile_for_any_batch():
    call, compilations = Call.of(CASES["c4_mixed"]), []
    call(*call.tensors())  # makes the tables

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for batch in (2, 3, 5, 8):
        other = call.with_(batch=batch)
        torch.testing.assert_close(compiled(*other.tensors()), other(*other.tensors()))
    assert len(compilations) == 1


def test_fake_tensors():
    call = Call.of(CASES["c4_transposed_stride2"])
    want = call(*call.tensors())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = [mode.from_tensor(t).requires_grad_() for t in call.tensors()]
        y = call(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == want.shape and y.dtype == want.dtype and y.stride() == want.stride()
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


def test_functional_transforms():
    call = small("c4_mixed")
    x, weights, bias = call.tensors()

    def loss(x, weights):
        return call(x, weights, bias).square().sum()

    want = torch.autograd.grad(loss(x.requires_grad_(), weights.requires_grad_()), (x, weights))
    x, weights = x.detach(), weights.detach()
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, weights), want)
    several = torch.stack([weights, 2 * weights, 0 * weights])
    torch.testing.assert_close(torch.func.vmap(loss, (None, 0))(x, several), torch.stack([loss(x, w) for w in several]))
    images = torch.stack([x, x + 1], 2)
    torch.testing.assert_close(torch.func.vmap(loss, (2, None))(images, weights),
                               torch.stack([loss(x, weights), loss(x + 1, weights)]))
    each = torch.func.vmap(torch.func.grad(loss, 1), (2, None))(images, weights)
    torch.testing.assert_close(each[0], want[1])


# ---- threads, and what may not leak ----

@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [1, 5])
def test_results_depend_on_nothing_but_the_number_of_threads(name, batch, threads):
    call = Call.of(CASES[name])
    call = call.with_(batch=batch, size=(33, 31) if len(call.size) == 2 else (9, 8, 17))
    tensors, found = call.tensors(torch.float32), {}
    for count in (1, 2, 3):
        threads(count)
        found[count] = results(call, tensors)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(results(call, tensors), found[count], strict=True))
    for count in (2, 3):
        assert max(errors(found[count], [t.double() for t in found[1]])) <= SINGLE


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LAYERS)
def test_bad_numbers_stay_in_their_image(name, bad):
    call = Call.of(CASES[name]).with_(batch=6)
    x, weights, bias = call.tensors(torch.float32)
    want, *gradients = results(call, (x, weights, bias))
    spoiled = x.clone()
    spoiled[2] = bad
    got, grad_x, *_ = results(call, (spoiled, weights, bias))
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], want[others]) and not got[2].isfinite().any()
    assert torch.equal(grad_x, gradients[0])
    again = results(call, (x, weights, bias))
    assert all(torch.equal(a, b) for a, b in zip(again, [want, *gradients], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_group(bad):
    call = Call.of(CASES["c4_depthwise"])
    x, weights, bias = call.tensors()
    want = results(call, (x, weights, bias))
    size, mine = x.shape[1] // 5, len(weights) // 5
    x[:, 2 * size:3 * size] = bad
    y, grad_x, grad_weights, _ = results(call, (x, weights, bias))
    clean = [0, 1, 3, 4]
    for got, expected, length in ((y, want[0], size), (grad_x, want[1], size)):
        for g in clean:
            assert torch.equal(got[:, g * length:(g + 1) * length], expected[:, g * length:(g + 1) * length])
    for g in clean:
        assert torch.equal(grad_weights[g * mine:(g + 1) * mine], want[2][g * mine:(g + 1) * mine])


def test_pixels_that_no_window_reads_may_be_anything():
    call = plane(3, (10, 9), padding=0, stride=2)
    x, weights, bias = call.tensors()
    want = results(call, (x, weights, bias))
    x[:, :, -1] = float("nan")
    assert all(torch.equal(g, w) for g, w in zip(results(call, (x, weights, bias)), want, strict=True))


def test_every_output_is_written():
    """torch fills what it allocates with NaN here: nothing may be left of it, in zero blocks neither."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        cases = [CASES[name] for name in ("so2_empty_pairs", "c4_interleaved", "so3_transposed_stride2")]
        for call in (*map(Call.of, cases), plane(1, stride=3),
                     plane(3, (4, 4), stride=3, transposed=True, output_padding=2)):
            assert all(t.isfinite().all() for t in results(call, call.tensors(torch.float32)))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- any layer ----

SPACES = ("C1", "C2", "C3", "C4", "C8", "D1", "D2", "D4", "SO(2)", "O(2)", "trivial", "flip")


@st.composite
def calls(draw):
    """A layer of the plane with random fields, multiplicities, sizes and options."""
    g = space(draw(st.sampled_from(SPACES)))
    group = g.fibergroup
    representations = [g.trivial_repr, *group.irreps()[:4], *([g.regular_repr] if group.order() > 0 else [])]

    def fields():
        runs = draw(st.lists(st.tuples(st.sampled_from(representations), st.sampled_from([1, 3, 17])), min_size=1,
                             max_size=3))
        found = [r for r, count in runs for _ in range(count if r.size <= 2 else min(count, 3))]
        return draw(st.permutations(found)) if draw(st.booleans()) else found

    kernel_size = draw(st.integers(1, 5))
    transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 1, 3]))
    few, many = fields(), groups * fields()  # of p and of q: see layout.Geometry
    types = [nn.FieldType(g, f) for f in ((many, few) if transposed else (few, many))]
    try:
        conv = equiconv.nn.R2Conv(*types, kernel_size, initialize=False)
    except ValueError:  # no equivariant kernel between these types
        assume(False)
    stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(2))
    options = dict(stride=stride, dilation=dilation, groups=groups, transposed=transposed,
                   padding=draw(st.tuples(*[st.integers(0, kernel_size)] * 2)))
    size = draw(st.tuples(*[st.integers(1, 20)] * 2))
    reach = [d * (kernel_size - 1) for d in dilation]
    if transposed:
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
        least = [(n - 1) * s - 2 * p + r + 1 for n, s, p, r in zip(size, stride, options["padding"], reach)]
    else:
        least = [n + 2 * p - r for n, p, r in zip(size, options["padding"], reach)]
    assume(min(least) >= 1)
    return Call(conv.plan, conv.kernel, options, draw(st.integers(1, 3)), size, draw(st.booleans()),
                draw(st.integers(0, 100)))


def any_layer(examples):
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)


@any_layer(300)
@given(calls())
def test_any_layer(call):
    assert_equals_dense(call)
    tensors = call.tensors()
    assert max(errors([call.reference(*tensors)], [call.dense(*tensors)])) <= EXACT


@pytest.mark.slow
@any_layer(1500)
@given(calls())
def test_very_many_layers(call):
    assert_equals_dense(call)


@pytest.mark.parametrize("count", [1, 3, 17, 33])
@pytest.mark.parametrize("kind", [regular, trivial, lambda n: irreps((1, 1), fields=n),
                                  lambda n: alternating(regular(n), trivial(n))],
                         ids=["regular", "trivial", "irrep", "interleaved"])
def test_multiplicities(kind, count):
    assert_equals_dense(Call(plan_between("D4", kind(count), kind(3), 3), (3, 3), dict(padding=1), 1, (5, 6)))
    assert_equals_dense(Call(plan_between("D4", kind(2), kind(count), 3), (3, 3), dict(padding=1), 1, (5, 6)))


# ---- what users get wrong ----

@pytest.mark.parametrize("change,match", [
    (dict(x=lambda x: x[0]), "x must have 4 dimensions, got shape"),
    (dict(x=lambda x: x[:, 1:]), r"x must have \d+ channels, got \d+"),
    (dict(x=lambda x: x.float()), "x must be float32 or float64, and weights the same .* got torch.float32 and"),
    (dict(x=lambda x: x[..., :1, :1], padding=0), "too small for the kernel"),
    (dict(weights=lambda w: w[1:]), r"weights must have shape \(\d+,\), got"),
    (dict(weights=lambda w: w[None]), r"weights must have shape \(\d+,\), got"),
    (dict(weights=lambda w: w.half(), x=lambda x: x.half()), "x must be float32 or float64, .* got torch.float16"),
    (dict(bias=lambda b: b[1:]), r"bias must have shape \(\d+,\) and dtype torch.float64, got"),
    (dict(bias=lambda b: b.float()), "bias must have shape .* torch.float32"),
    (dict(kernel=(5, 5)), r"kernel_size \(5, 5\) has 25 taps, the plan 9"),
    (dict(activation="gelu"), "activation must be one of .* got 'gelu'"),
    (dict(activation="elu", alpha=-1.0), "alpha must not be negative, got -1.0"),
    (dict(padding_mode="mirror"), "padding_mode must be one of .* got 'mirror'"),
    (dict(stride=0), "stride must be 2 integers of at least 1, or one, got 0"),
    (dict(dilation=(1, 2, 3)), "dilation must be 2 integers"),
    (dict(padding=-1), "padding must be 2 integers of at least 0"),
    (dict(output_padding=1), "output_padding belongs to transposed"),
    (dict(groups=3), "groups must divide the fields of one side of the plan .* got 3"),
    (dict(padding_mode="reflect", transposed=True), "pads with zeros, got padding_mode 'reflect'"),
    (dict(backend="tpu"), "backend 'tpu'"),
    (dict(backend="triton", x=lambda x: x.to("meta")), "backend 'triton' on 'meta'"),
    (dict(x=lambda x: x.to("meta"), backend="native"), "without code for 'meta'"),
])
def test_bad_arguments(change, match):
    call = plane(3)
    tensors = dict(zip(("x", "weights", "bias"), call.tensors(), strict=True))
    tensors = {name: change.get(name, lambda t: t)(tensor) for name, tensor in tensors.items()}
    if "groups" in change:
        tensors["x"] = tensors["x"].repeat(1, change["groups"], 1, 1)
    options = {**call.options, **{k: v for k, v in change.items() if k not in (*tensors, "kernel")}}
    x, weights, bias = tensors.values()
    with pytest.raises(ValueError, match=match):
        steerable_conv(x, weights, call.plan, change.get("kernel", call.kernel), bias=bias, **options)


def test_bad_arguments_of_the_op():
    """What the public function always gets right, and a caller of the op may not."""
    call = plane(3)
    x, weights, bias = call.tensors()
    same, adjoint = overloads(call, x)
    forward, backward = torch.ops.equiconv.steerable_conv.default, torch.ops.equiconv.steerable_conv_bwd.default
    for arguments, match in (
            ((x.transpose(2, 3), weights, bias, *same), "must be contiguous"),
            ((x, weights.float(), bias, *same), "one dtype"),
            ((x, weights, bias[1:], *same), "bias must have one number for each channel"),
            ((x, weights, bias, same[0].long(), *same[1:]), "int32 table"),
            ((x[0], weights, bias, *same), "source must be"),
            ((x.half(), weights.half(), None, same[0], same[1].half(), *same[2:]), "float32 or float64")):
        with pytest.raises(RuntimeError, match=match):
            forward(*arguments)
    with pytest.raises(RuntimeError, match="no such activation"):
        torch.ops.equiconv.steerable_conv_activated.default(x, weights, bias, len(ACTIVATIONS), 1.0, *same)
    grad = forward(x, weights, bias, *same)
    for companion in (x[:, 1:].contiguous(), x.float(), x.transpose(2, 3)):
        with pytest.raises(RuntimeError, match="companion must"):
            backward(grad, weights, companion, *adjoint, True, True)


# ---- packed weights ----

def packed(call, weights):
    names = ("stride", "dilation", "groups", "transposed")
    options = {name: call.options[name] for name in names if name in call.options}
    return pack_weights(weights, call.plan, call.kernel, **options)


@each_case
def test_packed_weights_give_the_same(case):
    call = Call.of(case)
    for dtype in (torch.float64, torch.float32):
        x, weights, bias = call.tensors(dtype)
        options = dict(bias=bias, activation="elu", alpha=0.3, **call.options)
        want = steerable_conv(x, weights, call.plan, call.kernel, **options)
        options["packed"] = packed(call, weights)
        assert torch.equal(steerable_conv(x, weights, call.plan, call.kernel, **options), want)
        assert torch.equal(steerable_conv(x, 2 * weights, call.plan, call.kernel, **options), want), "not what is read"


@pytest.mark.parametrize("needs", ["x", "weights", "bias"])
def test_gradients_do_not_pass_by_packed_weights(needs):
    call = plane(3)
    tensors = dict(zip(("x", "weights", "bias"), call.tensors()))
    tensors[needs].requires_grad_()
    x, weights, bias = tensors.values()
    got, want = (steerable_conv(x, weights, call.plan, call.kernel, bias=bias, packed=p, **call.options)
                 for p in (packed(call, weights.detach()), None))
    got, want = (torch.autograd.grad(y.sum(), tensors[needs])[0] for y in (got, want))
    assert torch.equal(got, want)


def test_transforms_do_not_pass_by_packed_weights():
    call = plane(3)
    x, weights, _ = call.tensors()

    def gradient(**options):
        convolution = torch.func.vmap(lambda x: steerable_conv(x, weights, call.plan, call.kernel, **options))
        return torch.func.grad(lambda batch: convolution(batch).square().sum())(torch.stack([x, 2 * x]))
    want = gradient(**call.options)
    assert want.abs().max() > 0
    assert torch.equal(gradient(packed=packed(call, weights), **call.options), want)


def test_bad_packed_weights():
    call = plane(3)
    x, weights, _ = call.tensors()
    for bad in (weights[1:], weights.half(), weights.to("meta")):
        with pytest.raises(ValueError, match="pack_weights: weights must have shape"):
            packed(call, bad)
    for kernel, groups, match in (((5, 5), 1, "25 taps"), ((3, 3, 3), 1, "27 taps"), ((3, 3), 3, "groups must divide"),
                                  ((3, 3), 0, "groups must divide")):
        with pytest.raises(ValueError, match=f"pack_weights: .*{match}"):
            pack_weights(weights, call.plan, kernel, groups=groups)
    for bad, match in ((packed(call, weights)[1:], "packed weights are needed"),
                       (packed(call, weights.float()), "one dtype")):
        with pytest.raises(RuntimeError, match=match):
            steerable_conv(x, weights, call.plan, call.kernel, packed=bad, **call.options)


# ---- tables ----

HEADER = (Path(__file__).parent.parent / "csrc" / "steerable_conv.h").read_text()


@pytest.mark.parametrize("name", ["HEADER", "GROUP", "SOURCE", "SLOT", "ROW", "TARGET", "BLOCK", "PHASE", "CLASS",
                                  "POSITION"])
def test_the_records_of_python_are_those_of_cpp(name):
    """One name each, in the same order: the tables are read through the structs."""
    body = re.search(rf"struct {name.title()} {{(.*?)}};", HEADER, re.S)[1]
    assert re.findall(r"\b[a-z]\w*(?=[,;])", body) == list(getattr(conv_tables, name))


def test_the_constants_of_python_are_those_of_cpp():
    for name, value in (("kUnused", conv_tables.UNUSED), ("kShared", conv_tables.SHARED),
                        ("kMaxEven", conv_tables.MAX_EVEN), ("kMaxOdd", conv_tables.MAX_ODD),
                        ("kComplexRows", complex_products.ROWS)):
        assert int(re.search(rf"\b{name} = (-?\d+)", HEADER)[1]) == value
    assert re.search(r"enum class Activation.*{ (.*) }", HEADER)[1].split(", ") == list(ACTIVATIONS)
