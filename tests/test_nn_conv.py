"""The drop-in modules against escnn's, on every case, and against a dense float64 convolution with our own filter."""
import copy
import pickle

import escnn.nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from escnn import group, gspaces

import equiconv
import equiconv.nn
from equiconv.layout import basis_block
from equiconv.ops import expand_filter
from tests.cases import CASES, REAL, SMALL

each_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
each_method = pytest.mark.parametrize("method", ["factorised", "dense"])


def pair(case, dtype=torch.float32, method="auto"):
    """The same layer from escnn and from equiconv, with escnn's basis: many of those differ from machine to machine."""
    theirs, ours = [case.build(namespace, recompute=True).to(dtype) for namespace in (escnn.nn, equiconv.nn)]
    ours.load_state_dict(theirs.state_dict())
    return theirs, by_method(ours, method)


def by_method(module, method):
    """The module, computed by that method if it has the choice."""
    return equiconv.accelerate(module, method=method)


def read_bases(module):
    """The sampled bases of a layer, as buffers of it from now on."""
    expansion = module.basisexpansion
    return [basis_block(expansion, pair).sampled_basis for pair in expansion._representations_pairs]


def gradient_like(y):
    """A random gradient of y, of mean 1: one of mean 0 would cancel in the bias's, down to the rounding of its sum."""
    return 1 + torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)


def run(module, x, grad=None):
    """(output, gradients of input, weights and bias)."""
    x = x.detach().requires_grad_()
    y = module(module.in_type(x)).tensor
    parameters = [module.weights] if module.bias is None else [module.weights, module.bias]
    grad = gradient_like(y) if grad is None else grad
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


def assert_equal(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert (g - w).norm() <= tolerance * w.norm().clamp(min=1e-30), ((g - w).norm() / w.norm()).item()


@each_case
@each_method
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=["float32", "float64"])
def test_equals_escnn(case, dtype, tolerance, method):
    theirs, ours = pair(case, dtype, method)
    x = case.input(dtype=dtype).tensor
    assert_equal(run(ours, x), run(theirs, x), tolerance)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        want, got = (m(m.in_type(x)).tensor for m in (theirs, ours))
        assert_equal([got, ours(ours.in_type(x)).tensor], [want, want], tolerance)  # twice: the second from the cache


@each_case
@each_method
def test_equals_dense_convolution(case, method):
    """In float64, with the filter that our own tables define."""
    module = by_method(case.build(equiconv.nn).double(), method)
    x = case.input(dtype=torch.float64).tensor
    filter = expand_filter(module.weights, module.plan, module.kernel, transposed=module.transposed,
                           backend="reference")
    bias = None if module.bias is None else module.bias_expansion @ module.bias

    def dense(x):
        if not module.kernel:
            return F.linear(x, filter, bias)
        d = len(module.kernel)
        options = dict(stride=module.stride, dilation=module.dilation, groups=module.groups, padding=module.padding)
        if module.transposed:
            function = (F.conv_transpose2d, F.conv_transpose3d)[d - 2]
            return function(x, filter, bias, output_padding=module.output_padding, **options)
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode)
            options["padding"] = 0
        return (F.conv2d, F.conv3d)[d - 2](x, filter, bias, **options)

    got = run(module, x)
    x = x.requires_grad_()
    y = dense(x)
    parameters = [module.weights] if module.bias is None else [module.weights, module.bias]
    want = [y.detach(), *torch.autograd.grad(y, [x, *parameters], gradient_like(y))]
    assert_equal(got, want, 1e-12 if method == "dense" else 1e-11)


