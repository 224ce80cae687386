"""fourier_act against its definition; the modules on it against escnn in float64."""
import escnn.nn
import pytest
import torch
from escnn import gspaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import equiconv.nn
from equiconv.formats import compute_dtype
from equiconv.ops import fourier_act
from equiconv.ops.fourier_act import FUNCTIONS
from tests.field_tables import DTYPES, SHAPES, assert_close, assert_threads_change_nothing, random, tensor

OPS = torch.ops.equiconv
SIZES = {  # fields, channels of a field, samples, channels of a field of the output
    "one": (1, 1, 1, 1), "small": (3, 4, 8, 4), "grows": (2, 5, 12, 9), "shrinks": (4, 10, 24, 3),
    "wide": (2, 35, 96, 35), "largest": (1, 80, 200, 80), "many": (30, 3, 7, 2)}
each_size = pytest.mark.parametrize("size", SIZES)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
each_function = pytest.mark.parametrize("function", FUNCTIONS)


def arguments(size, shape, dtype=torch.float64, channels_last=False):
    """(x, a, a_inv)"""
    fields, in_size, samples, out_size = SIZES.get(size, size)
    a, a_inv = random(samples, in_size, seed=1), random(out_size, samples, seed=2)
    x = tensor(shape, fields * in_size, dtype, channels_last)
    return x, (a / in_size ** 0.5).to(compute_dtype(dtype)), (a_inv / samples ** 0.5).to(compute_dtype(dtype))


def out_channels(size):
    fields, _, _, out_size = SIZES.get(size, size)
    return fields * out_size


def with_gradient(function, backend, call, grad):
    x, *matrices = call
    x = x.detach().requires_grad_()
    y = fourier_act(x, *matrices, function, backend=backend)
    return y, *torch.autograd.grad(y, x, grad.to(y.dtype))


def assert_equals_reference(call, grad, function, dtype):
    got = with_gradient(function, "native", call, grad)
    want = with_gradient(function, "reference", [t.double() for t in call], grad)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert_close(g, w, dtype)
    return got


@each_size
@each_shape
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(size, shape, dtype, channels_last):
    call = arguments(size, shape, dtype, channels_last)
    batch, *spatial = SHAPES[shape]
    grad = random(batch, out_channels(size), *spatial, seed=3, dtype=dtype)
    y, grad_x = assert_equals_reference(call, grad, "elu", dtype)
    assert y.shape == grad.shape and (y.numel() == 0 or grad_x.stride() == call[0].stride())
    if channels_last and y.dim() > 3 and y.numel() and y.shape[1] > 1 and call[0].shape[1] > 1:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        assert y.is_contiguous(memory_format=formats[y.dim()])


@each_function
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions(function, dtype, channels_last):
    call = arguments("grows", "wide_plane", dtype, channels_last)
    grad = random(2, out_channels("grows"), 33, 31, seed=3, dtype=dtype)
    assert_equals_reference(call, grad, function, dtype)


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions_everywhere(function, dtype):
    """Of single numbers: tiny, huge, infinite, and those that are none; to a few units in the last place."""
    numbers = torch.cat([torch.linspace(-60, 60, 4001), torch.logspace(-12, 3, 400), -torch.logspace(-12, 3, 400),
                         torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e30, -1e30])]).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    x = numbers[:, None].requires_grad_()
    got, want = (fourier_act(x, one, one, function, backend=b) for b in ("native", "reference"))
    precision = dict(rtol=16 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny * 8, equal_nan=True)
    torch.testing.assert_close(got, want, **precision)
    slopes = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (got, want)]
    absolute = dict(rtol=16 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)  # 1 - tanh(x)^2 cancels
    finite = numbers.isfinite()
    torch.testing.assert_close(slopes[0][finite], slopes[1][finite], **absolute)


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for function in FUNCTIONS:
        for dtype in DTYPES:
            for channels_last in (False, True):
                test_functions(function, dtype, channels_last)
        for dtype in (torch.float32, torch.float64):
            test_functions_everywhere(function, dtype)


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_change_nothing(channels_last):
    call = arguments("shrinks", (8, 33, 31), torch.float32, channels_last)
    grad = random(8, out_channels("shrinks"), 33, 31, seed=3, dtype=torch.float32)
    assert_threads_change_nothing(lambda: with_gradient("elu", "native", call, grad))


