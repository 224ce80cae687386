"""Convolutions on a GPU, by each method: values, gradients, graphs, streams, and what they launch."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import equiconv.nn
from equiconv.formats import CHANNELS_LAST
from equiconv.nn import cuda_costs
from tests.cases import CASES, SMALL
from tests.steerable_calls import Call, errors
from tests.synchronisation import NoSynchronisation

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
METHODS = cuda_costs.METHODS
LAYERS = ("c4_mixed", "c8_quotient", "c4_stride2", "c4_groups2", "c4_transposed_stride2", "so3_irreps", "so3_stride2")
COMPILED = ("c4_stride2", "so3_irreps")  # the others are slow: Triton compiles for seconds for each irrep
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_method = pytest.mark.parametrize("method", METHODS)


def on_gpu(test):
    return pytest.mark.cuda(ON_GPU(test))


def build(name, method, device, bias=True):
    case = CASES[name]
    module = case.build(equiconv.nn, **({} if bias else {"bias": False})).to(device)
    module.method = method
    x = case.input().tensor.to(device)
    return module, x.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def step(module, x, dtype=torch.float32, grad=None):
    """[output, gradients of x and of the parameters], under autocast where dtype has low precision."""
    low = dtype.itemsize < 4
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast(x.device.type, dtype=dtype if low else torch.bfloat16, enabled=low):
        y = module(module.in_type(x)).tensor
    grad = torch.ones_like(y) if grad is None else grad.to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.fixture
def strict():
    """float32 is float32, in convolutions and in products."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [s.allow_tf32 for s in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield switches
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value


# ---- anywhere ----

class Ops(TorchDispatchMode):
    """Lists the operations that do work."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in ("detach", "alias", "view", "permute", "t", "empty_like", "ones_like"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["c8_regular", "c4_interleaved", "so3_irreps", "c4_transposed_stride2"])
def test_the_dense_method_is_an_expansion_and_a_convolution(name):
    """However many pairs of representations there are; the filter needs no cast and no change of its memory format."""
    module, x = build(name, "dense", "cpu", bias=False)
    module.plan.tables(x.device, x.dtype)
    x.requires_grad_()
    with Ops() as forward:
        y = module(module.in_type(x)).tensor
    assert forward.names == ["expand_filter", "convolution"]
    grad = torch.randn_like(y)
    with Ops() as backward:
        torch.autograd.grad(y, [x, module.weights], grad)
    assert backward.names == ["convolution_backward", "expand_filter_bwd"]


def test_the_filter_of_autocast_is_made_as_the_convolution_wants_it():
    module, x = build("c8_regular", "dense", "cpu", bias=False)
    x = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), Ops() as forward:
        module(module.in_type(x))
    assert forward.names == ["expand_filter", "convolution"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        filter = module.expand_parameters(channels_last=True)[0]
    assert filter.dtype == torch.bfloat16 and filter.is_contiguous(memory_format=torch.channels_last)


@each_method
def test_nothing_waits_for_the_device(method):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, x = build("c4_mixed", method, device)
    if method != "dense" and (problem := module.why_not_factorised(x)) is not None:
        pytest.skip(problem)
    with NoSynchronisation():
        step(module, x)


def test_tables_stay_where_they_are():
    """Calls, copies of the module and other layers of its type read the same tables: a captured graph may keep them."""
    module, x = build("c4_mixed", "dense", "cpu")
    before = [t.data_ptr() for t in module.plan.tables(x.device, x.dtype)]
    placed = module.plan.two_pass_tables(module.kernel, 1, False, False, x.device, x.dtype)
    step(module, x)
    module.eval()
    step(module.train(), x[:1])
    assert [t.data_ptr() for t in module.plan.tables(x.device, x.dtype)] == before
    again = module.plan.two_pass_tables(module.kernel, 1, False, False, x.device, x.dtype)
    assert all(a is b for a, b in zip(placed, again, strict=True))


# ---- on a GPU ----

@on_gpu
@each_method
@pytest.mark.parametrize("name,dtype", [
    pytest.param(name, dtype, marks=[pytest.mark.slow] * (name not in COMPILED or dtype.itemsize == 8))
    for name in LAYERS for dtype in DTYPES])
@pytest.mark.usefixtures("strict")
def test_values_and_gradients(name, dtype, method):
    """Against float64 on the CPU: errors of at most twice those of torch's own convolution, + 1e-5."""
    call = Call.of(CASES[name])
    exact, x = build(name, "dense", "cpu")
    exact = exact.double()
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(exact.evaluate_output_shape(x.shape), generator=generator, dtype=torch.float64)
    want = step(exact, x, torch.float64, grad)
    module = CASES[name].build(equiconv.nn, recompute=True).to("cuda")
    module = module.double() if dtype == torch.float64 else module
    module.method = method
    got = [t.cpu() for t in step(module, x.cuda(), dtype, grad)]
    bound = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype)  # the basis of .double() was rounded to float32
    if bound is not None:
        assert max(errors(got, want)) <= bound
        return
    filter, bias = exact.expand_parameters()
    leaves = [t.detach().to("cuda", dtype).requires_grad_() for t in (x, filter, bias)]
    y = exact._convolve(*leaves)
    own = [y, *torch.autograd.grad(y, leaves, grad.to(y))]
    leaves = [t.detach().double().requires_grad_() for t in (x, filter, bias)]
    y = exact._convolve(*leaves)
    theirs = errors([t.detach().cpu() for t in own], [y.detach(), *torch.autograd.grad(y, leaves, grad)])
    assert all(mine <= 2 * other + 1e-5 for mine, other in zip(errors(got, want), theirs, strict=True)), call