@each_method
@each_case
def test_state_dict_goes_both_ways(case, method):
    theirs, ours = pair(case, method=method)
    x = case.input()
    modes = (None, "eval", "train")  # None: just built
    if case.is_transposed and case.arguments.get("groups"):
        modes = modes[1:]  # escnn's has another size of expanded_bias then
    for mode in modes:
        if mode:
            getattr(theirs, mode)(), getattr(ours, mode)()
        expanded = {ours.filter_name, "expanded_bias"}
        assert ours.state_dict().keys() - expanded == theirs.state_dict().keys() - expanded
        assert mode == "train" or ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(ours.state_dict()[k].shape == v.shape for k, v in theirs.state_dict().items())
        with torch.no_grad():
            theirs.weights.normal_()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        if mode != "eval":  # an escnn module in eval mode keeps the filter of its old weights
            assert_equal([ours(x).tensor], [theirs(x).tensor], 1e-5)
        if not any(b.dim() and b.stride()[-1] == 0 for b in theirs.buffers()):  # escnn cannot load into such views
            with torch.no_grad():
                ours.weights.normal_()
            theirs.load_state_dict(ours.state_dict(), strict=mode != "train")
            assert_equal([ours(x).tensor], [theirs(x).tensor], 1e-5)


@each_case
def test_constructor_and_class(case):
    theirs, ours = pair(case)
    assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    assert sorted(repr(ours).splitlines()) == sorted(repr(theirs).splitlines())  # escnn's pairs are in no fixed order
    shape = case.input().shape
    assert ours.evaluate_output_shape(shape) == ours(case.input()).shape
    exported = ours.export()
    with torch.no_grad():
        torch.testing.assert_close(exported(case.input().tensor), ours(case.input()).tensor)


def test_initialisation_draws_the_same_weights():
    case = CASES["c4_mixed"]
    torch.manual_seed(3)
    theirs = case.build(escnn.nn, initialize=True)
    torch.manual_seed(3)
    assert torch.equal(case.build(equiconv.nn, initialize=True).weights, theirs.weights)


def test_every_public_name_of_escnn():
    assert set(escnn.nn.__all__) <= set(dir(equiconv.nn)) and set(escnn.nn.__all__) <= set(equiconv.nn.__all__)
    public = [name for name in dir(escnn.nn) if not name.startswith("_")]
    assert [name for name in public if not hasattr(equiconv.nn, name)] == []


# ---- the cache of evaluation ----

def changes():
    def scale(module):
        with torch.no_grad():
            module.weights.mul_(2)

    def scale_data(module):
        module.weights.data.mul_(2)

    def replace_data(module):
        module.weights.data = 2 * module.weights.data

    def load(module):
        state = module.state_dict()
        module.load_state_dict({**state, "weights": 2 * state["weights"]})

    def replace_parameter(module):
        module.weights = torch.nn.Parameter(2 * module.weights.detach())

    def basis(module):
        for basis in read_bases(module):
            basis.mul_(2)

    return [scale, scale_data, replace_data, load, replace_parameter, basis]


@each_method
@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["c4_mixed", "linear_so2"])
def test_evaluation_never_uses_a_stale_filter(name, change, method):
    case = CASES[name]
    module = by_method(case.build(equiconv.nn, bias=False, recompute=True).eval(), method)
    x = case.input()
    with torch.no_grad():
        before = module(x).tensor
        assert torch.equal(module(x).tensor, before)
        change(module)
        torch.testing.assert_close(module(x).tensor, 2 * before)
        assert torch.equal(getattr(module, module.filter_name), module.expand_parameters()[0])
        copied = copy.deepcopy(module)
        copied.weights.data.mul_(3)
        torch.testing.assert_close(copied(x).tensor, 6 * before)
        torch.testing.assert_close(module(x).tensor, 2 * before)
        double = module.double()(x.type(x.tensor.double())).tensor
        assert double.dtype == torch.float64
        torch.testing.assert_close(double, 2 * before.double(), rtol=1e-4, atol=1e-4)


