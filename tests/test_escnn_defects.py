"""Defects of escnn 1.0.11 that a replacement must not have: for each, what escnn does and what equiconv does.

Where one changes escnn's classes for the whole process (pickling, copies), escnn is shown in a process of its own.
"""
import copy
import pickle
import subprocess
import sys

import escnn.nn
import pytest
import torch

import equiconv.nn
from tests.modules import MODULES, adjacent_irreps, mixed, outputs, pointwise, regular
from tests.synchronisation import NoSynchronisation

pytestmark = pytest.mark.usefixtures("one_thread")
ESCNN, EQUICONV = escnn.nn, equiconv.nn


def conv(nn, **options):
    return nn.R2Conv(mixed(), pointwise(), 3, recompute=True, **options)


def random(field_type, *size, **options):
    return field_type(torch.randn(2, field_type.size, *(size or (6, 6)), generator=torch.Generator().manual_seed(0),
                                  **options))


def alone(script):
    """What a script prints in a process without equiconv."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    if "No module named 'lie_learn'" in done.stderr:
        pytest.skip("without equiconv, escnn needs lie_learn, which has no wheel for this Python")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ---- 1. Buffers in the order of a set: DistributedDataParallel writes one rank's over others of another rank ----

def test_distributed_ranks(ranks):
    assert ranks[1]["escnn"]["overwritten"] > 0
    assert ranks[0]["equiconv"]["overwritten"] == ranks[1]["equiconv"]["overwritten"] == 0


# ---- 2. The sampled basis is shared by the whole process ----

def test_double_of_one_model_breaks_others(own_escnn_cache):
    def others_after_double(nn):
        first, second = (nn.R2Conv(regular(), regular(), 5) for _ in range(2))
        first.double()
        third = nn.R2Conv(regular(), regular(), 5)
        for module in (second, third):
            module(random(regular()))

    with pytest.raises(RuntimeError, match="dtype|Double|double"):
        others_after_double(ESCNN)
    others_after_double(EQUICONV)


# ---- 3. The filter is a buffer that comes and goes with the mode ----

def test_keys_of_the_state():
    def keys(nn):
        module = conv(nn)
        return [set(module.train(mode).state_dict()) for mode in (True, False)]

    assert keys(ESCNN)[1] - keys(ESCNN)[0] == {"filter", "expanded_bias"}
    assert keys(EQUICONV)[0] == keys(EQUICONV)[1] == keys(ESCNN)[1]


def test_file_of_a_training_model_in_a_new_one():
    state = MODULES["R3Conv"].build(ESCNN).train().state_dict()
    with pytest.raises(RuntimeError, match='Missing key.*"filter"'):
        MODULES["R3Conv"].build(ESCNN).load_state_dict(state)
    MODULES["R3Conv"].build(EQUICONV).load_state_dict(state)


def test_stale_filter():
    def error(nn):
        module = nn.R2Conv(regular(), regular(), 3, bias=False, recompute=True).eval()
        x = random(regular())
        with torch.no_grad():
            before = module(x).tensor
            state = {k: 2 * v if k == "weights" else v for k, v in module.state_dict().items() if k != "filter"}
            module.load_state_dict(state, strict=False)
            return (module(x).tensor - 2 * before).norm() / before.norm()

    assert error(ESCNN) > 0.5
    assert error(EQUICONV) < 1e-5


def test_copy_and_second_backward_in_evaluation():
    theirs, ours = conv(ESCNN).eval(), conv(EQUICONV).eval()
    x = random(mixed())
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(theirs)
    assert torch.equal(copy.deepcopy(ours)(x).tensor, ours(x).tensor)
    theirs(x).tensor.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        theirs(x).tensor.sum().backward()
    for _ in range(2):
        ours(x).tensor.sum().backward()


# ---- 4. Nothing pickles;  5. a copy compares its types by np.allclose ----

ALONE = """
import copy, pickle
import numpy as np
import escnn.nn as nn
from escnn import gspaces
{install}
g = gspaces.rot2dOnR2(4)
t = nn.FieldType(g, 8 * [g.regular_repr])
try:
    print(pickle.loads(pickle.dumps(t)) == t)