def test_gradient_in_another_memory_format():
    call = arguments("grows", "plane", channels_last=True)
    grad = random(3, out_channels("grows"), 7, 9, seed=3)
    for g in (grad, grad[..., :1].expand_as(grad), grad.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_equals_reference(call, g, "tanh", torch.float64)


@each_function
@pytest.mark.usefixtures("one_thread")
def test_derivatives(function):
    x, a, a_inv = arguments("grows", (1, 3))
    x = (x * 0.7).requires_grad_()
    for f in (lambda x: fourier_act(x, a, a_inv, function),
              lambda x: OPS.fourier_act(x, a, a_inv, FUNCTIONS.index(function))):
        assert torch.autograd.gradcheck(f, (x,))
        assert torch.autograd.gradgradcheck(f, (x,))


def test_opcheck():
    for channels_last in (False, True):
        for requires_grad in (False, True):
            x, *matrices = arguments("grows", "plane", torch.float32, channels_last)
            x.requires_grad_(requires_grad)
            opcheck(OPS.fourier_act.default, (x, *matrices, 1))
            grad = OPS.fourier_act(x, *matrices, 1).detach()
            opcheck(OPS.fourier_act_bwd.default, (grad, x, *matrices, 1))


def test_compile():
    _, a, a_inv = arguments("grows", "plane", torch.float32)

    def f(x):
        return fourier_act(x * 2, a, a_inv, "elu").sin()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for shape in ("plane", "wide_plane"):
        x = tensor(shape, 2 * a.shape[1], torch.float32).requires_grad_()
        torch.testing.assert_close(compiled(x), f(x))
        got, want = (torch.autograd.grad(g(x).sum(), x) for g in (compiled, f))
        torch.testing.assert_close(got, want)


def test_bad_arguments():
    x, a, a_inv = arguments("grows", "plane", torch.float32)
    for bad, match in (((x[0, 0, 0], a, a_inv, "elu"), r"x must be \[B, C"), ((x.int(), a, a_inv, "elu"), "floating"),
                       ((x, a.double(), a_inv, "elu"), "a must be a matrix of dtype torch.float32"),
                       ((x, a, a_inv[0], "elu"), "a_inv must be a matrix"),
                       ((x, a, a_inv[:, 1:], "elu"), "fields of in_size channels"),
                       ((x[:, 1:], a, a_inv, "elu"), "fields of in_size channels"),
                       ((x, a, a_inv, "gelu"), "function must be one of")):
        with pytest.raises(ValueError, match=match):
            fourier_act(*bad)
    for bad, match in (((x[:, 1:].contiguous(), a, a_inv, 1), "x must have 5 channels"), ((x, a, a_inv, 7), "function"),
                       ((x, a.double(), a_inv, 1), "matrices"), ((x, a, a_inv[:, 1:].contiguous(), 1), "column"),
                       ((x[..., ::2], a, a_inv, 1), "contiguous or channels_last")):
        with pytest.raises(RuntimeError, match=match):
            OPS.fourier_act(*bad)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 40), st.integers(1, 20)), st.integers(0, 3),
       st.lists(st.integers(1, 40), max_size=2), st.booleans(), st.sampled_from(FUNCTIONS))
def test_any_size(size, batch, spatial, channels_last, function):
    call = arguments(size, (batch, *spatial), channels_last=channels_last)
    assert_equals_reference(call, random(batch, out_channels(size), *spatial, seed=3), function, torch.float64)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    for channels_last in (False, True):
        test_values_and_gradients("grows", "wide_plane", torch.float32, channels_last)


# ---- the modules ----

@pytest.mark.parametrize("function", ["p_relu", "p_elu", "p_sigmoid", "p_tanh"])
@pytest.mark.parametrize("options", [{}, {"inplace": False}, {"normalize": False}, {"out_irreps": [(0,), (1,)]}],
                         ids=str)
@each_format
def test_modules_equal_escnn_in_double(function, options, channels_last):
    g = gspaces.rot2dOnR2(-1)
    options = dict(options, function=function, N=9, type="regular")
    theirs, ours = (n.FourierPointwise(g, 3, [(0,), (1,), (2,)], **options).double() for n in (escnn.nn, equiconv.nn))
    for size in ((3, 6, 5), (2, 17, 17), (4, 1, 1)):
        x = tensor(size, theirs.in_type.size, channels_last=channels_last).requires_grad_()
        results = []
        for module in (theirs, ours):
            y = module(module.in_type(x)).tensor
            results.append((y, *torch.autograd.grad(y, x, random(*y.shape, seed=9))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_samples_are_never_in_memory():
    """Of all that a training step allocates, nothing is larger than the tensors that go in and out."""
    g = gspaces.rot3dOnR3()
    module = equiconv.nn.FourierELU(g, 2, [(0,), (1,)], type="cube")
    x = tensor((2, 9, 9, 9), module.in_type.size, torch.float32).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        module(module.in_type(x)).tensor.sum().backward()
    allocated = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocated) <= x.numel() * 4
    assert sorted(e.name for e in profile.events() if e.name.startswith("equiconv::")) == [
        "equiconv::fourier_act", "equiconv::fourier_act_bwd"]