def test_evaluation_expands_once():
    case = CASES["c4_mixed"]
    module, x = by_method(case.build(equiconv.nn).eval(), "dense"), case.input()
    with torch.no_grad():
        module(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            module(x), module(x)
    assert not [e for e in profile.events() if e.name == "equiconv::expand_filter"]


def test_evaluation_packs_once():
    case = CASES["c4_mixed"]
    module, x = by_method(case.build(equiconv.nn).eval(), "factorised"), case.input()
    with torch.no_grad():
        first = module(x).tensor
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert torch.equal(module(x).tensor, first)
        names = [e.name for e in profile.events()]
    assert "equiconv::steerable_conv_packed" in names and "equiconv::steerable_conv_pack" not in names
    assert torch.equal(module(x).tensor, first)  # with gradients: packed anew


def test_nothing_of_autocast_is_kept():
    module = CASES["c4_mixed"].build(equiconv.nn).eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            module.weights_and_bias()
        assert module.weights_and_bias()[1].dtype == torch.float32


@each_method
@pytest.mark.parametrize("change", ["double", "train"])
def test_nothing_is_kept_for_longer(method, change):
    case = CASES["c4_mixed"]
    module = by_method(case.build(equiconv.nn).eval(), method)
    with torch.no_grad():
        module(case.input())
    assert module._evaluated
    getattr(module, change)()
    assert not module._evaluated


@each_method
def test_bias_and_channels_last_of_the_cache(method):
    case = CASES["c4_mixed"]
    module, x = by_method(case.build(equiconv.nn).eval(), method), case.input()
    last = x.type(x.tensor.to(memory_format=torch.channels_last))
    with torch.no_grad():
        y = module(x).tensor
        torch.testing.assert_close(module(last).tensor, y)
        assert module(last).tensor.is_contiguous(memory_format=torch.channels_last)
        module.bias.data.add_(1)
        torch.testing.assert_close(module(x).tensor, y + module.bias_expansion.sum(1)[:, None, None])


@each_method
def test_gradients_in_evaluation_mode(method):
    """escnn's second backward fails there: its filter keeps the graph of the first."""
    case = CASES["c4_mixed"]
    module, x = by_method(case.build(equiconv.nn), method), case.input().tensor
    want = run(module, x)
    module.eval()
    for _ in range(2):
        assert_equal(run(module, x), want, 1e-6)


def test_one_expansion_op_each_way():
    case = CASES["c4_mixed"]
    module, x = by_method(case.build(equiconv.nn), "dense"), case.input()
    assert len(module.plan.pairs) > 8
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).tensor.sum().backward()
    ops = sorted(e.name for e in profile.events() if e.name.startswith("equiconv::"))
    assert ops == ["equiconv::expand_filter", "equiconv::expand_filter_bwd"]


def test_one_factorised_op_each_way():
    case = CASES["c4_mixed"]
    module, x = by_method(case.build(equiconv.nn), "factorised"), case.input()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).tensor.sum().backward()
    ops = sorted(e.name for e in profile.events() if e.name.startswith("equiconv::"))
    assert ops == ["equiconv::steerable_conv", "equiconv::steerable_conv_bwd"]


# ---- dtypes, formats, sizes ----

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["c4_mixed", "so3_irreps", "c4_transposed", "linear_c8"])
def test_autocast(name, dtype):
    case = CASES[name]
    module, x = case.build(equiconv.nn), case.input()
    with torch.autocast("cpu", dtype=dtype):
        y = module(x).tensor
    assert y.dtype == dtype
    y.float().sum().backward()
    assert module.weights.grad.dtype == torch.float32
    exact = case.build(equiconv.nn).double()(module.in_type(x.tensor.double())).tensor
    assert (y.double() - exact).norm() <= (2e-2 if dtype == torch.bfloat16 else 2e-3) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_module(dtype):
    case = CASES["c4_regular"]
    module = case.build(equiconv.nn, recompute=True).to(dtype)
    y = module(case.input(dtype=dtype)).tensor
    assert y.dtype == dtype
    y.float().sum().backward()
    assert module.weights.grad.dtype == dtype


@each_method
@pytest.mark.parametrize("name", ["c4_mixed", "so3_irreps", "c4_transposed", "c4_depthwise"])
def test_channels_last(name, method):
    case = CASES[name]
    module, x = by_method(case.build(equiconv.nn), method), case.input().tensor
    memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    want, got = run(module, x), run(module, x.to(memory_format=memory_format))
    assert got[0].is_contiguous(memory_format=memory_format)
    assert_equal(got, want, 1e-5)


