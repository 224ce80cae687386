"""expand_filter on every backend and device against the reference, and that against escnn's basis expansion."""
import pytest
import torch
from escnn import nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.library import opcheck

from equiconv import backends
from equiconv.layout import plan_of
from equiconv.ops import expand_filter
from equiconv.ops.expand_filter import _bwd, _fwd
from tests.cases import CASES, SPACES, space

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
INTERPRETED = pytest.mark.skipif(not backends.TRITON_INTERPRET, reason="needs TRITON_INTERPRET=1")
BACKENDS = [pytest.param("native", "cpu", id="native-cpu"),
            pytest.param("triton", "cpu", id="triton-cpu", marks=[pytest.mark.triton, INTERPRETED]),
            pytest.param("native", "cuda", id="native-cuda", marks=[pytest.mark.cuda, CUDA]),
            pytest.param("triton", "cuda", id="triton-cuda", marks=[pytest.mark.cuda, pytest.mark.triton, CUDA])]
each_backend = pytest.mark.parametrize("backend,device", BACKENDS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# each for a feature: mixed and interleaved types, empty pairs, changes of basis, 3D, linear, odd numbers of fields
LAYERS = ["c4_mixed", "c4_interleaved", "so2_empty_pairs", "d4_quotient", "o2_induced", "c8_regular", "so3_irreps",
          "octahedral_quotient", "linear_so2", "c4_17_fields", "c4_depthwise"]
INTERPRETED_LAYERS = ("so2_empty_pairs", "c4_depthwise", "linear_so2")  # the interpreter takes seconds
each_layer = pytest.mark.parametrize("name,backend,device", [
    pytest.param(name, *b.values, id=f"{name}-{b.id}",
                 marks=[*b.marks, *[pytest.mark.slow] * (b.id == "triton-cpu" and name not in INTERPRETED_LAYERS)])
    for name in LAYERS for b in BACKENDS])


def layer(name):
    """(plan, kernel size, random weights in float64) of a case."""
    module = CASES[name].build(nn)
    kernel = (module.kernel_size,) * module.d if hasattr(module, "kernel_size") else ()
    plan = plan_of(module.basisexpansion)
    generator = torch.Generator().manual_seed(len(name))
    return plan, kernel, torch.randn(plan.weights, generator=generator, dtype=torch.float64)


def dense(name, weights):
    """The filter as escnn expands it, in float64."""
    expansion = CASES[name].build(nn, recompute=True).basisexpansion.double()
    return expansion(weights)


@pytest.mark.parametrize("name", LAYERS)
def test_reference_is_escnns_expansion(name):
    plan, kernel, weights = layer(name)
    want = dense(name, weights)
    got = expand_filter(weights, plan, kernel, backend="reference").reshape(want.shape)
    assert (got - want).norm() <= 1e-6 * want.norm()  # escnn samples its basis in float32


@each_layer
@each_dtype
def test_values(name, dtype, backend, device):
    plan, kernel, exact = layer(name)
    weights = exact.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    for channels_last in (False, True):
        for transposed in (False, True):
            options = dict(channels_last=channels_last, transposed=transposed)
            want = expand_filter(exact.to(device), plan, kernel, **options, backend="reference")
            got = expand_filter(weights, plan, kernel, dtype=dtype, **options, backend=backend)
            assert got.dtype == dtype and got.shape == want.shape and got.stride() == want.stride()
            assert_close(got, want, dtype)


@each_layer
@each_dtype
def test_weight_gradients(name, dtype, backend, device):
    plan, kernel, exact = layer(name)
    exact = exact.to(device).requires_grad_()
    weights = exact.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    for channels_last in (False, True):
        for transposed in (False, True):
            options = dict(channels_last=channels_last, transposed=transposed)
            filter = expand_filter(weights, plan, kernel, dtype=dtype, **options, backend=backend)
            generator = torch.Generator().manual_seed(0)
            grad = torch.randn(filter.shape, generator=generator, dtype=torch.float64).to(device, dtype)
            reference = expand_filter(exact, plan, kernel, **options, backend="reference")
            want, = torch.autograd.grad(reference, exact, grad.double())
            for g in (grad, grad.to(memory_format=torch.channels_last) if grad.dim() == 4 else grad,
                      grad.repeat_interleave(2, -1)[..., ::2] if grad.dim() > 2 else grad):
                got, = torch.autograd.grad(filter, weights, g, retain_graph=True)
                assert got.dtype == weights.dtype
                assert_close(got, want, weights.dtype)


def assert_close(got, want, dtype):
    """Error against float64 of at most twice that of rounding to the dtype, + 1e-5 (float64: 1e-12)."""
    rounding = (want.to(dtype).double() - want).norm()
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert (got.double() - want).norm() <= 2 * rounding + bound * want.norm()


@pytest.mark.parametrize("name", ["c4_mixed", "c8_regular", "so3_irreps"])
@pytest.mark.usefixtures("isa")
def test_instruction_sets(name):
    for dtype in DTYPES:
        test_values(name, dtype, "native", "cpu")
        test_weight_gradients(name, dtype, "native", "cpu")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work_and_change_nothing(threads):
    plan, kernel, weights = layer("c4_mixed")
    before = torch.get_num_threads()
    want = expand_filter(weights, plan, kernel, backend="native")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(expand_filter(weights, plan, kernel, backend="native"), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["native", pytest.param("triton", marks=[pytest.mark.triton, INTERPRETED])])
def test_every_output_is_written(backend):
    """torch fills what it allocates with NaN here: nothing may be left of it, in zero blocks neither."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for name in ("so2_empty_pairs", "c4_interleaved", "linear_so2"):
            plan, kernel, weights = layer(name)
            weights.requires_grad_()
            filter = expand_filter(weights, plan, kernel, backend=backend)
            assert filter.isfinite().all()
            assert torch.autograd.grad(filter.sum(), weights)[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@each_backend
@pytest.mark.parametrize("name", ["c4_interleaved", "linear_so2"])
def test_gradcheck(name, backend, device):
    plan, kernel, weights = layer(name)
    weights = weights.to(device).requires_grad_()

    def f(w):
        return expand_filter(w, plan, kernel, backend=backend)

    fast = dict(fast_mode=True)  # one random direction: the interpreter takes seconds for all of them
    assert torch.autograd.gradcheck(f, (weights,), **fast)
    assert torch.autograd.gradgradcheck(f, (weights,), **fast)
    op = OVERLOADS["expand_filter", backend]  # the registered formula, not the eager function's
    arguments = (*plan.tables(weights.device, weights.dtype), [plan.out_channels, plan.in_channels, *kernel])
    assert torch.autograd.gradcheck(lambda w: op(w, *arguments, w.dtype, False, False), (weights,), **fast)
    assert torch.autograd.gradgradcheck(lambda w: op(w, *arguments, w.dtype, False, False), (weights,), **fast)


OVERLOADS = {(op, backend): getattr(getattr(torch.ops.equiconv, op), "default" if backend == "native" else backend)
             for op in ("expand_filter", "expand_filter_bwd") for backend in ("native", "triton")}


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, device, dtype):
    plan, kernel, weights = layer("c4_interleaved")
    weights = weights.to(device, torch.float32)
    tables = plan.tables(weights.device, torch.float32)
    size = [plan.out_channels, plan.in_channels, *kernel]
    for channels_last, transposed in ((False, False), (True, True)):
        for w in (weights, weights.clone().requires_grad_()):
            opcheck(OVERLOADS["expand_filter", backend], (w, *tables, size, dtype, channels_last, transposed),
                    atol=1e-2, rtol=1e-2)
        filter = expand_filter(weights, plan, kernel, dtype=dtype, transposed=transposed)
        for f in (filter, filter.detach().requires_grad_()):
            opcheck(OVERLOADS["expand_filter_bwd", backend], (f, *tables, plan.weights, transposed),
                    atol=1e-2, rtol=1e-2)


@each_backend
def test_compile(backend, device):
    plan, kernel, weights = layer("c4_mixed")
    weights = weights.to(device, torch.float32).requires_grad_()

    def f(w):
        return expand_filter(w * 2, plan, kernel, backend=backend).sin()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights), f(weights))
    want, = torch.autograd.grad(f(weights).sum(), weights)
    torch.testing.assert_close(torch.autograd.grad(compiled(weights).sum(), weights)[0], want)


@each_backend
def test_autocast(backend, device):
    plan, kernel, weights = layer("c4_mixed")
    with torch.autocast(device, dtype=torch.bfloat16):
        w = weights.to(device, torch.float32).requires_grad_()
        filter = expand_filter(w, plan, kernel, backend=backend)
        assert filter.dtype == torch.bfloat16
        assert expand_filter(weights.to(device), plan, kernel, backend=backend).dtype == torch.float64
    assert torch.autograd.grad(filter.float().sum(), w)[0].dtype == torch.float32
    half = weights.to(device, torch.bfloat16).requires_grad_()
    filter = expand_filter(half, plan, kernel, backend=backend)
    assert filter.dtype == torch.bfloat16
    assert torch.autograd.grad(filter.float().sum(), half)[0].dtype == torch.bfloat16


def test_functional_transforms():
    plan, kernel, weights = layer("c4_mixed")

    def loss(w):
        return expand_filter(w, plan, kernel).square().sum()

    w = weights.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(weights), torch.autograd.grad(loss(w), w)[0])
    batch = torch.stack([weights, 2 * weights])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(w) for w in batch]))


def test_tangents_are_not_lost():
    plan, kernel, weights = layer("c4_mixed")
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        expand_filter(forward_ad.make_dual(weights, weights), plan, kernel)


def test_bad_arguments():
    plan, kernel, weights = layer("c4_mixed")
    for bad, match in ((weights[:-1], "weights must have shape"), (weights[None], "weights must have shape"),
                       (weights.long(), "floating point")):
        with pytest.raises(ValueError, match=match):
            expand_filter(bad, plan, kernel)
    with pytest.raises(ValueError, match="taps"):
        expand_filter(weights, plan, (2, 2))
    with pytest.raises(ValueError, match="float64 goes with float64"):
        expand_filter(weights, plan, kernel, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no such backend|lacks it"):
        expand_filter(weights, plan, kernel, backend="tpu")
    with pytest.raises(ValueError, match="without code for"):
        expand_filter(weights.to("meta"), plan, kernel, backend="native")
    op = torch.ops.equiconv.expand_filter.default
    tables, size = plan.tables(weights.device, weights.dtype), [plan.out_channels, plan.in_channels, *kernel]
    with pytest.raises(RuntimeError, match="dtype of values"):
        op(weights.float(), *tables, size, torch.float32, False, False)
    with pytest.raises(RuntimeError, match="tables of a plan"):
        op(weights, tables[0][:, :3], *tables[1:], size, weights.dtype, False, False)
    with pytest.raises(RuntimeError, match="do not fit"):
        op(weights[:-1], *tables, size, weights.dtype, False, False)
    with pytest.raises(RuntimeError, match="do not fit"):
        op(weights, *tables, [plan.out_channels, plan.in_channels + 1, *kernel], weights.dtype, False, False)


PLANE = [name for name in SPACES if name in ("C2", "C3", "C4", "C8", "D2", "D4", "SO(2)", "O(2)", "trivial", "flip")]


@st.composite
def plans(draw):
    """A layer of the plane with random fields in random order, and its weights."""
    g = space(draw(st.sampled_from(PLANE)))
    group = g.fibergroup
    choices = [g.trivial_repr, *group.irreps()[:4]]
    if group.order() > 0:
        choices.append(g.regular_repr)

    def fields():
        return nn.FieldType(g, draw(st.lists(st.sampled_from(choices), min_size=1, max_size=7)))

    try:
        conv = nn.R2Conv(fields(), fields(), draw(st.sampled_from([1, 2, 3, 5])), initialize=False)
    except ValueError:  # no equivariant kernel between these types
        return None
    weights = torch.randn(conv.weights.shape, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(draw(st.integers(0, 100))))
    return conv, weights


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(plans())
def test_any_layer(layer):
    """Reference against escnn, native against the reference, and <g, F(w)> = <F'(g), w> for its gradient."""
    if layer is None:
        return
    conv, weights = layer
    plan, kernel = plan_of(conv.basisexpansion), (conv.kernel_size,) * 2
    want = expand_filter(weights, plan, kernel, backend="reference")
    escnn = conv.basisexpansion(weights.float()).double().reshape(want.shape)
    assert (want - escnn).norm() <= 1e-6 * escnn.norm()
    got = expand_filter(weights, plan, kernel, backend="native")
    assert (got - want).norm() <= 1e-12 * want.norm()
    grad = torch.randn_like(got)
    grad_weights = _bwd["native"](grad, *plan.tables(grad.device, grad.dtype), plan.weights, False)
    torch.testing.assert_close((grad * got).sum(), (grad_weights * weights).sum())


def test_one_op_whatever_the_number_of_pairs():
    """A layer of many pairs of representations runs one op forward and one backward."""
    plan, kernel, weights = layer("c4_mixed")
    assert len(plan.pairs) > 8
    weights.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        expand_filter(weights, plan, kernel).sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("equiconv::")]
    assert sorted(names) == ["equiconv::expand_filter", "equiconv::expand_filter_bwd"]


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_kernel_launches(backend):
    """On a GPU: one kernel forward and at most two backward, and both can be captured in a graph."""
    plan, kernel, weights = layer("c4_mixed")
    weights = weights.to("cuda", torch.float32)
    tables = plan.tables(weights.device, weights.dtype)
    size = [plan.out_channels, plan.in_channels, *kernel]

    def forward():
        return _fwd[backend](weights, *tables, size, torch.float32, False, False)

    grad = forward()

    def backward():
        return _bwd[backend](grad, *tables, plan.weights, False)

    for run, most in ((forward, 1), (backward, 2)):
        run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert 1 <= len(kernels) <= most, [k.name for k in kernels]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        captured.zero_()
        graph.replay()
        torch.testing.assert_close(captured, run())
