"""steerable_conv in two passes (Triton) against the reference and torch's convolution; interpreted without a GPU."""
import pytest
import torch
from torch.library import opcheck

import equiconv.nn
from equiconv import backends
from equiconv.layout import two_pass
from equiconv.layout.two_pass import structure
from equiconv.nn import costs
from equiconv.ops.steerable_conv import _fwd
from tests.cases import CASES, SMALL, regular, together, trivial
from tests.steerable_calls import Call, errors, plan_between, results

if not backends.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.triton, pytest.mark.skipif(
    DEVICE.type == "cpu" and not backends.TRITON_INTERPRET, reason="needs a CUDA device or TRITON_INTERPRET=1")]

EXACT, SINGLE = 1e-11, 1e-5  # relative errors, in float64 and in float32
SPATIAL = [case for case in SMALL if case.dimensions]
# each for a feature: sums of harmonics, 3D, a pair without paths; mixed types, changes of basis, groups
LAYERS = ("c4_regular", "so3_irreps", "d1_regular", "so2_empty_pairs", "c4_mixed", "d4_quotient",
          "c4_transposed_stride2", "c4_groups2")
INTERPRETED = LAYERS[:4]  # the interpreter takes seconds for the others
TOO_LARGE = ("ico_icosidodeca",)  # its harmonics have no parity along any axis
_FIELDS = together(regular(1), trivial(2))
each_layer = pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in INTERPRETED)) for name in LAYERS])


def triton(call):
    """The call as a function of tensors on DEVICE."""
    return lambda *tensors: call(*tensors, "triton")


def tensors(call, dtype=torch.float64):
    """x in that dtype; weights in float32 where it has low precision."""
    x, weights, bias = call.tensors(dtype)
    weights = weights if dtype.itemsize >= 4 else call.tensors(torch.float32)[1]
    return [None if t is None else t.to(DEVICE) for t in (x, weights, bias)]


def assert_equals_reference(call, dtype=torch.float64):
    got = [t.cpu() for t in results(on_device(triton(call)), tensors(call, dtype))]
    assert max(errors(got, results(call.reference, call.tensors()))) <= (EXACT if dtype == torch.float64 else SINGLE)


def on_device(function):
    """A function whose output is on the CPU, where results() makes its gradient."""
    return lambda *tensors: function(*tensors).cpu()


def small(name):
    call = Call.of(CASES[name])
    return call.with_(batch=1, size=(5, 4) if len(call.size) == 2 else (3, 2, 3))


def plane(kernel_size, size=(5, 4), batch=1, **options):
    return Call(plan_between("D1", _FIELDS, _FIELDS, kernel_size), (kernel_size,) * 2,
                {"padding": kernel_size // 2, **options}, batch, size)


@each_layer
def test_equals_reference(name):
    assert_equals_reference(small(name))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SPATIAL if case.name not in TOO_LARGE], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_case_equals_reference(case, dtype):
    assert_equals_reference(Call.of(case), dtype)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_does_not_fit_says_so(name):
    call = small(name)
    with pytest.raises(ValueError, match="cannot be computed in two passes: at most .* sums over the taps are supp"):
        triton(call)(*tensors(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["d1_regular", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "c4_regular", "so3_irreps_k5"))])
def test_precision(name, dtype):
    """Errors of at most twice those of torch's convolution in that dtype, + 1e-5."""
    call = small(name)
    got = [t.cpu() for t in results(on_device(triton(call)), tensors(call, dtype))]
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, dtype]
    exact = results(call.dense, call.tensors())
    if dtype == torch.float32:
        theirs = [0.0] * len(exact)
    else:  # the filter is rounded, and so is its gradient
        x, weights, bias = tensors(call, dtype)

        def dense(x, weights, bias):
            return low_precision_dense(call, x, weights, bias).cpu()

        theirs = errors([t.cpu() for t in results(dense, (x, weights, bias))], exact)
    assert all(mine <= 2 * other + 1e-5 for mine, other in zip(errors(got, exact), theirs, strict=True))