@each_method
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (33, 2), (7, 129)])
def test_sizes(size, method):
    case = CASES["c4_mixed"]
    theirs, ours = pair(case, method=method)
    x = case.input(size=size).tensor
    assert_equal(run(ours, x), run(theirs, x), 1e-5)
    strided = torch.randn(2, x.shape[1], size[0], 2 * size[1])[..., ::2]
    assert_equal(run(ours, strided), run(theirs, strided), 1e-5)
    empty = ours(ours.in_type(x[:0])).tensor
    assert empty.shape == (0, ours.out_type.size, *size)


@each_method
def test_double_backward(method):
    case = CASES["c4_mixed"]
    module = by_method(case.build(equiconv.nn, recompute=True).double(), method)
    x = case.input(dtype=torch.float64, batch=1, size=(4, 4)).tensor.requires_grad_()

    def f(x, weights):
        return torch.func.functional_call(module, {"weights": weights}, (module.in_type(x),)).tensor

    weights = module.weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(f, (x, weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, weights), fast_mode=True)


@each_method
def test_compile(method):
    case = CASES["c4_mixed"]
    module, x = by_method(case.build(equiconv.nn), method), case.input()
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: module(module.in_type(t)).tensor, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.tensor), module(x).tensor)


# ---- bad input ----

def test_bad_input():
    case = CASES["c4_mixed"]
    module, x = case.build(equiconv.nn), case.input()
    other = CASES["c4_regular"].input()
    for bad, error, match in (
            (x.tensor, TypeError, "GeometricTensor.*got Tensor"),
            (other, ValueError, "input must have type"),
            (module.in_type(x.tensor.double()), ValueError, "dtype torch.float32.*float64"),
            (module.in_type(x.tensor.long()), ValueError, "floating point.*int64"),
            (module.in_type(x.tensor.to("meta")), ValueError, "on cpu.*got meta")):
        with pytest.raises(error, match=match):
            module(bad)
    for shape in ((2, 3, 4, 4), (2, case.in_type.size, 4)):
        with pytest.raises(ValueError, match="input_shape must"):
            module.evaluate_output_shape(shape)


@pytest.mark.parametrize("arguments,error,match", [
    (dict(kernel_size=0), ValueError, "kernel_size must be at least 1, got 0"),
    (dict(kernel_size=(3, 3)), TypeError, "kernel_size must be an integer, got tuple"),
    (dict(kernel_size=2.5), TypeError, "kernel_size must be an integer"),
    (dict(stride=0), ValueError, "stride must be at least 1"),
    (dict(stride=(1, 2, 3)), ValueError, "stride must be an integer or a tuple of 2"),
    (dict(padding=-1), ValueError, "padding must be at least 0"),
    (dict(padding="same"), TypeError, "padding must be an integer"),
    (dict(dilation=0), ValueError, "dilation must be at least 1"),
    (dict(groups=3), ValueError, "groups=3"),
    (dict(padding_mode="mirror"), ValueError, "padding_mode must be one of"),
    (dict(sigma=0.0), ValueError, "sigma must be finite and positive"),
    (dict(sigma=[0.5, float("nan")]), ValueError, "sigma must be finite"),
    (dict(sigma=1), TypeError, "sigma must be a list of numbers, got int 1"),
    (dict(sigma=[0.5]), ValueError, "one for each of the 2 rings"),
    (dict(rings=[0.0, 1.0], sigma=[0.5, 0.5, 0.5]), ValueError, "one for each of the 2 rings"),
    (dict(rings=[float("inf")]), ValueError, "rings must be from 0 to 1.414"),
    (dict(rings=[0.0, 1.5]), ValueError, "rings must be from 0 to 1.414"),
    (dict(kernel_size=1, padding=0, rings=[0.0, 1.0]), ValueError, "rings must be from 0 to 0"),
    (dict(rings=[]), ValueError, "rings must be a list of numbers"),
    (dict(rings=1.0), TypeError, "rings must be a list of numbers, got float 1.0"),
    (dict(rings=torch.tensor([0.0, 1.0])), TypeError, "rings must be a list of numbers, got Tensor"),
    (dict(rings=["a"]), ValueError, "rings must be from 0"),
    (dict(frequencies_cutoff=float("nan")), ValueError, "frequencies_cutoff must be finite, got nan"),
    (dict(frequencies_cutoff=float("inf")), ValueError, "frequencies_cutoff must be finite, got inf"),
    (dict(frequencies_cutoff=lambda radius: float("inf")), ValueError, "finite at each radius"),
    (dict(frequencies_cutoff=2), TypeError, "must be a float or a function of the radius, got int 2"),
    (dict(basis_filter=3), TypeError, "basis_filter must be a function"),
    (dict(basis_filter=lambda attributes: False), ValueError, "no equivariant kernel"),
    (dict(in_type="regular"), TypeError, "in_type must be a FieldType, got str"),
    (dict(out_type=CASES["c8_regular"].out_type), ValueError, "same gspace"),
    (dict(in_type=CASES["so3_irreps"].in_type), ValueError, "in_type must live on a GSpace2D"),
    (dict(banana=1), TypeError, "banana"),
])
def test_bad_constructor_arguments(arguments, error, match):
    case = CASES["c4_regular"]
    arguments = {"in_type": case.in_type, "out_type": case.out_type, "kernel_size": 3, **arguments}
    with pytest.raises(error, match=match):
        equiconv.nn.R2Conv(**arguments)


