"""norm_max_pool against its definition; the module on it against escnn, to the last bit."""
import escnn.nn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import equiconv.nn
from equiconv.ops import norm_max_pool
from tests.field_tables import DTYPES, assert_results_equal, assert_threads_change_nothing, random, tensor
from tests.modules import first_field, mixed

OPS = torch.ops.equiconv
PLANE, SOLID = (2, 9, 11), (2, 4, 5, 6)
SIZES = (2, 1, 3, 5)
NAMES = ("window", "stride", "padding", "dilation")
KINDS = {"apart": (2, 2, 0, 1), "overlapping": (3, 1, 1, 1), "dilated": (2, 1, 1, 2), "strided": (3, 2, 1, 1)}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", [PLANE, SOLID], ids=["plane", "solid"])
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def tables(sizes):
    """(fields, elements)"""
    rows = [(sum(sizes[:f]), size, size) for f, size in enumerate(sizes)]
    return torch.tensor(rows), torch.tensor([(f, f) for f, size in enumerate(sizes) for _ in range(size)])


def arguments(kind, shape, dtype=torch.float64, channels_last=False, sizes=SIZES):
    """(x, tables, geometry)"""
    geometry = {name: (len(shape) - 1) * [size] for name, size in zip(NAMES, KINDS[kind])}
    return tensor(shape, sum(sizes), dtype, channels_last), tables(sizes), geometry


def with_gradient(backend, x, tables, geometry):
    x = x.detach().requires_grad_()
    y = norm_max_pool(x, *tables, **geometry, backend=backend)
    grad = random(*y.shape, seed=3, dtype=torch.bfloat16)  # the same numbers in every dtype
    return y, *torch.autograd.grad(y, x, grad.to(y))


def assert_equals_reference(x, tables, geometry, backend="native"):
    """The definition chooses by norms in the same precision; then it is exact."""
    got, want = (with_gradient(b, x, tables, geometry) for b in (backend, "reference"))
    assert torch.equal(got[0], want[0])
    wide = x if x.dtype == torch.float64 else x.float()
    assert_results_equal(got, with_gradient("reference", wide, tables, geometry), x)


@each_kind
@each_shape
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(kind, shape, dtype, channels_last):
    assert_equals_reference(*arguments(kind, shape, dtype, channels_last))


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for dtype in (torch.float32, torch.float64):
        for channels_last in (False, True):
            assert_equals_reference(*arguments("strided", (2, 33, 17), dtype, channels_last))


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 2),
       st.lists(st.integers(4, 12), min_size=2, max_size=3), st.integers(0, 7), st.booleans(), st.booleans())
