"""Batch norms in evaluation as part of the convolution before them: equal to the model that is not folded."""
import copy
import pickle

import escnn.nn
import pytest
import torch
from escnn import group, gspaces

import equiconv
from equiconv import nn
from tests.field_tables import random
from tests.modules import adjacent_irreps, induced, mixed, of, plane, point, pointwise, solid, vectors

pytestmark = pytest.mark.usefixtures("one_thread")


def several_irreps():
    """Fields of several irreps in several bases, in turn: each irrep has its own factor in GNormBatchNorm."""
    g = gspaces.rot2dOnR2(8)
    summed = group.directsum([g.irrep(1), g.trivial_repr, g.irrep(2)], name="vector, scalar, tensor")
    return of(g, g.regular_repr, summed, g.irrep(1), g.regular_repr, summed)


def transposed(in_type, out_type):
    return nn.R2ConvTransposed(in_type, out_type, 3, stride=2, padding=1, output_padding=1)


def planar(in_type, out_type):
    return nn.R2Conv(in_type, out_type, 3, padding=1, bias=False)


def spatial(in_type, out_type):
    return nn.R3Conv(in_type, out_type, 3, padding=1)


CASES = {"InnerBatchNorm": (nn.InnerBatchNorm, pointwise, planar, (6, 6)),
         "InnerBatchNorm, one size": (nn.InnerBatchNorm, lambda: of(plane(), plane().regular_repr), planar, (6, 6)),
         "IIDBatchNorm1d": (nn.IIDBatchNorm1d, lambda: mixed(point), nn.Linear, ()),
         "IIDBatchNorm2d": (nn.IIDBatchNorm2d, mixed, transposed, (6, 6)),
         "IIDBatchNorm3d": (nn.IIDBatchNorm3d, solid, spatial, (4, 4, 4)),
         "GNormBatchNorm": (nn.GNormBatchNorm, several_irreps, planar, (6, 6)),
         "GNormBatchNorm, irreps": (nn.GNormBatchNorm, adjacent_irreps, transposed, (6, 6)),
         "NormBatchNorm": (nn.NormBatchNorm, vectors, planar, (6, 6)),
         "InducedNormBatchNorm": (nn.InducedNormBatchNorm, induced, planar, (6, 6))}
each_case = pytest.mark.parametrize("case", CASES)


def build(case, container=nn.SequentialModule, method="auto", **options):
    """(a model with running statistics of its own, in eval mode, in float64, and its input)"""
    norm, field_type, convolution, size = CASES[case]
    field_type = field_type()
    image = of(field_type.gspace, field_type.gspace.trivial_repr, field_type.representations[0])
    torch.manual_seed(0)
    model = container(convolution(image, field_type), norm(field_type, **options), nn.IdentityModule(field_type))
    model = equiconv.accelerate(model, method=method).double()
    for name, buffer in model[1].named_buffers():  # escnn keeps them in float32
        if norm is nn.GNormBatchNorm and name.startswith("regular_change_of_basis"):
            buffer.copy_(torch.from_numpy(getattr(field_type.gspace.regular_repr, name.removeprefix("regular_"))))
    for name, parameter in sorted(model.named_parameters()):
        parameter.data += 0.3 * random(*parameter.shape, seed=len(name))
    x = random(5, image.size, *size)
    for step in range(3):
        model(image(2 * x + step))
    return model.eval(), image(x)


def evaluate(model, x):
    with torch.no_grad():
        return model(x).tensor


def compiled(model, x, mode=torch.no_grad):
    torch._dynamo.reset()
    with mode():
        return torch.compile(lambda t: model(x.type(t)).tensor, fullgraph=True, backend="aot_eager")(x.tensor)


def is_folded(model):
    return equiconv.acceleration_report(model)[1].status == "folded"


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@each_case
@pytest.mark.parametrize("method", ["dense", "factorised"])
@pytest.mark.parametrize("container", [nn.SequentialModule, torch.nn.Sequential])
def test_equals_the_model_that_is_not_folded(case, method, container):
    if method == "factorised" and case == "IIDBatchNorm1d":
        method = "auto"  # Linear has no other
    model, x = build(case, container, method)
    keys, want = model.state_dict().keys(), evaluate(model, x)
    assert equiconv.accelerate(model, fold=True) is model and isinstance(model, container)
    passes = []
    model[1]._compute = lambda x, *a, compute=model[1]._compute: passes.append(x.shape) or compute(x, *a)
    assert_close(evaluate(model, x), want)
    assert_close(evaluate(model, x), want)
    assert {shape[0] for shape in passes} == {1}  # only the bias
    assert model.state_dict().keys() == keys
    assert is_folded(model) and "in evaluation, into '0'" in str(equiconv.acceleration_report(model))
    assert_close(evaluate(equiconv.accelerate(model, fold=False), x), want)
    assert not is_folded(model)


