"""concatenated_act against its definition; the module on it against escnn in float64."""
import escnn.nn
import pytest
import torch
from torch.library import opcheck

import equiconv.nn
from equiconv.ops import concatenated_act
from equiconv.ops.fourier_act import FUNCTIONS
from tests.field_tables import (
    DTYPES,
    SHAPES,
    assert_close,
    assert_modules_equal,
    assert_threads_change_nothing,
    random,
    tensor,
)
from tests.modules import MODULES, regular

OPS = torch.ops.equiconv
each_function = pytest.mark.parametrize("function", FUNCTIONS)
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def with_gradient(backend, x, function):
    x = x.detach().requires_grad_()
    y = concatenated_act(x, function, backend=backend)
    return y, *torch.autograd.grad(y, x, random(*y.shape, seed=3, dtype=torch.float32).to(y))


def assert_equals_reference(x, function, backend="native"):
    got, want = with_gradient(backend, x, function), with_gradient("reference", x.double(), function)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == x.dtype
        assert_close(g, w, x.dtype)
    assert x.numel() == 0 or got[1].stride() == x.stride()


@each_function
@pytest.mark.parametrize("shape", SHAPES)
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(function, shape, dtype, channels_last):
    assert_equals_reference(tensor(shape, 19, dtype, channels_last), function)


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for dtype in DTYPES:
        for channels_last in (False, True):
            assert_equals_reference(tensor("wide_plane", 19, dtype, channels_last), "tanh")


def test_threads_change_nothing():
    x = tensor((8, 33, 31), 72, torch.float32)
    assert_threads_change_nothing(lambda: with_gradient("native", x, "sigmoid"))


@each_function
def test_what_is_no_number(function):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    got, want = (concatenated_act(x, function, backend=b) for b in ("native", "reference"))
    torch.testing.assert_close(got, want, equal_nan=True)


@each_function
@pytest.mark.usefixtures("one_thread")
def test_derivatives(function):
    x = tensor((2, 2, 2), 3).requires_grad_()
    for f in (lambda x: concatenated_act(x, function), lambda x: OPS.concatenated_act(x, FUNCTIONS.index(function))):
        assert torch.autograd.gradcheck(f, (x,))
        assert torch.autograd.gradgradcheck(f, (x,))


def test_opcheck():
    for channels_last in (False, True):
        x = tensor("plane", 3, torch.float32, channels_last)
        opcheck(OPS.concatenated_act.default, (x.requires_grad_(), 3))
        grad = torch.randn_like(concatenated_act(x.detach(), "tanh"))
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        opcheck(OPS.concatenated_act_bwd.default, (grad, x, 3), test_utils=utilities)


def test_bad_arguments():
    x = tensor("plane", 3, torch.float32)
    for bad, match in (((x, "softplus"), "function must be one of"), ((x[0, 0, 0], "relu"), r"x must be \[B, C"),
                       ((x.int(), "relu"), "floating")):
        with pytest.raises(ValueError, match=match):
            concatenated_act(*bad)
    for bad, match in (((x, 9), "function"), ((x[..., ::2], 0), "contiguous or channels_last")):
        with pytest.raises(RuntimeError, match=match):
            OPS.concatenated_act(*bad)
    with pytest.raises(RuntimeError, match="twice the channels"):
        OPS.concatenated_act_bwd(x, x, 0)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    for channels_last in (False, True):
        assert_equals_reference(tensor("wide_plane", 19, torch.float32, channels_last), "relu")


# ---- the module ----

@pytest.mark.parametrize("function", ["c_relu", "c_sigmoid", "c_tanh"])
@each_format
def test_module_equals_escnn_in_double(function, channels_last, monkeypatch):
    monkeypatch.setattr(torch, "float", torch.float64)  # escnn makes float32 of everything
    theirs, ours = (n.ConcatenatedNonLinearity(regular(), function) for n in (escnn.nn, equiconv.nn))
    x = tensor((3, 6, 5), theirs.in_type.size, channels_last=channels_last)
    assert_modules_equal(theirs, ours, x)


def test_one_op():
    module = MODULES["ConcatenatedNonLinearity"].build(equiconv.nn)
    x, = MODULES["ConcatenatedNonLinearity"].inputs(module, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).tensor.sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("equiconv::")]
    assert sorted(names) == ["equiconv::concatenated_act", "equiconv::concatenated_act_bwd"]