def test_any_window(sizes, window, batch, spatial, options, channels_last, ceil_mode):
    """The windows of two dimensions differ; options: their strides."""
    dimensions = len(spatial)
    geometry = {"window": window[:dimensions], "stride": [1 + (options + d) % 3 for d in range(dimensions)],
                "padding": [w // 2 for w in window[:dimensions]], "dilation": dimensions * [1], "ceil_mode": ceil_mode}
    x = tensor((batch, *spatial), sum(sizes), channels_last=channels_last)
    assert_equals_reference(x, tables(sizes), geometry)


@each_format
def test_threads_change_nothing(channels_last):
    call = arguments("overlapping", (3, 97, 65), torch.float32, channels_last)
    assert_threads_change_nothing(lambda: with_gradient("native", *call))


@each_kind
@each_format
def test_equal_norms_and_what_is_no_number(kind, channels_last):
    x, *rest = arguments(kind, PLANE, torch.float32, channels_last)
    x = x.relu().round().clamp(max=1)
    assert_equals_reference(x, *rest)
    x[0, 0, 4, 4] = x[0, 1, 4, 5] = x[1, 5, 0, 0] = float("nan")
    x[1, 7, 3, 3] = float("inf")
    got, want = (norm_max_pool(x, *rest[0], **rest[1], backend=b) for b in ("native", "reference"))
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@each_kind
@pytest.mark.usefixtures("one_thread")
def test_derivatives(kind):
    x, tables, geometry = arguments(kind, (1, 5, 4), sizes=(2, 1))
    lists = [geometry[name] for name in NAMES]
    for f in (lambda x: norm_max_pool(x, *tables, **geometry), lambda x: OPS.norm_max_pool(x, *tables, *lists, False)):
        assert torch.autograd.gradcheck(f, (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(f, (x,))


@each_kind
def test_opcheck(kind):
    for channels_last in (False, True):
        x, tables, geometry = arguments(kind, (2, 6, 5), torch.float32, channels_last)
        call = (*tables, *[geometry[name] for name in NAMES], False)
        opcheck(OPS.norm_max_pool.default, (x.requires_grad_(), *call))
        grad = torch.randn_like(OPS.norm_max_pool(x, *call).detach())
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        opcheck(OPS.norm_max_pool_bwd.default, (grad, x, *call), test_utils=utilities)


def test_bad_arguments():
    x, (fields, elements), geometry = arguments("strided", PLANE, torch.float32)
    call = {"x": x, "fields": fields, "elements": elements, **geometry}
    for bad, match in (({"x": x[0, 0]}, "two or three spatial dimensions"), ({"stride": [1]}, "a number for each"),
                       ({"fields": fields.int()}, "fields must be int64"), ({"elements": elements[:, 0]}, "elements"),
                       ({"padding": [2, 2]}, "at most half"), ({"x": x[..., :1, :1], "padding": [0, 0]}, "at least as"),
                       ({"x": x[..., :2, :2], "window": [2, 2], "padding": [1, 1], "dilation": [3, 3]}, "step over"),
                       ({"x": x.int()}, "floating point")):
        with pytest.raises(ValueError, match=match):
            norm_max_pool(**call | bad)
    lists = [geometry[name] for name in NAMES]
    for place, bad, match in ((0, x[:, 1:].contiguous(), "channels"), (0, x[..., ::2], "channels_last"),
                              (1, fields[1:], "do not follow"), (3, [0, 2], "at least 1"), (5, [2], "as many numbers")):
        call = [x, fields, elements, *lists, False]
        call[place] = bad
        with pytest.raises(RuntimeError, match=match):
            OPS.norm_max_pool(*call)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    for kind in KINDS:
        for channels_last in (False, True):
            assert_equals_reference(*arguments(kind, PLANE, torch.float32, channels_last))


# ---- the module ----

@pytest.mark.parametrize("make_type", [mixed, lambda: first_field(mixed())], ids=["mixed", "one_field"])
@pytest.mark.parametrize("options", [(2,), (3, 2, 1), (2, 1, 1, 2, True), ((3, 2), (2, 3), (1, 0), (1, 2))])
@each_format
def test_module_equals_escnn(make_type, options, channels_last):
    """Also where norms are equal but for the order of what they are the sum of."""
    theirs, ours = (n.NormMaxPool(make_type(), *options) for n in (escnn.nn, equiconv.nn))
    for size in ((3, 7, 6), (2, 17, 17)):
        x = tensor(size, theirs.in_type.size, torch.float32, channels_last)
        fields = zip(theirs.in_type.fields_start.tolist(), theirs.in_type.representations)
        start = next((start for start, r in fields if r.size == 2), 0)
        vectors = x[:, start:start + 2]
        vectors[..., 1::2] = vectors[..., :-1:2].flip(1) * torch.tensor([-1, 1])[:, None, None]
        results = []
        for module in (theirs, ours):
            y = module(module.in_type(x.requires_grad_())).tensor
            results.append((y, *torch.autograd.grad(y, x, random(*y.shape, seed=9, dtype=torch.float32))))
        assert torch.equal(results[1][0], results[0][0])
        torch.testing.assert_close(results[1][1], results[0][1])
        x = x.detach()


def test_one_op():
    module = equiconv.nn.NormMaxPool(mixed(), 2)
    x = module.in_type(tensor((2, 6, 6), module.in_type.size, torch.float32).requires_grad_())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).tensor.sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith(("equiconv::", "aten::gather"))]
    assert sorted(names) == ["equiconv::norm_max_pool", "equiconv::norm_max_pool_bwd"]
