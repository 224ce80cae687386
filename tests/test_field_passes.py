"""How often each layer between convolutions reads or writes a whole feature map, whatever its representations are."""
import pytest
import torch
from escnn import gspaces

import equiconv.nn
from tests.modules import MODULES, of, reflections

pytestmark = pytest.mark.usefixtures("one_thread")
FORWARD, BACKWARD = 2, 3  # passes over the features, at most
NAMES = ("InnerBatchNorm", "IIDBatchNorm1d", "IIDBatchNorm2d", "IIDBatchNorm3d", "GNormBatchNorm", "NormBatchNorm",
         "InducedNormBatchNorm", "FourierPointwise", "FourierELU", "QuotientFourierPointwise", "QuotientFourierELU",
         "NormNonLinearity", "InducedNormNonLinearity", "GatedNonLinearity1", "GatedNonLinearity2",
         "InducedGatedNonLinearity1", "GatedNonLinearityUniform", "GroupPooling", "NormPool", "InducedNormPool",
         "NormMaxPool", "VectorFieldNonLinearity", "ConcatenatedNonLinearity", "FieldDropout", "PointwiseDropout",
         "PointwiseMaxPoolAntialiased2D", "PointwiseMaxPoolAntialiased3D", "PointwiseAvgPoolAntialiased3D")
#: of torch, which only look at a tensor unless they copy it, or make one without numbers
FREE = {"view", "reshape", "detach", "select", "expand", "alias", "as_strided", "new_empty", "empty_like", "to",
        "contiguous", "unflatten", "flatten", "unsqueeze", "squeeze", "t"}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::clone"}


def passes(function, values):
    """The outermost operations in which a tensor of at least so many values takes part."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    found = []
    for event in profile.events():
        parent, size = event.cpu_parent, max((torch.Size(s).numel() for s in event.input_shapes or () if s), default=0)
        if not event.name.startswith(("aten::", "equiconv::")) or size < values:
            continue
        while parent is not None and not parent.name.startswith(("aten::", "equiconv::")):
            parent = parent.cpu_parent
        copies = any(child.name in COPIES for child in event.cpu_children)
        if parent is None and (copies or event.name.removeprefix("aten::") not in FREE):
            found.append(event.name)
    return found


def assert_few_passes(module, inputs):
    values = min(x.tensor[:, :1].numel() for x in inputs)  # of one channel: more than parameters have
    outputs = []
    forward = passes(lambda: outputs.append(module(*inputs).tensor), values)
    leaves = [x.tensor for x in inputs] + [p for p in module.parameters() if p.requires_grad]
    grad = torch.ones_like(outputs[0])
    backward = passes(lambda: torch.autograd.grad(outputs[0], leaves, grad), values)
    assert 1 <= len(forward) <= FORWARD and 1 <= len(backward) <= BACKWARD, (forward, backward)
    assert all(name.startswith("equiconv::") for name in forward + backward), (forward, backward)


def batch_of(size):
    """So that a channel is larger than all parameters."""
    return {(): 2048, (6, 6): 64}.get(size, 16)


@pytest.mark.parametrize("name", NAMES)
def test_few_passes(name):
    case = MODULES[name]
    module = case.build(equiconv.nn)
    assert_few_passes(module, case.inputs(module, batch=batch_of(case.size), requires_grad=True))


def test_few_passes_of_torch():
    """Its one kernel each way is the faster one there."""
    module = MODULES["PointwiseAvgPoolAntialiased2D"].build(equiconv.nn)
    x, = MODULES["PointwiseAvgPoolAntialiased2D"].inputs(module, batch=64, requires_grad=True)
    outputs = []
    assert passes(lambda: outputs.append(module(x).tensor), x.tensor[:, :1].numel()) == ["aten::conv2d"]
    grad = torch.ones_like(outputs[0])
    assert passes(lambda: torch.autograd.grad(outputs[0], x.tensor, grad), grad[:, :1].numel()) == [
        "aten::convolution_backward"]


def test_no_class_is_left_out():
    """Every layer between convolutions that is not one of torch's functions, channel by channel, or a container."""
    torchs = {"PointwiseNonLinearity", "ReLU", "ELU", "LeakyReLU", "PointwiseAvgPoolAntialiased2D",
              *(f"Pointwise{kind}Pool{d}D" for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (2, 3))}
    words = ("BatchNorm", "NonLinearity", "Fourier", "Pool", "Dropout", "LU")
    assert {name for name in MODULES if any(word in name for word in words)} - torchs == set(NAMES)


