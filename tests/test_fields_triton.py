"""The Triton kernels of the ops on fields, against the definitions: interpreted where there is no CUDA device."""
from collections import Counter

import pytest
import torch
from escnn import group, gspaces
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import equiconv.nn
from equiconv import backends
from equiconv.ops import concatenated_act, field_norm, field_norm_moments, field_pool, on_fields
from tests import test_field_batch_norm as batch_norm
from tests import test_field_dropout as dropout
from tests import test_field_gate as gate
from tests import test_field_norm as norm
from tests import test_field_pool as pool
from tests import test_fourier_act as fourier
from tests import test_norm_max_pool as norm_max
from tests import test_window_pool as window
from tests.field_tables import assert_close, random, tensor
from tests.modules import MODULES, of, reflections
from tests.test_expand_filter import BACKENDS

if not backends.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)
from equiconv.triton_kernels import concatenated_act as concatenated_kernels
from equiconv.triton_kernels import field_dropout as dropout_kernels
from equiconv.triton_kernels import field_gate as gate_kernels
from equiconv.triton_kernels import field_norm as norm_kernels
from equiconv.triton_kernels import field_pool as pool_kernels
from equiconv.triton_kernels import fourier_act as fourier_kernels
from equiconv.triton_kernels import norm_max_pool as norm_max_kernels
from equiconv.triton_kernels import window_pool as window_kernels

OPS = torch.ops.equiconv
KERNELS = (gate_kernels, norm_kernels, pool_kernels, fourier_kernels, concatenated_kernels, dropout_kernels,
           window_kernels, norm_max_kernels)
INTERPRETED_CONFIGS = {  # several programs for everything
    gate_kernels: {"BLOCK_PIXELS": 64, "BLOCK_FIELDS": 4, "BLOCK_SIZE": 2}, fourier_kernels: {
        "BLOCK_PIXELS": 128, "BLOCK_SAMPLES": 16},
    pool_kernels: {"BLOCK_PIXELS": 64, "BLOCK_FIELDS": 4, "BLOCK_SIZE": 2},
    norm_kernels: {"BLOCK_PIXELS": 64, "BLOCK_CHANNELS": 16},
    concatenated_kernels: {"BLOCK_PIXELS": 64, "BLOCK_CHANNELS": 4},
    dropout_kernels: {"BLOCK_PIXELS": 64, "BLOCK_FIELDS": 1, "BLOCK_SIZE": 2}, window_kernels: {"BLOCK": 256},
    norm_max_kernels: {"BLOCK": 64}}
each_device = pytest.mark.parametrize("device", [
    pytest.param(b.values[1], marks=b.marks, id=b.values[1]) for b in BACKENDS if b.values[0] == "triton"])
CONTIGUOUS, LAST = False, True


@pytest.fixture
def small_blocks(monkeypatch):
    for module, config in INTERPRETED_CONFIGS.items():
        monkeypatch.setattr(module, "IN_INTERPRETER", config)


class Norm:
    def __init__(self, structure):
        self.structure = structure

    def make(self, *options):
        """(tensors, channels of the output)"""
        call = norm.arguments(self.structure, *options)
        return call, call[0].shape[1]

    def run(self, backend, call, grad):
        x, _, _, fields, bases = call
        return (*norm.with_gradients(lambda *a: field_norm(*a, backend=backend), call, grad),
                *field_norm_moments(x, fields, bases, backend=backend))


class BatchNorm:
    """Both ops; options of field_batch_norm. Running statistics move by a tenth, or are averages of `momentum` None."""

    def __init__(self, structure, momentum=0.1, **options):
        self.structure, self.momentum, self.options = structure, momentum, options

    def make(self, *options):
        call = batch_norm.Call(self.structure, *options)
        return vars(call), call.x.shape[1]

    def run(self, backend, call, grad):
        module = batch_norm.Call.__new__(batch_norm.Call)
        module.__dict__ = call
        by = "values" if self.options.get("through") else "estimate"
        numbers, *moved = module.statistics(backend, by, self.momentum)
        running = module.statistics(backend, "running", batch=False)[0]
        channels = call["x"].shape[1]
        moments = torch.linspace(1, 2, 2 * channels + 1, dtype=torch.float64, device=call["x"].device)
        known = module.statistics(backend, "running", moments=moments)
        return (*module.with_gradients(backend, grad, numbers=numbers, **self.options), *numbers, *moved, *running,
                *known[0], *known[1:])