def low_precision_dense(call, x, weights, bias):
    from equiconv.ops import expand_filter
    filter = expand_filter(weights, call.plan, call.kernel, dtype=x.dtype, backend="reference")
    convolution = (torch.conv2d, torch.conv3d)[len(call.kernel) - 2]
    return convolution(x, filter, bias, padding=call.options["padding"])


# ---- sizes, options ----

@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 2)], ids=str)
def test_sizes(size):
    assert_equals_reference(plane(3, size))


@pytest.mark.parametrize("options", [
    dict(stride=(1, 2), dilation=(2, 1), padding=(2, 0)),
    dict(stride=(3, 2), dilation=2, padding=(3, 1), transposed=True, output_padding=(2, 0)),
    dict(padding=2, padding_mode="circular")], ids=str)
def test_options(options):
    assert_equals_reference(plane(3, **options))


@pytest.mark.parametrize("transposed", [False, True])
def test_groups(transposed):
    """Fields of p are those of one group, those of q of all of them: see layout.Geometry."""
    few, many = regular(1), regular(2)
    plan = plan_between("D1", many, few, 3) if transposed else plan_between("D1", few, many, 3)
    assert_equals_reference(Call(plan, (3, 3), dict(padding=1, groups=2, transposed=transposed), 1, (4, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_and_dilations(kernel_size, stride, dilation, transposed):
    options = dict(stride=stride, dilation=dilation, padding=(dilation * (kernel_size // 2), 1), transposed=transposed)
    assert_equals_reference(plane(kernel_size, (9, 10), **options))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 17, 33, 70])
def test_multiplicities(count):
    plan = plan_between("D4", regular(count), lambda g: [*regular(1)(g), *trivial(count)(g)], 3)
    assert_equals_reference(Call(plan, (3, 3), dict(padding=1), 1, (5, 6)))


def test_empty_batch():
    call = plane(3, batch=0)
    y, grad_x, grad_weights, grad_bias = results(on_device(triton(call)), tensors(call))
    assert y.shape == (0, call.channels[1], 5, 4) and grad_x.shape[0] == 0
    assert not grad_weights.any() and not grad_bias.any()


@pytest.mark.parametrize("name", ["d1_regular", pytest.param("c4_transposed_stride2", marks=pytest.mark.slow)])
def test_the_batch_is_treated_in_slices(name, monkeypatch):
    """Slices that end in the middle of a row, and a last one that is shorter."""
    call = small(name).with_(batch=2)
    whole = results(on_device(triton(call)), tensors(call))
    allocated = []
    monkeypatch.setattr(two_pass, "MIN_PIXELS", 7)
    monkeypatch.setattr(two_pass, "MAX_BYTES", 1)
    monkeypatch.setattr("equiconv.triton_kernels.steerable_conv.pixels_of_slice",
                        lambda *a: allocated.append(two_pass.pixels_of_slice(*a)) or allocated[-1])
    assert max(errors(results(on_device(triton(call)), tensors(call)), [t.double() for t in whole])) <= EXACT
    assert allocated == [7, 7]


def test_slices_take_bounded_memory():
    assert two_pass.pixels_of_slice(10**6, 1408, 4) * 1408 * 4 <= two_pass.MAX_BYTES
    assert two_pass.pixels_of_slice(100, 1408, 4) == 100 and two_pass.pixels_of_slice(10**6, 10**6, 4) == 1024


def test_memory_formats():
    call = small("trivial_group").with_(batch=2)
    x, weights, bias = tensors(call, torch.float32)
    want = results(on_device(triton(call)), (x, weights, bias))
    assert triton(call)(x, weights, bias).is_contiguous()
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, -1)[..., ::2]):
        got = results(on_device(triton(call)), (other, weights.repeat_interleave(3)[::3], bias))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = triton(call)(last, weights, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad, = torch.autograd.grad(y.sum(), last)
    assert grad.is_contiguous(memory_format=torch.channels_last)


# ---- derivatives, graphs ----

@pytest.mark.slow
@pytest.mark.parametrize("name", ["trivial_group", *LAYERS])
def test_gradcheck(name):
    call = small(name)
    inputs = [t if t is None else t.requires_grad_() for t in tensors(call)]
    assert torch.autograd.gradcheck(triton(call), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(triton(call), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_opcheck(dtype):
    call = small("trivial_group")
    x, weights, bias = tensors(call, dtype)
    tables = [*call.plan.two_pass_tables(call.kernel, 1, False, False, DEVICE, torch.float32),
              *call.plan.two_pass_tables(call.kernel, 1, True, True, DEVICE, torch.float32)]
    geometry = [list(call.kernel), [1, 1], [1, 1], [1, 1], 1]
    forward = torch.ops.equiconv.steerable_conv_two_pass.triton
    backward = torch.ops.equiconv.steerable_conv_two_pass_bwd.triton
    same = (*tables, *geometry, False, [call.channels[1], *call.size])
    adjoint = (*tables[3:], *tables[:3], *geometry, True, list(x.shape[1:]))
    tolerance = dict(atol=5e-2, rtol=5e-2) if dtype == torch.bfloat16 else dict(atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(forward(x, weights, bias, *same))
    opcheck(forward, (x.requires_grad_(), weights.requires_grad_(), bias, *same), **tolerance)
    opcheck(backward, (grad, weights.detach(), x.detach(), *adjoint, True, True), **tolerance)


def test_compile():
    call = small("trivial_group")
    inputs = [t for t in tensors(call, torch.float32)]
    triton(call)(*inputs)  # makes the tables

    def function(x, weights, bias):
        return triton(call)(2 * x, weights, bias).sin()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(results(on_device(compiled), inputs), results(on_device(function), inputs))


def test_tables_of_another_process():
    call = small("trivial_group")
    tables = call.plan.two_pass_tables(call.kernel, 1, False, False, DEVICE, torch.float64)
    x, weights, bias = tensors(call)
    with pytest.raises(RuntimeError, match="were not made in this process: call the layer once"):
        _fwd["triton"](x, weights, bias, *tables[:2], "unknown", *tables, list(call.kernel), [1, 1], [1, 1], [1, 1], 1,
                       False, [call.channels[1], *call.size])


# ---- modules ----

def test_module_in_two_passes():
    module = CASES["d1_regular"].build(equiconv.nn).to(DEVICE)
    x = CASES["d1_regular"].input(batch=1, size=(5, 4)).tensor.to(DEVICE)
    module.method = "dense"
    want = module(module.in_type(x)).tensor
    module.method = "two_pass"
    assert module.plan_report(x.shape).method == "two_pass"
    torch.testing.assert_close(module(module.in_type(x)).tensor, want)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = module(module.in_type(x)).tensor
    assert y.dtype == torch.bfloat16 and max(errors([y.float()], [want.double()])) < 1e-2
    y.float().sum().backward()
    assert module.weights.grad.dtype == torch.float32 and module.bias.grad is not None
    low = CASES["d1_regular"].build(equiconv.nn, recompute=True).to(DEVICE, torch.bfloat16)
    low.method = "two_pass"
    y = low(low.in_type(x.bfloat16())).tensor
    assert y.dtype == torch.bfloat16 and max(errors([y.float()], [want.double()])) < 2e-2
    low.plan_report()


@pytest.mark.parametrize("name,size,dense", [("c8_16_k3", 768, 1344), ("c8_16_k5", 1408, 2464), ("c16_32_k5", 5632, 0),
                                             ("d8_16_k5", 2816, 2816), ("o2_16_k5", 976, 976), ("so3_16_k5", 1776, 0)])
def test_numbers_of_z(name, size, dense):
    """z's for one pixel, those that serve several weights only once: fewer where the irreps are of complex type."""
    module = CASES[name].build(equiconv.nn)
    key, *_ = two_pass.two_pass_tables(module.plan.factorised(module.kernel), module.kernel, 1, False)
    geometry = module.geometry((1, module.in_type.size, *CASES[name].size))
    assert structure(key).z_size == costs.factorised_work(module.plan, geometry).z == size
    assert size <= (dense or size)