def many_types():
    """{name: field types of many representations in turn}"""
    g, reflected, turns = gspaces.rot2dOnR2(16), reflections(), (1, 2, 3, 1, 4, 5, 2, 6, 7)
    scalar, irreps = g.trivial_repr, [g.irrep(k) for k in turns]
    permutations = [g.regular_repr, scalar, *(g.quotient_repr(n) for n in (2, 4, 8, 2)), g.regular_repr, scalar]
    flips = reflected.fibergroup.subgroup((None, -1))[0]
    induced = [reflected.induced_repr((None, -1), flips.irrep(k)) for k in (1, 2, 1, 3, 4)]
    gates = [reflected.induced_repr((None, -1), flips.irrep(0))] * len(induced)
    mixed, norms = of(g, *irreps, scalar, g.regular_repr, scalar), of(g, *irreps)
    induced, regular = of(reflected, *induced), of(g, *8 * [g.regular_repr])
    permutations = of(g, *permutations)
    return {"InnerBatchNorm": permutations, "IIDBatchNorm2d": mixed, "GNormBatchNorm": mixed, "NormBatchNorm": norms,
            "InducedNormBatchNorm": induced, "NormNonLinearity": norms, "InducedNormNonLinearity": induced,
            "GatedNonLinearity1": of(g, *len(irreps) * [scalar], *irreps),
            "GatedNonLinearity2": (of(g, *len(irreps) * [scalar]), norms),
            "InducedGatedNonLinearity1": of(reflected, *gates, *induced.representations),
            "GroupPooling": permutations, "NormPool": mixed, "InducedNormPool": induced, "NormMaxPool": mixed,
            "VectorFieldNonLinearity": regular, "ConcatenatedNonLinearity": regular, "FieldDropout": mixed,
            "PointwiseDropout": permutations, "PointwiseMaxPoolAntialiased2D": permutations}


@pytest.mark.parametrize("name", many_types())
def test_many_representations(name):
    field_type, options = many_types()[name], (2,) if "MaxPool" in name else ()
    module = getattr(equiconv.nn, name)(field_type, *options)
    types = field_type if isinstance(field_type, tuple) else (field_type,)
    assert_few_passes(module, [t(torch.randn(64, t.size, 6, 6, requires_grad=True)) for t in types])


@pytest.mark.parametrize("function", [equiconv.nn.ELU, lambda t: equiconv.nn.PointwiseNonLinearity(t, "p_relu")])
def test_activated_batch_norm(function):
    t = MODULES["InnerBatchNorm"].build(equiconv.nn).in_type
    norm, function = equiconv.nn.InnerBatchNorm(t), function(t)
    x = t(torch.randn(64, t.size, 6, 6, requires_grad=True))
    module = equiconv.nn.SequentialModule(norm, function)
    assert_few_passes(module, [x])
    torch.testing.assert_close(module(x).tensor, function(norm(x)).tensor)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("function", ["ReLU", "ELU"])
def test_activated_convolution(function, norm):
    """In evaluation, folded: one pass from the features before the convolution to those after the function."""
    t = MODULES["InnerBatchNorm"].build(equiconv.nn).in_type
    layers = [equiconv.nn.R2Conv(t, t, 3, padding=1), *([equiconv.nn.InnerBatchNorm(t)] if norm else []),
              getattr(equiconv.nn, function)(t)]
    module = equiconv.accelerate(equiconv.nn.SequentialModule(*layers), method="factorised", fold=True).eval()
    x = t(torch.randn(64, t.size, 6, 6))
    with torch.no_grad():
        module(x)  # makes the tables, and folds
        assert passes(lambda: module(x), x.tensor[:, :1].numel()) == ["equiconv::steerable_conv_packed"]


def test_passes_are_counted():
    x = torch.randn(64, 8, requires_grad=True)
    assert passes(lambda: (x * 2).view(8, 64).exp(), 64) == ["aten::mul", "aten::exp"]
    assert passes(lambda: (x.t().contiguous(), x.double(), x.to(torch.float32)), 64) == ["aten::contiguous", "aten::to"]