class Gate:
    def __init__(self, kind, function="softplus", structure=(3, 1, 5)):
        self.kind, self.function, self.structure = kind, function, list(structure)

    def make(self, *options):
        has_bias = self.function != "squash"  # of norms, which are not negative
        leaves, rest = gate.arguments(self.structure, self.kind, *options, function=self.function, has_bias=has_bias)
        leaves[0][..., ::3] *= 0 if self.kind == "norm" else 1  # where the norm has no derivative
        return (leaves, rest), rest["out_channels"]

    def run(self, backend, call, grad):
        return gate.with_gradients(backend, *call, grad)


class Pool:
    def __init__(self, norms, numbers=0, structure=((3, 3), (1, 1), (8, 2), (3, 1))):
        self.norms, self.numbers, self.structure = norms, numbers, list(structure)

    def make(self, shape, dtype, channels_last):
        call = pool.arguments(self.structure, self.norms, shape, dtype, channels_last)
        if self.numbers:
            call += (pool.directions_of(call[1:], dtype, self.numbers),)
        return call, len(self.structure) * max(self.numbers, 1)

    def run(self, backend, call, grad):
        return pool.with_gradient(backend, call[0], call[1:3], self.norms, grad, *call[3:])


class Concatenated:
    def make(self, shape, dtype, channels_last):
        return [tensor(shape, 7, dtype, channels_last)], 14

    def run(self, backend, call, grad):
        x = call[0].detach().requires_grad_()
        y = concatenated_act(x, "elu", backend=backend)
        return y, *torch.autograd.grad(y, x, grad.to(y.dtype))


class Dropout:
    def __init__(self, sizes=(3, 1, 5, 1, 2, 1, 1)):
        self.sizes = list(sizes)

    def make(self, shape, dtype, channels_last):
        call = tensor(shape, sum(self.sizes), dtype, channels_last), dropout.table(self.sizes)
        return [*call, dropout.SEED], sum(self.sizes)

    def run(self, backend, call, grad):
        x, fields, seed = call
        return dropout.with_gradient(backend, x, fields, seed=seed)


class Fourier:
    def __init__(self, size, function="elu"):
        self.size, self.function = size, function

    def make(self, *options):
        return fourier.arguments(self.size, *options), fourier.out_channels(self.size)

    def run(self, backend, call, grad):
        return fourier.with_gradient(self.function, backend, call, grad)


KINDS = {"norm": Norm("interleaved"), "norm_changed": Norm("changed"), "norm_wide": Norm("wide"),
         "inner": BatchNorm("inner", through=True), "projected": BatchNorm("projected"),
         "irreps_changed": BatchNorm("irreps_changed"), "gate_norm": Gate("norm"),
         "gate_in_x": Gate("gates in x"), "gate_kept": Gate("gates in x, kept"),
         "gate_apart": Gate("gates apart"), "pool_largest": Pool(False), "pool_norm": Pool(True),
         "fourier": Fourier("grows"), "fourier_shrinks": Fourier("shrinks")}
KINDS |= {"pool_directions": Pool(False, numbers=2), "concatenated": Concatenated(), "dropout": Dropout()}
KINDS |= {f"gate_{f}": Gate("norm", f) for f in gate.FUNCTIONS if f not in ("gate", "softplus")}
KINDS |= {f"inner_{f}": BatchNorm("inner", through=True, function=f) for f in ("relu", "elu")}
KINDS |= {f"batch_norm_{s}": BatchNorm(s, None) for s in ("norms", "irreps", "many", "wide", "inner_alone")}
KINDS |= {f"fourier_{f}": Fourier("small", f) for f in fourier.FUNCTIONS if f != "elu"}
MAIN = ("norm", "norm_changed", "inner", "projected", "irreps_changed", "gate_norm", "gate_in_x", "gate_kept",
        "gate_apart", "pool_largest", "pool_norm", "fourier", "pool_directions", "concatenated", "dropout")