@each_case
def test_nothing_stale(case):
    model, x = build(case)
    equiconv.accelerate(model, fold=True)
    evaluate(model, x)
    buffers = [b for name, b in model[1].named_buffers() if "running" in name]
    for tensor in (*model.parameters(), *buffers):
        if not tensor.requires_grad and tensor not in set(buffers):
            continue
        tensor.data.mul_(1.5)  # which leaves no trace
        assert_close(evaluate(model, x), evaluate(equiconv.accelerate(copy.deepcopy(model), fold=False), x))
    model[0].weights = torch.nn.Parameter(-model[0].weights.detach())
    assert_close(evaluate(model, x), evaluate(equiconv.accelerate(copy.deepcopy(model), fold=False), x))


@each_case
def test_training_after_evaluation(case):
    """Values, gradients and running statistics, to the last bit."""
    model, x = build(case)
    other = copy.deepcopy(model)
    equiconv.accelerate(model, fold=True)
    evaluate(model, x)
    for mode in (True, False):
        results = []
        for m in (model, other):
            y = m.train(mode)(x).tensor
            grads = torch.autograd.grad(y, list(m[0].parameters()), random(*y.shape), allow_unused=True)
            results.append((y, *[g for g in grads if g is not None], *m.state_dict().values()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_convolution_of_its_own():
    """Calls of the parts, and parts with hooks, see what they always saw."""
    model, x = build("IIDBatchNorm2d")
    alone = copy.deepcopy(model)
    equiconv.accelerate(model, fold=True)
    want = evaluate(model, x)
    assert torch.equal(evaluate(model[0], x), evaluate(alone[0], x))
    assert torch.equal(evaluate(model[1], model[0](x)), evaluate(alone[1], alone[0](x)))
    seen = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y.tensor.detach()))
    assert_close(evaluate(model, x), want)
    assert torch.equal(seen[0], evaluate(alone[0], x))


def test_a_frozen_convolution_before_a_training_batch_norm():
    model, x = build("InnerBatchNorm")
    other = equiconv.accelerate(copy.deepcopy(model), fold=True)
    for m in (model, other):
        next(m[1].children()).train()  # one of its children alone
    assert torch.equal(evaluate(other, x), evaluate(model, x))
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