except (AttributeError, pickle.PicklingError):
    print("fails")
copied, calls, allclose = copy.deepcopy(t), [], np.allclose
np.allclose = lambda *arguments, **options: calls.append(1) or allclose(*arguments, **options)
print(copied == t, len(calls))
"""


def test_pickles_and_copies():
    pickled, equal, comparisons = alone(ALONE.format(install=""))
    assert (pickled, equal) == ("fails", "True") and int(comparisons) > 0
    assert alone(ALONE.format(install="import equiconv"))[-3:] == ["True", "True", "0"]


def test_field_types_of_modules():
    module = conv(EQUICONV)
    assert pickle.loads(pickle.dumps(module)).in_type == module.in_type
    assert copy.deepcopy(module).in_type is module.in_type


# ---- 6. Hard-coded float32, and interleaved types under autocast ----

@pytest.mark.parametrize("name", ["GroupPooling", "NormPool", "NormMaxPool", "GatedNonLinearity1",
                                  "GatedNonLinearity2", "VectorFieldNonLinearity", "ConcatenatedNonLinearity",
                                  "MergeModule"])
def test_float64_stays_float64(name):
    def kinds(nn):
        module = MODULES[name].build(nn).double()
        return {y.dtype for y in outputs(module(*MODULES[name].inputs(module, dtype=torch.float64)))}

    assert kinds(EQUICONV) == {torch.float64}
    try:
        assert kinds(ESCNN) == {torch.float32}
    except RuntimeError as error:  # an interleaved type: its index_put refuses
        assert "dtypes match" in str(error)


@pytest.mark.parametrize("name", ["NormNonLinearity", "IIDBatchNorm2d", "GroupPooling", "NormPool", "NormMaxPool",
                                  "FieldDropout", "DisentangleModule"])
def test_interleaved_types_in_low_precision(name):
    case = MODULES[name]

    def run(nn):
        if name == "DisentangleModule":
            g = mixed().gspace
            module = nn.DisentangleModule(nn.FieldType(g, [g.regular_repr, g.irrep(1), g.regular_repr]))
            inputs = [random(module.in_type)]
        else:
            module = case.build(nn)
            inputs = case.inputs(module, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert outputs(module(*inputs))[0].dtype == inputs[0].tensor.dtype

    run(EQUICONV)
    with pytest.raises((RuntimeError, AssertionError)):
        run(ESCNN)


# ---- 7. Graph breaks ----

ADJACENT = {
    "R2Conv": lambda nn: nn.R2Conv(adjacent_irreps(), adjacent_irreps(), 3),
    "InnerBatchNorm": lambda nn: nn.InnerBatchNorm(regular()),
    "GroupPooling": lambda nn: nn.GroupPooling(regular()),
    "NormNonLinearity": lambda nn: nn.NormNonLinearity(regular()),
    "BranchingModule": lambda nn: nn.BranchingModule(regular(), ["a", "a"]),
    "IIDBatchNorm2d": lambda nn: nn.IIDBatchNorm2d(adjacent_irreps()),
    "GNormBatchNorm": lambda nn: nn.GNormBatchNorm(adjacent_irreps()),
}


@pytest.mark.parametrize("name", ["InnerBatchNorm", "GNormBatchNorm", "IIDBatchNorm2d"])
def test_one_graph(name):
    def compiled(nn):
        torch._dynamo.reset()
        module = ADJACENT[name](nn)
        x = random(module.in_type).tensor
        return torch.compile(lambda t: module(module.in_type(t)).tensor, fullgraph=True, backend="aot_eager")(x)

    compiled(EQUICONV)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(ESCNN)


def test_torch_export():
    def exported(nn):
        module = nn.SequentialModule(conv(nn), nn.InnerBatchNorm(pointwise()), nn.GroupPooling(pointwise())).eval()

        class Network(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.module = module

            def forward(self, x):
                return self.module(self.module.in_type(x)).tensor

        x = random(mixed()).tensor
        torch.testing.assert_close(torch.export.export(Network(), (x,)).module()(x), Network()(x))

    exported(EQUICONV)
    with pytest.raises(Exception, match="."):
        exported(ESCNN)


# ---- 8. Hidden synchronisation ----

@pytest.mark.parametrize("name", ADJACENT)
def test_nothing_waits(name, monkeypatch):
    """torch.allclose, in assertions, is an operation that waits, too."""
    def waits(nn):
        module = ADJACENT[name](nn)
        x = random(module.in_type)
        module(x)
        with monkeypatch.context() as patch, NoSynchronisation():
            patch.setattr(torch, "allclose", lambda *_, **__: torch.zeros(()).item())
            module(x)

    waits(EQUICONV)
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        waits(ESCNN)


# ---- 9. export() ----

@pytest.mark.parametrize("name,make", [
    ("padding_mode", lambda nn: nn.R2Conv(regular(), regular(), 3, padding=1, padding_mode="circular")),
    ("output_padding", lambda nn: nn.R2ConvTransposed(regular(), regular(), 3, stride=2, output_padding=1)),
    ("ceil_mode", lambda nn: nn.PointwiseMaxPool2D(regular(), 2, ceil_mode=True)),
], ids=lambda v: v if isinstance(v, str) else "")
def test_export_is_right(name, make):
    def same(nn):
        module = make(nn)
        x = random(regular(), 5, 5)
        plain = module.export()
        got, want = plain(x.tensor), module(x).tensor
        return got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-5)

    assert same(EQUICONV) and not same(ESCNN)


@pytest.mark.parametrize("name", ["NormPool", "FourierELU", "NormNonLinearity", "GatedNonLinearity1", "GNormBatchNorm",
                                  "PointwiseAvgPoolAntialiased2D", "InnerBatchNorm"])
def test_export_exists(name):
    with pytest.raises(NotImplementedError):
        MODULES[name].build(ESCNN).export()
    assert isinstance(MODULES[name].build(EQUICONV).export(), torch.nn.Module)


# ---- 10. evaluate_output_shape and assertions ----

def test_output_shape_with_tuples():
    def shapes(nn):
        module = nn.R2Conv(regular(), regular(), 5, padding=(1, 2))
        x = random(regular())
        return module.evaluate_output_shape(x.shape), tuple(module(x).shape)

    with pytest.raises(TypeError):
        shapes(ESCNN)
    evaluated, real = shapes(EQUICONV)
    assert evaluated == real


def test_errors_survive_optimised_python():
    script = ("import equiconv.nn, escnn.nn, torch\n"
              "from escnn import gspaces\n"
              "g = gspaces.rot2dOnR2(4)\n"
              "a, b = (escnn.nn.FieldType(g, [r]) for r in (g.regular_repr, g.irrep(1) + g.irrep(1)))\n"
              "for nn in (escnn.nn, equiconv.nn):\n"
              "    module = nn.R2Conv(a, a, 3)\n"
              "    try: print(module(b(torch.zeros(1, 4, 5, 5))).tensor.shape[1])\n"
              "    except ValueError as error: print('ValueError')\n")
    done = subprocess.run([sys.executable, "-O", "-W", "ignore", "-c", script], capture_output=True, text=True,
                          check=True)
    assert done.stdout.split()[-2:] == ["4", "ValueError"]  # escnn convolves a field of another type


# ---- 11. channels_last ----

@pytest.mark.parametrize("name", ["FourierPointwise", "GroupPooling", "NormPool", "NormMaxPool", "GatedNonLinearity1",
                                  "ConcatenatedNonLinearity", "TensorProductModule"])
def test_channels_last(name):
    case = MODULES[name]

    def keeps_it(nn):
        module = case.build(nn)
        y = module(*case.inputs(module, memory_format=torch.channels_last)).tensor
        return y.is_contiguous(memory_format=torch.channels_last)

    assert keeps_it(EQUICONV)
    try:
        assert not keeps_it(ESCNN)
    except RuntimeError as error:
        assert "view" in str(error)