OPTIONS = [("plane", torch.float64, CONTIGUOUS), ("plane", torch.bfloat16, LAST)]
MORE = [("solid", torch.float32, LAST), ("plane", torch.float16, CONTIGUOUS), ("points", torch.float32, CONTIGUOUS),
        ("one_pixel", torch.float64, LAST), ("wide_plane", torch.float32, LAST),
        ("wide_plane", torch.float64, CONTIGUOUS)]
CALLS = [pytest.param(kind, *o, id=f"{kind}-{o[0]}-{o[1]}-{'last' if o[2] else 'contiguous'}")
         for kind in MAIN for o in OPTIONS]
CALLS += [pytest.param(kind, "plane", torch.float32, i % 2 == 0, id=f"{kind}-plane")
          for i, kind in enumerate(KINDS) if kind not in MAIN]
CALLS += [pytest.param(kind, *o, id=f"{kind}-{o[0]}-{o[1]}-{'last' if o[2] else 'contiguous'}", marks=pytest.mark.slow)
          for kind in KINDS for o in MORE]


def assert_equals_definition(kind, shape, dtype, channels_last, device):
    case = KINDS[kind]
    call, out_channels = case.make(shape, dtype, channels_last)
    call = tree_map_only(torch.Tensor, lambda t: t.to(device), call)
    x = call["x"] if isinstance(call, dict) else call[0][0] if isinstance(call[0], list) else call[0]
    grad = random(x.shape[0], out_channels, *x.shape[2:], seed=3, dtype=dtype).to(device)
    exact = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, call)
    got, want = case.run("triton", call, grad), case.run("reference", exact, grad)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, g.dtype)
    assert got[0].dtype == dtype and got[0].numel() == 0 or got[0].stride() == want[0].stride()


@pytest.mark.parametrize("kind,shape,dtype,channels_last", CALLS)
@each_device
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients(kind, shape, dtype, channels_last, device):
    assert_equals_definition(kind, shape, dtype, channels_last, device)


@pytest.mark.parametrize("kind", window.KINDS)
@pytest.mark.parametrize("shape,dtype,channels_last", [
    ((1, 3, 5, 6), torch.float64, CONTIGUOUS), ((2, 2, 5, 4), torch.bfloat16, LAST),
    pytest.param((1, 2, 3, 4, 3), torch.float32, LAST, marks=pytest.mark.slow)], ids=["plane", "plane_last", "solid"])
@each_device
@pytest.mark.usefixtures("small_blocks")
def test_windows(kind, shape, dtype, channels_last, device):
    x, filter, geometry = window.arguments(kind, shape, dtype, channels_last)
    filter = None if filter is None else filter.to(device)
    window.assert_equals_reference(x.to(device), filter, geometry, backend="triton")


@pytest.mark.parametrize("kind", norm_max.KINDS)
@pytest.mark.parametrize("shape,dtype,channels_last", [
    ((1, 5, 6), torch.float64, CONTIGUOUS), ((1, 4, 5), torch.bfloat16, LAST),
    pytest.param((1, 4, 3, 5), torch.float32, LAST, marks=pytest.mark.slow)], ids=["plane", "plane_last", "solid"])
@each_device
@pytest.mark.usefixtures("small_blocks")
def test_largest_norms(kind, shape, dtype, channels_last, device):
    sizes = norm_max.SIZES if kind == "apart" else (2, 1)  # fewer: the interpreter is slow
    x, tables, geometry = norm_max.arguments(kind, shape, dtype, channels_last, sizes)
    x, tables = x.to(device), [t.to(device) for t in tables]
    norm_max.assert_equals_reference(x, tables, geometry, backend="triton")
    norm_max.assert_equals_reference(x.relu().round().clamp(max=1), tables, geometry, backend="triton")


