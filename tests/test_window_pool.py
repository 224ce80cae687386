"""window_pool against its definition; the modules on it against escnn in float64."""
import escnn.nn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import equiconv.nn
from equiconv.formats import compute_dtype
from equiconv.ops import window_pool
from tests.field_tables import (
    DTYPES,
    assert_modules_equal,
    assert_results_equal,
    assert_threads_change_nothing,
    random,
    tensor,
)
from tests.modules import pointwise, solid

OPS = torch.ops.equiconv
PLANE, SOLID = (2, 20, 9, 11), (2, 5, 4, 5, 6)
NAMES = ("window", "window_padding", "dilation", "kernel", "stride", "padding")
KINDS = {"antialiased maximum": (2, 1, 1, 5, 2, 3), "average": ((), (), (), 3, 2, 1), "maximum": (3, 1, 1, (), 2, ()),
         "dilated maximum": (2, 1, 2, (), 1, ())}  # in every dimension
each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", [PLANE, SOLID], ids=["plane", "solid"])
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def arguments(kind, shape, dtype=torch.float64, channels_last=False):
    """(x, filter or None, geometry)"""
    batch, channels, *spatial = shape
    geometry = {name: [] if size == () else len(spatial) * [size] for name, size in zip(NAMES, KINDS[kind])}
    kernel = geometry["kernel"]
    filter = random(kernel[0] ** len(kernel), channels, seed=1, dtype=compute_dtype(dtype)) if kernel else None
    return tensor((batch, *spatial), channels, dtype, channels_last), filter, geometry


def with_gradient(backend, x, filter, geometry):
    x = x.detach().requires_grad_()
    y = window_pool(x, filter, **geometry, backend=backend)
    return y, *torch.autograd.grad(y, x, random(*y.shape, seed=3, dtype=torch.float32).to(y))


def assert_equals_reference(x, filter, geometry, backend="native"):
    got = with_gradient(backend, x, filter, geometry)
    want = with_gradient("reference", x.double(), None if filter is None else filter.double(), geometry)
    assert_results_equal(got, want, x)


@each_kind
@each_shape
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(kind, shape, dtype, channels_last):
    assert_equals_reference(*arguments(kind, shape, dtype, channels_last))


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for kind in KINDS:
        for channels_last in (False, True):
            assert_equals_reference(*arguments(kind, PLANE, torch.float32, channels_last))


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 2), st.integers(1, 40),
       st.lists(st.integers(3, 12), min_size=2, max_size=3), st.integers(0, 7), st.booleans(), st.booleans())