def test_copies_and_pickles():
    model, x = build("GNormBatchNorm")
    want = evaluate(equiconv.accelerate(model, fold=True), x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_folded(other)
        assert torch.equal(evaluate(other, x), want)
        other[1].eps = 1.0  # a number that is no tensor
        assert not torch.allclose(evaluate(other, x), want)
        assert torch.equal(evaluate(model, x), want)


def test_foreign_bases():
    """A checkpoint whose basis is another one of the same kernels."""
    model, x = build("GNormBatchNorm")
    state = {k: -v if "sampled_basis" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    want = evaluate(model, x)
    assert_close(evaluate(equiconv.accelerate(model, fold=True), x), want)


def test_compile():
    model, x = build("IIDBatchNorm2d")
    want = evaluate(model, x)
    equiconv.accelerate(model, fold=True)
    assert_close(compiled(model, x), want)
    assert_close(compiled(model, x, torch.inference_mode), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    model, x = build("InnerBatchNorm")
    model.float()
    x = x.type(x.tensor.float())
    want = evaluate(model, x)
    with torch.autocast("cpu", dtype):
        unfolded = evaluate(model, x)
        folded = evaluate(equiconv.accelerate(model, fold=True), x)
    assert folded.dtype == dtype
    assert (folded - want).norm() <= 2 * (unfolded - want).norm() + 1e-5 * want.norm()


def test_the_report_says_why_not():
    field_type = pointwise()
    model = torch.nn.Sequential(nn.InnerBatchNorm(field_type), planar(field_type, field_type),
                                nn.InnerBatchNorm(field_type, track_running_stats=False))
    equiconv.accelerate(model, fold=True)
    assert type(model) is not torch.nn.Sequential
    first, _, second = equiconv.acceleration_report(model)
    assert (first.status, second.status) == ("accelerated", "accelerated")
    assert "no convolution directly before it" in first.reason
    assert "not folded: without running statistics it normalises by those of each batch" in second.reason
    x = field_type(random(3, field_type.size, 5, 5).float())
    unfolded = equiconv.accelerate(copy.deepcopy(model.eval()), fold=False)
    assert torch.equal(evaluate(model, x), evaluate(unfolded, x))


def test_sequences_without_such_pairs_are_left():
    model = torch.nn.Sequential(nn.IdentityModule(pointwise()), torch.nn.ReLU())
    assert type(equiconv.accelerate(model, fold=True)) is torch.nn.Sequential


# ---- InnerBatchNorm and a pointwise function ----

@pytest.mark.parametrize("container", ["SequentialModule", "torch"])
@pytest.mark.parametrize("function", ["ReLU", "ELU"])
def test_batch_norm_with_a_function_equals_escnn(container, function):
    """Values, gradients and running statistics; one op each way, also where ReLU works in place."""
    t = pointwise()
    options = {"inplace": True} if function == "ReLU" else {}
    make = escnn.nn.SequentialModule if container == "SequentialModule" else torch.nn.Sequential
    theirs, model = (make(escnn.nn.InnerBatchNorm(t), getattr(escnn.nn, function)(t, **options)).double()
                     for _ in range(2))
    equiconv.accelerate(model)
    for mode in (True, True, False):
        results = []
        for m in (theirs, model):
            x = random(3, t.size, 6, 5).requires_grad_()
            y = m.train(mode)(t(x)).tensor
            gradients = torch.autograd.grad(y, [x, *m.parameters()], random(*y.shape, seed=1))
            results.append((y, *gradients, *dict(m.named_buffers()).values()))
        named = zip(*[r[:1 + len(gradients)] for r in results])
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in named)
        state = model.state_dict()
        for key, value in theirs.state_dict().items():
            assert_close(state[key], value)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.train()(t(random(3, t.size, 6, 5).requires_grad_())).tensor.sum().backward()
    names = {event.name for event in profile.events()}
    assert {n for n in names if n.startswith("equiconv::")} == {
        "equiconv::field_norm_statistics", "equiconv::field_batch_norm", "equiconv::field_batch_norm_bwd"}
    assert not any("elu" in name for name in names)


def test_functions_that_are_no_part_of_the_batch_norm():
    t = pointwise()
    for function in (escnn.nn.ELU(t, alpha=2.0), escnn.nn.LeakyReLU(t)):
        model = equiconv.accelerate(escnn.nn.SequentialModule(escnn.nn.InnerBatchNorm(t), function))
        x = t(random(3, t.size, 6, 5).float())
        assert torch.equal(model(x).tensor, function(model[0].train()(x)).tensor)


# ---- a pointwise function in the convolution ----

FUNCTIONS = {"ReLU": lambda t: escnn.nn.ReLU(t, inplace=True), "ELU": lambda t: escnn.nn.ELU(t, alpha=0.7),
             "LeakyReLU": lambda t: escnn.nn.LeakyReLU(t, 0.2), "tanh": lambda t: nn.PointwiseNonLinearity(t, "p_tanh"),
             "sigmoid": lambda t: escnn.nn.PointwiseNonLinearity(t, "p_sigmoid")}


def regular_volume():
    g = gspaces.octaOnR3()
    return of(g, g.trivial_repr, g.regular_repr)


ACTIVATED = {"plane": (pointwise, planar, (6, 7)), "strided": (pointwise, transposed, (4, 5)),
             "space": (regular_volume, spatial, (3, 4, 4))}


def activated(case, function, norm=None, method="auto", container=nn.SequentialModule):
    """As build, of a convolution, a batch norm if there is one, and a pointwise function."""
    field_type, convolution, size = ACTIVATED[case]
    field_type = field_type()
    image = of(field_type.gspace, field_type.gspace.trivial_repr, field_type.representations[0])
    torch.manual_seed(0)
    norms = [] if norm is None else [norm(field_type)]
    layers = [convolution(image, field_type), *norms, FUNCTIONS[function](field_type)]
    model = equiconv.accelerate(container(*layers), method=method).double()
    for name, parameter in sorted(model.named_parameters()):
        parameter.data += 0.3 * random(*parameter.shape, seed=len(name))
    x = image(random(5, image.size, *size))
    model(x)
    return model.eval(), x


def computed_by(model, x):
    """The ops of this package and the pointwise functions that run, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        evaluate(model, x)
    functions = ("relu", "elu", "leaky_relu", "tanh", "sigmoid")
    return [e.name for e in profile.events() if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")
            if e.name.startswith("equiconv::") or e.name.removeprefix("aten::").rstrip("_") in functions]


@pytest.mark.parametrize("method", ["factorised", "dense"])
@pytest.mark.parametrize("norm", [None, "InnerBatchNorm", "IIDBatchNorm"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", ACTIVATED)
def test_activated_convolutions(case, function, norm, method):
    """Equal to the chain of modules and to escnn; one op where the convolution is factorised."""
    if norm is not None:
        norm = getattr(nn, norm if norm == "InnerBatchNorm" else f"{norm}{len(ACTIVATED[case][2])}d")
    container = nn.SequentialModule if method == "factorised" else torch.nn.Sequential
    model, x = activated(case, function, norm, method, container)
    alone = copy.deepcopy(model)
    want = evaluate(alone, x)
    equiconv.accelerate(model, fold=True)
    assert_close(evaluate(model, x), want)
    if method == "factorised":
        evaluate(model, x)
        assert computed_by(model, x) == ["equiconv::steerable_conv_packed"]
    statuses = [row.status for row in equiconv.acceleration_report(model)]
    assert statuses[1:] == ["folded"] * (len(statuses) - 1)
    results = []
    for m in (model, alone):  # training is as it was, to the last bit
        y = m.train()(x).tensor
        results.append((y, *torch.autograd.grad(y.square().sum(), list(m.parameters())), *m.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert_close(evaluate(model.eval(), x), evaluate(alone.eval(), x))  # with the statistics of that step


def test_gradients_of_activated_convolutions():
    """In evaluation, of the input and of the parameters."""
    model, x = activated("plane", "ELU", method="factorised")
    other = equiconv.accelerate(copy.deepcopy(model), fold=True)
    results = []
    for m in (model, other):
        leaf = x.tensor.clone().requires_grad_()
        y = m(x.type(leaf)).tensor
        results.append((y, *torch.autograd.grad(y, [leaf, *m.parameters()], random(*y.shape))))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


def test_hooks_of_functions():
    """A function with hooks is run, and sees what it always saw."""
    model, x = activated("plane", "ReLU", nn.InnerBatchNorm, "factorised")
    want = evaluate(model, x)
    before = evaluate(model[:2], x)
    equiconv.accelerate(model, fold=True)
    seen = []
    hooks = [model[2].register_forward_hook(lambda module, args, y: seen.append(y.tensor.clone())),
             model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].tensor.clone()))]
    assert_close(evaluate(model, x), want)
    assert len(seen) == 2
    assert_close(seen[0], before)
    assert_close(seen[1], want)
    for hook in hooks:
        hook.remove()
    evaluate(model, x)
    assert len(seen) == 2


def test_functions_that_convolutions_do_not_apply():
    t = pointwise()

    class OwnReLU(escnn.nn.ReLU):
        def forward(self, input):
            return input.type(-input.tensor)

    for function in (OwnReLU(t), escnn.nn.ELU(t, alpha=-0.5), torch.nn.ReLU()):
        image = of(t.gspace, t.gspace.trivial_repr)
        model = equiconv.accelerate(torch.nn.Sequential(planar(image, t), function), fold=True).eval()
        assert type(model) is torch.nn.Sequential
    x = image(random(2, 1, 5, 5).float())
    model = equiconv.accelerate(escnn.nn.SequentialModule(planar(image, t), OwnReLU(t)), fold=True).eval()
    assert torch.equal(evaluate(model, x), -evaluate(model[0], x))


@pytest.mark.parametrize("function,method", [("ELU", "factorised"), ("tanh", "factorised"), ("ReLU", "dense")])
def test_graphs_of_activated_convolutions(function, method):
    model, x = activated("plane", function, nn.InnerBatchNorm, method)
    want = evaluate(model, x)
    equiconv.accelerate(model, fold=True)
    assert_close(compiled(model, x), want)


class Doubled(nn.R2Conv):
    def forward(self, input):
        return self.out_type(2 * super().forward(input).tensor)


class Squashed(nn.IIDBatchNorm2d):
    def forward(self, input):
        return self.out_type(super().forward(input).tensor.tanh())


@pytest.mark.parametrize("convolution,norm", [(Doubled, nn.IIDBatchNorm2d), (nn.R2Conv, Squashed)])
@pytest.mark.parametrize("function", [escnn.nn.ReLU, escnn.nn.ELU])
def test_classes_of_the_users_own_are_called(convolution, norm, function):
    t = pointwise()
    image = of(t.gspace, t.gspace.trivial_repr)
    model = nn.SequentialModule(convolution(image, t, 3), norm(t), function(t)).double().eval()
    x = image(random(2, 1, 6, 7))
    want = evaluate(model, x)
    assert torch.equal(evaluate(equiconv.accelerate(model, fold=True), x), want)
    model = nn.SequentialModule(convolution(image, t, 3), function(t)).double().eval()
    want = evaluate(model, x)
    assert_close(evaluate(equiconv.accelerate(model, fold=True), x), want)


def test_a_forward_of_its_own_is_called():
    model, x = build("InnerBatchNorm")
    model[1].forward = lambda y: y + y
    want = evaluate(model, x)
    assert torch.equal(evaluate(equiconv.accelerate(model, fold=True), x), want)