@pytest.mark.parametrize("kind", MAIN)
@each_device
def test_no_pixels(kind, device):
    if kind in ("inner", "projected", "irreps_changed"):
        pytest.skip("escnn divides by the number of values")
    for channels_last in (CONTIGUOUS, LAST):
        assert_equals_definition(kind, "empty", torch.float32, channels_last, device)


@each_device
def test_variance_of_numbers_far_from_zero(device):
    x = (1e4 + tensor("plane", 3)).float().to(device)
    fields, bases = (t.to(device) for t in norm.tables([3], []))
    got = field_norm_moments(x, fields, bases.float(), backend="triton")
    want = field_norm_moments(x.double(), fields, bases, backend="reference")
    assert_close(got[1], want[1], torch.float32)


@each_device
@pytest.mark.parametrize("norms", [False, True])
def test_pools_take_the_first_of_equal_maxima_and_what_is_no_number(norms, device):
    x, *tables = (t.to(device) for t in pool.arguments([(8, 2), (6, 2)], norms, (2, 5, 5), torch.float32))
    x = x.relu().round().clamp(max=1)
    x[0, 3, 2, 2] = float("nan")
    x[0, 9, 4, 4] = float("inf")
    grad = torch.ones(2, 2, 5, 5, device=device)
    got, want = (pool.with_gradient(b, x, tables, norms, grad) for b in ("triton", "reference"))
    usual = torch.ones_like(x, dtype=torch.bool)
    usual[0, :, 2, 2] = usual[0, :, 4, 4] = False  # escnn's norms have other gradients there
    torch.testing.assert_close(got[0], want[0], equal_nan=True)
    torch.testing.assert_close(got[1][usual], want[1][usual])


@each_device
def test_opcheck(device):
    """Schemas, fakes and registered derivatives of the overloads."""
    x, scale, shift, *tables = (t.to(device) for t in norm.arguments(([3, 2], [0]), (2, 2, 3), torch.float32,
                                                                     LAST))
    leaves = [t.requires_grad_() for t in (x, scale, shift)]
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(OPS.field_norm.triton, (*leaves, *tables), test_utils=utilities)
    opcheck(OPS.field_norm_moments.triton, (x.detach(), *tables), test_utils=utilities)
    call = batch_norm.Call("projected", (2, 2, 3), torch.float32, LAST).to(lambda t: t.to(device))
    opcheck(OPS.field_norm_statistics.triton, batch_norm.op_arguments(call), test_utils=utilities)
    numbers = call.statistics("triton")[0]
    rest = numbers, *call.tables, call.weights, call.biases, batch_norm.EPS, False, 0
    opcheck(OPS.field_batch_norm.triton, (call.x.requires_grad_(), *rest), test_utils=utilities)
    x, *matrices = (t.to(device) for t in fourier.arguments((1, 2, 3, 2), (2, 2, 3), torch.float32, LAST))
    opcheck(OPS.fourier_act.triton, (x.requires_grad_(), *matrices, 1), test_utils=utilities)
    x, *tables = (t.to(device) for t in pool.arguments([(4, 2)], True, (2, 2, 3), torch.float32, LAST))
    opcheck(OPS.field_pool.triton, (x.requires_grad_(), *tables, True, None), test_utils=utilities)
    x, tables, geometry = norm_max.arguments("apart", (2, 2, 3), torch.float32, LAST)
    call = (x.to(device).requires_grad_(), *(t.to(device) for t in tables), *geometry.values(), False)
    opcheck(OPS.norm_max_pool.triton, call, test_utils=utilities)
    (x, bias, _), rest = gate.arguments([2, 1], "norm", (2, 2, 3), torch.float32, LAST)
    call = [None if t is None else t.to(device)
            for t in (x.requires_grad_(), None, bias, rest["fields"], rest["elements"])]
    opcheck(OPS.field_gate.triton, (*call, 0, rest["eps"].to(device), rest["out_channels"]), test_utils=utilities)