def test_any_window(window, kernel, batch, channels, spatial, options, channels_last, ceil_mode):
    """The windows of two dimensions differ; options: which of the two there are, and their strides."""
    dimensions, has_window, has_filter = len(spatial), options != 1, options not in (2, 3)
    geometry = {name: [] for name in NAMES}
    if has_window:
        geometry |= {"window": window[:dimensions], "window_padding": [w // 2 for w in window[:dimensions]],
                     "dilation": dimensions * [1]}
    if has_filter:
        geometry |= {"kernel": kernel[:dimensions], "padding": [k // 2 for k in kernel[:dimensions]]}
    geometry |= {"stride": [1 + (options + d) % 3 for d in range(dimensions)], "ceil_mode": ceil_mode}
    filter = random(torch.Size(geometry["kernel"]).numel(), channels, seed=1) if has_filter else None
    assert_equals_reference(tensor((batch, *spatial), channels, channels_last=channels_last), filter, geometry)


@each_format
def test_threads_and_strips_change_nothing(channels_last):
    call = arguments("antialiased maximum", (3, 24, 97, 65), torch.float32, channels_last)
    assert_threads_change_nothing(lambda: with_gradient("native", *call))
    assert_equals_reference(*call)


@each_format
def test_the_gradient_goes_to_the_first_of_equal_maxima(channels_last):
    x, filter, geometry = arguments("maximum", PLANE, torch.float32, channels_last)
    assert_equals_reference(x.relu().round().clamp(max=1), filter, geometry)


def test_not_a_number():
    x, filter, geometry = arguments("maximum", PLANE, torch.float32)
    x[0, 3, 4, 4], x[1, 2, 3, 5] = float("nan"), float("inf")
    got, want = (window_pool(x, filter, **geometry, backend=b) for b in ("native", "reference"))
    torch.testing.assert_close(got, want, equal_nan=True)


@each_kind
def test_no_derivative_is_nan_beside_a_nan(kind):
    x, filter, geometry = arguments(kind, PLANE)
    x[0, 3, 4, 4] = float("nan")
    y = window_pool(x.requires_grad_(), filter, **geometry)
    grad = random(*y.shape, seed=3).requires_grad_()
    first, = torch.autograd.grad(y, x, grad, create_graph=True)
    second, = torch.autograd.grad(first, grad, random(*x.shape, seed=4))
    assert y.isnan().any() and first.isfinite().all() and second.isfinite().all()


@each_kind
@pytest.mark.usefixtures("one_thread")
def test_derivatives(kind):
    x, filter, geometry = arguments(kind, (1, 2, 4, 3))
    lists = [geometry[name] for name in NAMES]
    for f in (lambda x: window_pool(x, filter, **geometry), lambda x: OPS.window_pool(x, filter, *lists, False)):
        assert torch.autograd.gradcheck(f, (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(f, (x,))


@each_kind
def test_opcheck(kind):
    for channels_last in (False, True):
        x, filter, geometry = arguments(kind, (2, 3, 5, 4), torch.float32, channels_last)
        call = (filter, *[geometry[name] for name in NAMES], False)
        opcheck(OPS.window_pool.default, (x.requires_grad_(), *call))
        grad = torch.randn_like(OPS.window_pool(x, *call).detach())
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        opcheck(OPS.window_pool_bwd.default, (grad, x, *call), test_utils=utilities)


def test_bad_arguments():
    x, filter, geometry = arguments("antialiased maximum", PLANE, torch.float32)
    for bad, match in (({"x": x[0, 0]}, r"two or three spatial dimensions"), ({"stride": [1]}, "a number for each"),
                       ({"filter": None}, "a filter with its kernel"), ({"filter": filter.double()}, "filter must be"),
                       ({"x": x[..., :1, :1], "padding": [0, 0]}, "at least as large"),
                       ({"x": x[..., :2], "dilation": [1, 3]}, "step over an axis of size 2")):
        with pytest.raises(ValueError, match=match):
            window_pool(**{"x": x, "filter": filter, **geometry, **bad})
    lists = [geometry[name] for name in NAMES]
    for place, bad, match in ((1, filter[:, 1:].contiguous(), "filter must be"), (0, x[..., ::2], "channels_last"),
                              (2, [0, 2], "at least 1"), (6, [2], "as many numbers")):
        call = [x, filter, *lists, False]
        call[place] = bad
        with pytest.raises(RuntimeError, match=match):
            OPS.window_pool(*call)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    for kind in KINDS:
        for channels_last in (False, True):
            assert_equals_reference(*arguments(kind, PLANE, torch.float32, channels_last))


# ---- the modules ----

@pytest.mark.parametrize("name,make_type,options", [
    ("PointwiseMaxPoolAntialiased2D", pointwise, (2,)), ("PointwiseMaxPoolAntialiased2D", pointwise, (3, 1, 1)),
    ("PointwiseMaxPoolAntialiased3D", solid, (2,)), ("PointwiseAvgPoolAntialiased3D", solid, (0.6, 2)),
    ("PointwiseAvgPoolAntialiased3D", solid, (0.4, 1, 0))])
@each_format
def test_modules_equal_escnn_in_double(name, make_type, options, channels_last):
    theirs, ours = (getattr(n, name)(make_type(), *options).double() for n in (escnn.nn, equiconv.nn))
    for size in ((3, 7, 6), (2, 17, 9)):
        x = tensor(size + size[1:2] * (theirs.in_type.gspace.dimensionality - 2), theirs.in_type.size,
                   channels_last=channels_last)
        assert_modules_equal(theirs, ours, x)


@pytest.mark.parametrize("name,make_type,options", [("PointwiseMaxPoolAntialiased2D", pointwise, (2,)),
                                                    ("PointwiseAvgPoolAntialiased3D", solid, (0.6, 2))])
def test_one_op(name, make_type, options):
    module = getattr(equiconv.nn, name)(make_type(), *options)
    size = (2, 6, 6, 6)[:1 + module.in_type.gspace.dimensionality]
    x = module.in_type(tensor(size, module.in_type.size, torch.float32).requires_grad_())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).tensor.sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith(("equiconv::", "aten::conv"))]
    assert sorted(names) == ["equiconv::window_pool", "equiconv::window_pool_bwd"]