@on_gpu
@pytest.mark.parametrize("name", ["c8_regular", "so3_irreps_k5"])
def test_tf32_where_torch_allows_it(name, strict):
    """Both methods follow torch's switches."""
    module, x = build(name, "two_pass", "cuda")
    exact = step(module, x)
    for switch in strict:
        switch.allow_tf32 = True
    found = max(errors(step(module, x), [t.double() for t in exact]))
    assert 0 < found < 3e-3


@on_gpu
@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["c4_mixed", "so3_irreps"])
def test_a_training_step_is_captured_in_a_graph(name, dtype, method):
    module, x = build(name, method, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(module, x, dtype)
    torch.cuda.current_stream().wait_stream(side)
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        captured = step(module, still, dtype)
    for seed in range(2):
        torch.manual_seed(seed)
        still.copy_(torch.randn_like(still))
        with torch.no_grad():
            module.weights.add_(0.1)
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, step(module, still, dtype))


@on_gpu
@each_method
def test_streams_do_not_disturb_each_other(method):
    layers = [build(name, method, "cuda") for name in ("c4_mixed", "c8_regular")]
    want = [step(*layer) for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(5):
        found = []
        for stream, layer in zip(streams, layers):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(step(*layer))
        torch.cuda.synchronize()
        for got, expected in zip(found, want):
            torch.testing.assert_close(got, expected)


def launches(function):
    """Names of the kernels that a call launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["c4_interleaved", "so3_irreps"])
def test_launches_of_the_dense_method(name, dtype):
    """One of ours forward, at most two backward; all others are those of torch's convolution."""
    module, x = build(name, "dense", "cuda", bias=False)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        filter = module.expand_parameters(channels_last=True)[0].detach()
    leaves = [x.to(dtype).requires_grad_(), filter.requires_grad_()]

    def ours():
        return step(module, x.to(dtype), dtype)

    def theirs():
        y = module._convolve(*leaves, None)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    found, convolution = launches(ours), launches(theirs)
    mine = [kernel for kernel in found if "expand_filter" in kernel]
    assert sum("bwd" not in kernel for kernel in mine) == 1 and 1 <= sum("bwd" in kernel for kernel in mine) <= 2
    assert len(found) - len(mine) <= len(convolution), (found, convolution)


@on_gpu
@pytest.mark.parametrize("name", ["c8_regular", "so3_irreps"])
def test_launches_of_two_passes(name):
    """Those of the planner's estimate, about: one for each irrep of the source, few besides."""
    module, x = build(name, "two_pass", "cuda", bias=False)
    irreps = len({row.slot for s in module.plan.factorised(module.kernel).sources for row in s.rows})
    with torch.no_grad():
        found = launches(lambda: module(module.in_type(x)))
    first = [kernel for kernel in found if "first_pass" in kernel]
    assert 1 <= len(first) <= irreps
    assert len(found) <= cuda_costs.TWO_PASS_CALLS + cuda_costs.CALLS_OF_IRREP * irreps, found


@on_gpu
def test_rates_are_measured():
    from equiconv import calibration
    rates = calibration.measure_rates(torch.device("cuda"))
    assert set(rates.products) == set(rates.convolutions) == set(cuda_costs.PRECISIONS)
    assert rates.bytes > 1e11 and 0 < rates.call < 1e-3
    assert all(rate > 1e10 for rate in (*rates.products.values(), *rates.convolutions.values()))


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SMALL if case.dimensions], ids=lambda case: case.name)
def test_auto_chooses_and_computes(case):
    module = case.build(equiconv.nn).cuda()
    x = case.input().tensor.cuda()
    module.method = "dense"
    want = step(module, x)
    module.method = "auto"
    assert module.plan_report(x.shape).method in METHODS
    assert max(errors(step(module, x), [t.double() for t in want])) <= 3e-3  # in TF32 where torch allows it