@each_device
def test_compile(device):
    x, scale, shift, *tables = (t.to(device) for t in norm.arguments(([3, 2], []), (2, 3, 4), torch.float32))
    pool_tables = [t.to(device) for t in pool.arguments([(3, 3), (2, 2)], True, (2, 3, 4), torch.float32)[1:]]

    def f(x):
        mean, var = field_norm_moments(x, *tables, backend="triton")
        y = field_norm(x, scale * (var + 1).rsqrt(), shift - mean, *tables, backend="triton")
        return field_pool(y, *pool_tables, True, backend="triton").sin()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    torch.testing.assert_close(compiled(x), f(x))
    torch.testing.assert_close(*(torch.autograd.grad(g(x).sum(), x) for g in (compiled, f)))


def test_bad_tensors():
    x, scale, shift, *tables = norm.arguments("one", "plane", torch.float32)
    if not backends.TRITON_INTERPRET:
        pytest.skip("needs TRITON_INTERPRET=1")
    grad = tensor("plane", 1, torch.float32)
    for bad, match in ((grad.double(), "one dtype"), (grad[:1], "batch"), (grad[..., 1:], "spatial size")):
        with pytest.raises(ValueError, match=match):
            OPS.field_norm_bwd.triton(bad, x, scale, *tables)
    with pytest.raises(ValueError, match="contiguous or channels_last"):
        OPS.field_norm.triton(x.transpose(2, 3), scale, shift, *tables)


# ---- launches ----

class Counting:
    """In place of a kernel: its launches are counted, and nothing is computed."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches[self.name] += 1
        return launch


@pytest.fixture
def launches(monkeypatch):
    """Counter of the launches of each kernel; modules on the CPU run on Triton."""
    found = Counter()
    monkeypatch.setitem(on_fields._DEFAULTS, "cpu", "triton")
    for module in KERNELS:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counting(name, found))
    return found


class Launching(TorchDispatchMode):
    """Counts torch's operations that launch a kernel on a GPU: all but views, new memory, and the project's own ops.

    Also those inside the implementations of these, where `inside` wraps them.
    """
    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh")

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function._schema.name.split("::")
        result = function(*args, **(kwargs or {}))
        if space == "aten" and name not in self.FREE and not is_view(function):
            self.launches[name] += 1
        return result

    def inside(self, implementation):
        def call(*arguments):
            with self:
                return implementation(*arguments)
        return call


def is_view(function):
    """Whether the operation returns one of its arguments, which it does not write to, or a part of it."""
    returned = [r.alias_info for r in function._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


@pytest.fixture
def launching(launches, monkeypatch):
    """A mode that counts all launches, those of Triton's kernels too."""
    mode = Launching(launches)
    for module in KERNELS:
        ops = {"field_norm": ("field_norm_statistics", "field_batch_norm", "field_batch_norm_bwd")}.get(
            module.__name__.rpartition(".")[2], ())
        for name in ops:
            monkeypatch.setattr(module, name, mode.inside(getattr(module, name)))
    return mode


def count_launches(mode, module, x):
    """(forward, backward) of a training step."""
    counts = []
    with mode:
        for _ in range(2):  # tables of addresses are made in the first
            mode.launches.clear()
            y = module(x).tensor
            counts.append(Counter(mode.launches))
    grad = torch.ones_like(y)
    leaves = [x.tensor, *(p for p in module.parameters() if p.requires_grad)]
    mode.launches.clear()
    with mode:
        torch.autograd.grad(y, leaves, grad)
    return counts[-1], Counter(mode.launches)