# ---- accelerate ----

class Network(torch.nn.Module):
    def __init__(self, case, nn):
        super().__init__()
        self.first = case.build(nn, recompute=True)
        self.blocks = nn.SequentialModule(nn.InnerBatchNorm(case.out_type), nn.ReLU(case.out_type),
                                          nn.R2Conv(case.out_type, case.out_type, 3))

    def forward(self, x):
        return self.blocks(self.first(x))


@pytest.mark.parametrize("mode", [True, False])
def test_accelerate(mode):
    case = CASES["c4_regular"]
    theirs, ours = Network(case, escnn.nn), Network(case, escnn.nn)
    ours.load_state_dict(theirs.state_dict())
    theirs.train(mode), ours.train(mode)
    parameters, names = list(ours.parameters()), [n for n, _ in ours.named_modules()]
    calls = []
    ours.first.register_forward_hook(lambda *_: calls.append(1))
    assert equiconv.accelerate(ours) is ours
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert [n for n, _ in ours.named_modules()] == names
    assert type(ours.first) is equiconv.nn.R2Conv and ours.first.training == mode
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_equal([ours(case.input()).tensor], [theirs(case.input()).tensor], 1e-5)
    assert calls
    first, plan = ours.first, ours.first.plan
    equiconv.accelerate(ours)
    assert ours.first is first and first.plan is plan
    status = {row.name: (row.status, row.reason) for row in equiconv.acceleration_report(ours)}
    assert status["first"] == ("accelerated", "") and status["blocks.2"][0] == "accelerated"
    assert status["blocks.0"] == ("accelerated", "")
    assert status["blocks.1"] == ("left", "one kernel of torch already; in training one pass with 'blocks.0'")


def test_accelerate_leaves_subclasses():
    class Own(escnn.nn.R2Conv):
        pass

    case = CASES["c4_regular"]
    module = Own(case.in_type, case.out_type, 3)
    assert type(equiconv.accelerate(module)) is Own
    row, = equiconv.acceleration_report(module)
    assert row.status == "left" and "subclass" in row.reason and "Own" in str(equiconv.acceleration_report(module))
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        equiconv.accelerate("model")


def test_accelerate_verbose(capsys):
    equiconv.accelerate(CASES["c4_regular"].build(escnn.nn), verbose=True)
    assert "accelerated" in capsys.readouterr().out


def test_plan_is_copied_and_pickled():
    module = CASES["c4_mixed"].build(equiconv.nn)
    plan = module.plan
    assert copy.deepcopy(module).plan.weights == plan.weights
    assert pickle.loads(pickle.dumps(plan)).weights == plan.weights


@each_method
@pytest.mark.slow
@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_layers_equal_escnn(case, method):
    theirs, ours = pair(case, method=method)
    x = case.input(batch=1).tensor
    assert_equal(run(ours, x), run(theirs, x), 1e-5)


# ---- unusual bases and states ----

@each_method
@pytest.mark.parametrize("change_of_basis", [
    torch.diag(torch.tensor([1.0, 1e3, 1e3])), torch.diag(torch.tensor([1.0, 1e-3, 1e-3])),
    torch.eye(3) + torch.tensor([[0, 0, 0], [0, 0, 0], [300.0, 0, 0]]), 1e3 * torch.eye(3)],
    ids=["large", "small", "shear", "uniform"])
def test_any_change_of_basis(change_of_basis, method):
    space = gspaces.rot2dOnR2(8)
    scaled = group.directsum([space.trivial_repr, space.irrep(1)], change_of_basis=change_of_basis.double().numpy(),
                             name=f"scaled {change_of_basis.flatten().tolist()}")
    type_ = escnn.nn.FieldType(space, [scaled, space.regular_repr, scaled])
    torch.manual_seed(0)
    theirs, ours = (n.R2Conv(type_, type_, 5, recompute=True) for n in (escnn.nn, equiconv.nn))
    by_method(ours, method).load_state_dict(theirs.state_dict())
    x = torch.randn(2, type_.size, 6, 6)
    assert_equal(run(ours, x), run(theirs, x), 1e-5)


@each_method
def test_basis_that_was_rounded(method):
    """The plan of a basis whose kernels are no longer exact blocks between irreps."""
    case = CASES["c8_regular"]
    theirs, ours = pair(case, method=method)
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state), ours.load_state_dict(state)
    x = case.input().tensor
    assert_equal(run(ours, x), run(theirs, x), 1e-5)
    low = case.build(equiconv.nn, recompute=True).bfloat16()
    assert torch.isfinite(copy.deepcopy(low)(case.input(dtype=torch.bfloat16)).tensor).all()


def test_basis_that_is_not_finite():
    module = CASES["c4_regular"].build(equiconv.nn, recompute=True)
    for basis in read_bases(module):
        basis.fill_(float("nan"))
    with pytest.raises(ValueError, match="sampled basis .* must be finite"):
        module.expand_parameters()


@each_method
def test_inference_mode(method):
    case = CASES["c4_mixed"]
    module, x = by_method(case.build(equiconv.nn).requires_grad_(False).eval(), method), case.input().tensor
    with torch.inference_mode():
        want = module(module.in_type(x)).tensor
        built = by_method(case.build(equiconv.nn, recompute=True).double().eval(), method)
        torch.testing.assert_close(built(module.in_type(x.double())).tensor.float(), want.clone(), rtol=1e-4, atol=1e-5)
    y = module(module.in_type(x.requires_grad_())).tensor
    torch.testing.assert_close(y.detach(), want.clone())
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_hooks_and_meta():
    case = CASES["c4_mixed"]
    module = case.build(equiconv.nn)
    state = module.state_dict()

    def rename(_, state_dict, *rest):
        for key in [k for k in state_dict if "old_name" in k]:
            state_dict[key.replace("old_name", "_basisexpansion")] = state_dict.pop(key)

    module.register_load_state_dict_pre_hook(rename)
    module.load_state_dict({k.replace("_basisexpansion", "old_name"): v.clone() for k, v in state.items()})
    empty = copy.deepcopy(case.build(equiconv.nn).to("meta")).to_empty(device="cpu")
    empty.load_state_dict(state)
    assert_equal([empty(case.input()).tensor], [module(case.input()).tensor], 1e-6)


def test_numbers_of_other_libraries():
    case = CASES["c4_regular"]
    module = equiconv.nn.R2Conv(case.in_type, case.out_type, 3, stride=[2, 2], sigma=[np.float32(0.6)] * 2,
                                rings=[torch.tensor(0.0), torch.tensor(1.0)])
    shape = module(case.input()).shape
    assert module.evaluate_output_shape(case.input().shape) == shape