@pytest.mark.triton
@pytest.mark.skipif(not backends.TRITON_INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("representations", [1, 3, 6])
@pytest.mark.parametrize("name", ["InnerBatchNorm", "NormBatchNorm", "InducedNormBatchNorm", "GNormBatchNorm",
                                  "IIDBatchNorm2d"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_launches_of_batch_norms(name, representations, training, launching):
    """At most 2 forward and 3 backward whatever the number of representations: of all that is launched, assembly of
    parameters and running statistics too."""
    module = getattr(equiconv.nn, name)(NORMED[name](representations)).train(training)
    x = module.in_type(torch.randn(2, module.in_type.size, 3, 3, requires_grad=True))
    forward, backward = count_launches(launching, module, x)
    assert 1 <= sum(forward.values()) <= 2 and 1 <= sum(backward.values()) <= 3, (forward, backward)


def cyclic(*representations):
    g = gspaces.rot2dOnR2(16)
    return of(g, *(g.irrep(r) if isinstance(r, int) else getattr(g, r) for r in representations))


def permuted(representations):
    g = gspaces.rot2dOnR2(16)
    found = [g.trivial_repr, g.regular_repr, *(g.quotient_repr(n) for n in (2, 4, 8))]
    found.append(group.directsum(2 * [g.regular_repr], name="two regular ones"))
    found[-1].supported_nonlinearities.add("pointwise")
    return of(g, *2 * found[:representations])


def several_induced(representations):
    g = reflections()
    rotations = g.fibergroup.subgroup((None, -1))[0]
    vectors = [g.induced_repr((None, -1), rotations.irrep(k)) for k in range(1, 4)]
    pairs = [group.directsum(2 * [v], name=f"two of {v.name}") for v in vectors]
    for pair, v in zip(pairs, vectors):
        pair.supported_nonlinearities.update(v.supported_nonlinearities)
    return of(g, *[r for both in zip(vectors, pairs) for r in both][:representations])


def vectors_of_sizes(representations):
    g = gspaces.rot2dOnR2(16)
    found = [group.directsum([g.irrep(k) for k in range(1, n + 2)], name=f"{n} vectors") for n in range(6)]
    for r in found:
        r.supported_nonlinearities.add("norm")
    return of(g, *2 * found[:representations])


NORMED = {"InnerBatchNorm": permuted, "NormBatchNorm": vectors_of_sizes, "InducedNormBatchNorm": several_induced,
          "GNormBatchNorm": lambda n: cyclic(*["regular_repr", 0, 1, 2, 3, 8][:n]),
          "IIDBatchNorm2d": lambda n: cyclic(*["regular_repr", 0, 1, 2, 3, 8][:n])}


def test_launches_are_counted():
    mode = Launching(Counter())
    x = torch.randn(3, 4, requires_grad=True)
    with mode:
        y = x.view(4, 3).t().exp()
        torch.empty_like(x)
        torch.cat([y, y]).add_(1)
    assert mode.launches == {"exp": 1, "cat": 1, "add_": 1}


@pytest.mark.triton
@pytest.mark.skipif(not backends.TRITON_INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", [
    "NormNonLinearity", "GatedNonLinearity1", "GroupPooling", "NormMaxPool", *(
        pytest.param(name, marks=pytest.mark.slow) for name in (
            "InducedNormNonLinearity", "GatedNonLinearity2", "InducedGatedNonLinearity1", "FourierELU",
            "QuotientFourierPointwise", "NormPool", "InducedNormPool", "VectorFieldNonLinearity",
            "ConcatenatedNonLinearity", "FieldDropout", "PointwiseMaxPoolAntialiased2D",
            "PointwiseAvgPoolAntialiased3D"))])
def test_two_kernels_forward_and_three_backward(name, launches):
    """Whatever the number of representations; of the kernels on tensors of features."""
    module = MODULES[name].build(equiconv.nn)
    inputs = MODULES[name].inputs(module, requires_grad=True)
    y = module(*inputs).tensor
    assert 1 <= sum(launches.values()) <= 2
    launches.clear()
    y.sum().backward()
    assert 1 <= sum(launches.values()) <= 3


# ---- what only a GPU has ----

@pytest.mark.cuda
@pytest.mark.triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", MAIN)
def test_cuda_graphs_capture_it_and_sums_are_reproduced(kind):
    """A replay, and other calls with many programs that arrive in any order, give the same numbers to the last bit."""
    call, out_channels = KINDS[kind].make((8, 61, 63), torch.float32, LAST)
    call = tree_map_only(torch.Tensor, lambda t: t.cuda(), call)
    grad = random(8, out_channels, 61, 63, seed=3, dtype=torch.float32).cuda()
    want = KINDS[kind].run("triton", call, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = KINDS[kind].run("triton", call, grad)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
