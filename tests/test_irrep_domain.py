"""Features that stay in the basis of their irreps between convolutions: what is seen from outside stays as it is."""
import copy
import io
import pickle

import escnn.nn
import numpy as np
import pytest
import torch
from escnn import group, gspaces
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import equiconv
from equiconv import nn
from equiconv.layout import FilterPlan
from equiconv.nn.bases import Bases, changes_of_basis
from tests.cases import alternating, irreps, quotient, regular, space, together, trivial
from tests.field_tables import random
from tests.modules import induced, of

pytestmark = pytest.mark.usefixtures("one_thread")
INSIDE, FIRST, LAST = "irreps -> irreps", "fields -> irreps", "irreps -> fields"


def convolution(in_type, out_type, kernel_size=3, namespace=nn, **options):
    cls = namespace.R3Conv if in_type.gspace.dimensionality == 3 else namespace.R2Conv
    return cls(in_type, out_type, kernel_size, **{"padding": kernel_size // 2, "initialize": False, **options})


def images_of(field_type):
    return of(field_type.gspace, field_type.gspace.trivial_repr)


def chain(field_type, *between, container=nn.SequentialModule, **options):
    """convolution, modules (functions of a type), convolution; from and to scalars."""
    image, modules, current = images_of(field_type), [], field_type
    for make in between:
        modules.append(make(current))
        current = modules[-1].out_type
    return container(convolution(image, field_type, **options), *modules, convolution(current, image, **options))


def with_numbers(model, seed=0):
    """The model in float64 with parameters and running statistics of its own, without anything rounded to float32."""
    for p, parameter in enumerate(model.double().parameters()):
        parameter.data = 0.3 * random(*parameter.shape, seed=seed + p) + (0.5 if parameter.dim() == 1 else 0)
    for module in model.modules():
        for group_ in getattr(module, "_groups", ()) if isinstance(module, nn.GNormBatchNorm) else ():
            representation = next(r for r in module.in_type.representations if r.name == group_.label)
            for name in ("change_of_basis", "change_of_basis_inv"):  # escnn keeps them in float32
                buffer = module._named(name, group_)
                if buffer is not None:
                    buffer.copy_(torch.from_numpy(getattr(representation, name)))
    return model


def pair(model, **options):
    """(a copy of the model that computes with fields, the model)"""
    other = copy.deepcopy(equiconv.accelerate(model))
    return other, equiconv.accelerate(model, irrep_domain=True, **options)


def bases(model):
    return [row.basis for row in equiconv.acceleration_report(model)]


def input_of(model, size, batch=2, dtype=torch.float64, seed=0):
    in_type = model[0].in_type
    return in_type(random(batch, in_type.size, *size, seed=seed).to(dtype))


def step(model, x):
    """[output, gradients of the input and of the parameters, state]"""
    leaf = x.tensor.detach().clone().requires_grad_()
    torch.manual_seed(0)
    y = model(x.type(leaf)).tensor
    grads = torch.autograd.grad(y, [leaf, *model.parameters()], random(*y.shape, seed=9).to(y.dtype))
    return [y.detach(), *grads, *[value.detach().clone() for value in model.state_dict().values()]]


def assert_close(got, want, tolerance=1e-11):
    """Each relative to its norm; some are nothing but rounding, beside the others or beside inputs about 1."""
    norms = torch.tensor([w.detach().double().norm() for w in want])
    largest = norms.max().clamp(min=1)
    for g, w, norm in zip(got, want, norms, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w.double()).norm() <= tolerance * (norm + 1e-2 * largest)


def assert_same(other, model, x, tolerance=1e-11):
    """Two steps of training, then evaluation with and without gradients."""
    for mode in (True, True, False):
        other.train(mode)
        model.train(mode)
        assert_close(step(model, x), step(other, x), tolerance)
    with torch.no_grad():
        assert_close([model(x).tensor], [other(x).tensor], tolerance)


TYPES = {  # name of the gspace, fields
    "C8": ("C8", regular(2)), "C4, mixed": ("C4", alternating(regular(2), trivial(2))),
    "C4, quotient": ("C4", together(quotient(2, 2), regular(1))), "D4": ("D4", regular(1)),
    "D4, quotient": ("D4", quotient((None, 2), 2)), "mirror": ("mirror on R3", alternating(regular(2), trivial(2))),
    "fan": ("fan on R3", regular(2)), "octahedral": ("octahedral", regular(1))}
each_type = pytest.mark.parametrize("name", TYPES)


def field_type(name):
    space_name, fields = TYPES[name]
    return nn.FieldType(space(space_name), fields(space(space_name)))


def size_of(field_type):
    return (4, 5, 4) if field_type.gspace.dimensionality == 3 else (7, 6)


def iid(t):
    return (nn.IIDBatchNorm3d if t.gspace.dimensionality == 3 else nn.IIDBatchNorm2d)(t)


def average(t):
    return (nn.PointwiseAvgPool3D if t.gspace.dimensionality == 3 else nn.PointwiseAvgPool2D)(t, 2)


def antialiased(t):
    cls = nn.PointwiseAvgPoolAntialiased3D if t.gspace.dimensionality == 3 else nn.PointwiseAvgPoolAntialiased2D
    return cls(t, 0.6, 2)


def adaptive(t):
    return (nn.PointwiseAdaptiveAvgPool3D if t.gspace.dimensionality == 3 else nn.PointwiseAdaptiveAvgPool2D)(t, 3)


def upsampling(t):
    return (nn.R3Upsampling if t.gspace.dimensionality == 3 else nn.R2Upsampling)(t, 2)


BETWEEN = {"nothing": [], "ReLU": [nn.ReLU], "ELU": [nn.ELU], "IIDBatchNorm": [iid, nn.ReLU],
           "InnerBatchNorm": [nn.InnerBatchNorm, nn.ELU], "GNormBatchNorm": [nn.GNormBatchNorm, nn.ReLU],
           "pools": [antialiased, nn.ReLU, adaptive], "average": [average, upsampling],
           "sigmoid, tanh": [lambda t: nn.PointwiseNonLinearity(t, "p_sigmoid"),
                             lambda t: nn.PointwiseNonLinearity(t, "p_tanh")],
           "dropout": [nn.FieldDropout, nn.IdentityModule], "NormNonLinearity": [nn.NormNonLinearity],
           "statistics of each batch": [lambda t: nn.InnerBatchNorm(t, track_running_stats=False, affine=False)]}


# ---- values ----

@pytest.mark.parametrize("name,between", [
    *[("C4, mixed", between) for between in BETWEEN],
    *[(name, between) for name in TYPES for between in ("InnerBatchNorm", "IIDBatchNorm", "GNormBatchNorm")],
    ("octahedral", "pools"), ("D4, quotient", "statistics of each batch")])
def test_equals_the_basis_of_fields(name, between):
    t = field_type(name)
    other, model = pair(with_numbers(chain(t, *BETWEEN[between])))
    assert bases(model) == [FIRST, *len(BETWEEN[between]) * [INSIDE], LAST] and not any(bases(other))
    assert_same(other, model, input_of(model, size_of(t)))


@pytest.mark.parametrize("name,dtype", [("C8", torch.float32), ("D4, quotient", torch.float32),
                                        ("octahedral", torch.float32), ("C4, mixed", torch.float64)])
@pytest.mark.parametrize("method", ["factorised", "dense"])
def test_equals_escnn(name, dtype, method, own_escnn_cache):
    """To what escnn's bases, which are float32, allow."""
    t = field_type(name)
    image, cls = images_of(t), "R3" if t.gspace.dimensionality == 3 else "R2"
    torch.manual_seed(0)
    convolve = getattr(escnn.nn, f"{cls}Conv")
    theirs = escnn.nn.SequentialModule(convolve(image, t, 3, padding=1), escnn.nn.InnerBatchNorm(t), escnn.nn.ReLU(t),
                                       convolve(t, t, 3, padding=1), escnn.nn.ELU(t), convolve(t, image, 3)).to(dtype)
    model = equiconv.accelerate(copy.deepcopy(theirs), irrep_domain=True, method=method)
    assert bases(model) == [FIRST, INSIDE, INSIDE, INSIDE, INSIDE, LAST]
    x = input_of(model, size_of(t), dtype=dtype)
    for mode in (True, False):
        results = []
        for m in (theirs.train(mode), model.train(mode)):
            y = m(x).tensor
            results.append([y.detach(), *torch.autograd.grad(y, list(m.parameters()), random(*y.shape).to(dtype))])
        assert_close(*results, 1e-5)
    running = {key: value for key, value in theirs.state_dict().items() if "running" in key}
    assert_close([model.state_dict()[key] for key in running], list(running.values()), 1e-5)


GROUPS = {"C3": None, "C4": 2, "C8": 4, "D4": (None, 2), "C4 on R3": 2, "mirror on R3": None}  # and a subgroup


@st.composite
def chains(draw):
    """Convolutions between any types, with whatever fits between them; some of them in a sequence of their own."""
    name = draw(st.sampled_from(list(GROUPS)))
    g = space(name)
    kinds = [g.regular_repr, g.trivial_repr, g.irrep(*g.fibergroup.irreps()[-1].id)]
    if GROUPS[name] is not None:
        kinds.append(g.quotient_repr(GROUPS[name]))
    pool = nn.PointwiseMaxPool3D if g.dimensionality == 3 else nn.PointwiseMaxPool2D
    modules, current = [], of(g, g.regular_repr, g.trivial_repr)
    for _ in range(draw(st.integers(2, 4))):
        others = draw(st.lists(st.sampled_from(kinds), max_size=3))
        # with all irreps: no features vanish but for rounding errors, which a batch norm would enlarge
        out = of(g, *draw(st.permutations([g.regular_repr, *others])))
        try:
            modules.append(convolution(current, out, draw(st.sampled_from([1, 3])), bias=draw(st.booleans())))
        except ValueError:  # no kernel of that size between them
            reject()
        makers = [iid, nn.GNormBatchNorm, nn.IdentityModule, nn.FieldDropout]
        if all("pointwise" in r.supported_nonlinearities for r in out.representations):
            makers += [nn.ReLU, nn.ELU, nn.InnerBatchNorm, adaptive, lambda t: pool(t, 3, stride=1, padding=1)]
        modules += [make(out) for make in draw(st.lists(st.sampled_from(makers), max_size=3))]
        current = out
    inner = draw(st.integers(1, len(modules) - 1))
    return nn.SequentialModule(*modules[:inner], nn.SequentialModule(*modules[inner:]))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains(), st.booleans(), st.integers(0, 99))
def test_any_chain(model, folds, seed):
    d = model[0].space.dimensionality
    other, model = pair(with_numbers(model, seed), fold=folds)
    with np.errstate(all="ignore"):
        assert_same(other, model, input_of(model, (8, 9, 8)[:d], seed=seed))


@pytest.mark.parametrize("method", ["factorised", "dense"])
def test_options_of_convolutions(method):
    """Strides, groups, padding modes, and transposed convolutions."""
    g = space("D4")
    t = of(g, *4 * [g.regular_repr])
    other, model = pair(with_numbers(nn.SequentialModule(
        convolution(t, t, groups=2, padding_mode="circular"), nn.ReLU(t),
        nn.R2ConvTransposed(t, t, 3, stride=2, padding=1, output_padding=1, initialize=False), iid(t),
        convolution(t, t, stride=2, dilation=2, bias=False), nn.ELU(t), convolution(t, t, 1, groups=4))), method=method)
    other.apply(lambda module: setattr(module, "method", method) if hasattr(module, "method") else None)
    assert bases(model) == [FIRST, *5 * [INSIDE], LAST]
    assert_same(other, model, input_of(model, (6, 5)))


@each_type
def test_fewer_multiplications(name):
    """Two changes of basis less between two convolutions."""
    t = field_type(name)
    layer = convolution(t, t)
    geometry = layer.geometry((1, t.size, *size_of(t)))
    works = [equiconv.nn.costs.factorised_work(layer.plan.in_irreps(*b), geometry)
             for b in ((False, False), (True, False), (False, True), (True, True))]
    both = sum(r.size ** 2 for r in t.representations if r.size > 1)
    assert [works[0].transforms - w.transforms for w in works] == [0, both, both, 2 * both]
    assert works[3].transforms == 0 and len({w.mixing for w in works}) == 1


# ---- where irreps end ----

def vectors_and_scalars(change_of_basis):
    g = space("C4")
    return of(g, group.Representation(g.fibergroup, f"mixed by {np.ravel(change_of_basis)}", [(1,), (0,)],
                                      np.array(change_of_basis, float), {"norm"}))


ORTHOGONAL = [[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]]
OBLIQUE = [[1, 0, 0.5], [0, 1, 0], [0.25, 0, 2]]


@pytest.mark.parametrize("make", [iid, nn.NormNonLinearity])
def test_norms_belong_to_orthogonal_changes_of_basis(make):
    for matrix, kept in ((ORTHOGONAL, True), (OBLIQUE, False)):
        t = vectors_and_scalars(matrix)
        other, model = pair(with_numbers(chain(t, make)))
        assert any(bases(model)) == kept
        assert_same(other, model, input_of(model, (6, 6)))


def test_any_change_of_basis_is_left_out_for_statistics_of_irreps():
    other, model = pair(with_numbers(chain(vectors_and_scalars(OBLIQUE), nn.GNormBatchNorm, nn.FieldDropout)))
    assert bases(model)[0] == FIRST
    assert_same(other, model, input_of(model, (6, 6)))


def gated_fields():
    g = space("C4")
    return of(g, g.trivial_repr, g.regular_repr, g.trivial_repr, g.regular_repr)


@pytest.mark.parametrize("drop", [True, False])
def test_gates(drop):
    def gate(t):
        return nn.GatedNonLinearity1(t, ["gate", "gated", "gate", "gated"], drop_gates=drop)

    other, model = pair(with_numbers(chain(gated_fields(), iid, gate)))
    assert bases(model) == [FIRST, INSIDE, INSIDE, LAST]
    assert_same(other, model, input_of(model, (6, 6)))


ENDS = {"PointwiseMaxPool2D": lambda t: nn.PointwiseMaxPool2D(t, 2), "PointwiseDropout": nn.PointwiseDropout,
        "LeakyReLU": nn.LeakyReLU, "ELU of another alpha": lambda t: nn.ELU(t, alpha=0.5), "NormMaxPool":
        lambda t: nn.NormMaxPool(t, 2), "GroupPooling": nn.GroupPooling, "ConcatenatedNonLinearity":
        nn.ConcatenatedNonLinearity, "RestrictionModule": lambda t: nn.RestrictionModule(t, 2)}


@pytest.mark.parametrize("end", ENDS)
def test_modules_that_need_fields(end):
    t = nn.FieldType(space("C4"), regular(2)(space("C4")))
    first, last = convolution(images_of(t), t), ENDS[end](t)
    other, model = pair(with_numbers(nn.SequentialModule(
        first, nn.ReLU(t), convolution(t, t), nn.ReLU(t), last, convolution(last.out_type, images_of(last.out_type)))))
    assert bases(model)[:3] == [FIRST, INSIDE, LAST] and not any(bases(model)[3:])
    assert_same(other, model, input_of(model, (8, 8)))


def test_fields_without_a_change_of_basis():
    _, model = pair(chain(induced()))
    assert any(bases(model))
    for fields in (irreps(0, 1, 2), trivial(3)):
        _, model = pair(chain(nn.FieldType(space("C4"), fields(space("C4")))))
        assert not any(bases(model))


def test_hooks_see_fields():
    t = field_type("C8")
    other, model = pair(with_numbers(chain(t, nn.ReLU)))
    x, seen = input_of(model, size_of(t)), []
    want = other[0](x).tensor
    for register in (model[1].register_forward_pre_hook, torch.nn.modules.module.register_module_forward_pre_hook):
        handle = register(lambda module, inputs: seen.append((module, *inputs)))
        model(x)
        handle.remove()
        read, = [read for module, read in seen if module is model[1]]
        assert type(read) is nn.GeometricTensor and torch.equal(read.tensor, want)
        seen.clear()
    assert_close(step(model, x), step(other, x))
    assert bases(model) == [FIRST, INSIDE, LAST]
    assert torch.equal(model[0](x).tensor, want)  # a call of its own


def test_sequences_that_change():
    t = field_type("C8")
    other, model = pair(with_numbers(chain(t, nn.ReLU)))
    x = input_of(model, size_of(t))
    model(x)
    for m in (model, other):
        m._modules["1"] = nn.LeakyReLU(t)
    assert not any(bases(model))
    assert_close(step(model, x), step(other, x))


def test_foreign_bases():
    """A checkpoint with another basis of the same kernels; and one whose kernels do not separate into irreps."""
    t = field_type("C8")
    other, model = pair(with_numbers(chain(t, nn.ReLU)))
    x = input_of(model, size_of(t))
    model(x)
    state = {k: -v if "sampled_basis" in k else v for k, v in model.state_dict().items()}
    for m in (other, model):
        m.load_state_dict(state)
    assert_same(other, model, x)
    assert any(bases(model))
    state = {k: v.bfloat16() if "sampled_basis" in k else v for k, v in state.items()}
    for m in (other, model):
        m.load_state_dict(state)
    assert not any(bases(model)) and not all(model[2].plan.separates())
    assert_same(other, model, x)


def test_batch_norms_that_are_frozen_in_part():
    other, model = pair(with_numbers(chain(field_type("C4, mixed"), nn.InnerBatchNorm)))
    x = input_of(model, (6, 6))
    assert_close(step(model, x), step(other, x))
    for m in (other, model):
        next(m[1].children()).eval()
    assert not any(bases(model))
    assert_close(step(model, x), step(other, x))


# ---- what else is done with models ----

@pytest.mark.parametrize("norm", [nn.InnerBatchNorm, iid, nn.GNormBatchNorm])
def test_folding(norm):
    t = field_type("C4, mixed")
    other, model = pair(with_numbers(chain(t, norm)), fold=True)
    assert_same(other, model, input_of(model, (6, 6)))
    with torch.no_grad():
        model(input_of(model, (6, 6)))
    first, last = model[0].plan_report(), model[2].plan_report()
    assert first.bases == Bases(False, True) and first.folded == type(model[1]).__name__
    assert f"it reads fields and writes irreps; the {first.folded} after it was part of its filter" in str(first)
    assert last.bases == Bases(True, False) and not last.folded and "it reads irreps and writes fields" in str(last)
    model.train()(input_of(model, (6, 6)))
    assert not model[0].plan_report().folded


def test_functions_that_are_folded():
    """They are part of the convolution before them, which writes fields then."""
    other, model = pair(with_numbers(chain(field_type("C8"), iid, nn.ReLU)), fold=True)
    assert_same(other, model, input_of(model, (6, 6)))
    assert bases(model) == ["", "", "", ""]
    assert bases(model.train()) == [FIRST, INSIDE, INSIDE, LAST]


def test_plan_report_of_what_was_computed():
    t = field_type("C8")
    other, model = pair(with_numbers(chain(t, nn.ReLU)))
    x = input_of(model, size_of(t))
    for m in (other, model):
        m(x)
    assert model[2].plan_report().factorised < other[2].plan_report().factorised
    assert other[2].plan_report().bases == Bases() and "reads fields and writes fields" in str(other[2].plan_report())
    model[2](t(random(2, t.size, 5, 5)))  # a call of its own
    assert model[2].plan_report().bases == Bases()


def test_accelerate_again():
    t = field_type("C8")
    model = torch.nn.Sequential(convolution(images_of(t), t), torch.nn.Sequential(nn.ReLU(t), convolution(t, t)))
    equiconv.accelerate(model, irrep_domain=True)
    assert bases(model) == [FIRST, INSIDE, LAST] and isinstance(model, torch.nn.Sequential)
    assert "fields -> irreps" in str(equiconv.acceleration_report(model))
    equiconv.accelerate(model)
    assert any(bases(model))
    equiconv.accelerate(model, irrep_domain=False)
    assert not any(bases(model))


def test_copies_and_pickles():
    t = field_type("C8")
    _, model = pair(with_numbers(chain(t, nn.ReLU)))
    x = input_of(model, size_of(t))
    want, keys = model(x).tensor, model.state_dict().keys()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert bases(other) == [FIRST, INSIDE, LAST] and other.state_dict().keys() == keys
        assert torch.equal(other(x).tensor, want)
        other[0].weights.data.mul_(2)
        assert not torch.equal(other(x).tensor, want) and torch.equal(model(x).tensor, want)
    assert type(model[0](x)) is nn.GeometricTensor and model[0].out_type == model[1].in_type == t


def test_graphs_compute_with_fields():
    t = field_type("C8")
    other, model = pair(with_numbers(chain(t, nn.InnerBatchNorm, nn.ReLU)))
    x = input_of(model, size_of(t))
    torch._dynamo.reset()
    compiled = torch.compile(lambda tensor: model(x.type(tensor)).tensor, fullgraph=True, backend="eager")
    assert_close([compiled(x.tensor)], [other.train()(x).tensor])
    assert_close([model.eval().export()(x.tensor)], [other.eval()(x).tensor])
    images = torch.func.vmap(lambda image: model(x.type(image[None])).tensor[0])(x.tensor)
    assert_close([images], [other(x).tensor])


@pytest.mark.parametrize("between", ["InnerBatchNorm", "IIDBatchNorm", "GNormBatchNorm"])
def test_double_backward(between):
    t = field_type("C4, mixed")
    other, model = pair(with_numbers(chain(t, *BETWEEN[between])))
    results = []
    for m in (other, model):
        x = input_of(m, (5, 5))
        leaf = x.tensor.requires_grad_()
        y = m(x.type(leaf)).tensor
        grad, = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [leaf, *m.parameters()], allow_unused=True,
                                           materialize_grads=True))
    assert_close(*results, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    t = field_type("C8")
    other, model = pair(with_numbers(chain(t, iid, nn.ReLU)).float())
    x = input_of(model, size_of(t), dtype=torch.float32)
    want = other(x).tensor
    with torch.autocast("cpu", dtype):
        theirs, ours = other(x).tensor, model(x).tensor
    assert ours.dtype == theirs.dtype == dtype
    assert (ours - want).norm() <= 2 * (theirs - want).norm() + 1e-5 * want.norm()


def test_channels_last():
    t = field_type("C4, mixed")
    other, model = pair(with_numbers(chain(t, nn.InnerBatchNorm, nn.ReLU)))
    x = input_of(model, (6, 6))
    x = x.type(x.tensor.contiguous(memory_format=torch.channels_last))
    assert_close(step(model, x), step(other, x))
    assert model(x).tensor.is_contiguous(memory_format=torch.channels_last)


def test_autotune():
    t = field_type("C8")
    other, model = pair(with_numbers(chain(t, nn.ReLU)))
    x = input_of(model, size_of(t))
    report = equiconv.autotune(model, x, budget_s=0.0)
    assert [tuned.method in ("factorised", "dense") for tuned in report] == [True, True]
    assert_close(step(model, x), step(other, x))


# ---- parts ----

@each_type
def test_changes_of_basis(name):
    t = field_type(name)
    change, values = changes_of_basis(t), random(t.size)
    want = torch.cat([torch.from_numpy(r.change_of_basis_inv) @ part for r, part in zip(
        t.representations, values.split([r.size for r in t.representations]))])
    assert_close([change.to_irreps(values), change.to_fields(want)], [want, values], 1e-14)
    assert changes_of_basis(t) is change and change.is_orthogonal and not change.is_split


def test_plans_in_irreps_keep_the_weights():
    t = field_type("C4, mixed")
    plan = convolution(t, t).plan
    assert plan.in_irreps(False, False) is plan and plan.in_irreps(True, False) is plan.in_irreps(True, False)
    other = plan.in_irreps(True, True)
    assert isinstance(other, FilterPlan) and other.weights == plan.weights and other.separates() == (True, True)
    assert np.array_equal(other.harmonics, plan.harmonics)


@pytest.mark.parametrize("shape", [(3, 5, 4, 3), (2, 3, 3, 3, 3)])
def test_gradients_of_moments(shape):
    fields = torch.tensor([[0, shape[1], -1]])
    x = random(*shape).requires_grad_()
    moments = equiconv.nn.synchronised.Moments.apply
    var, mean = torch.var_mean(x, [0, *range(2, len(shape))], correction=0)
    assert_close([t.detach() for t in moments(x, fields)], [mean.detach(), var.detach()])
    assert torch.autograd.gradcheck(lambda x: moments(x, fields), x)
    assert torch.autograd.gradgradcheck(lambda x: moments(x, fields), x)


class Residual(nn.SequentialModule):
    def forward(self, x):
        return x + super().forward(x)


def test_classes_of_the_users_own_stay_whole():
    g = gspaces.rot2dOnR2(4)
    t = of(g, g.regular_repr, g.regular_repr)
    model = nn.SequentialModule(convolution(images_of(t), t), Residual(convolution(t, t)), convolution(t, images_of(t)))
    x = input_of(model.double(), (5, 4))
    want = model(x).tensor
    assert torch.equal(equiconv.accelerate(model, irrep_domain=True)(x).tensor, want)
    model = chain(t, nn.IdentityModule).double()
    model[1].forward = lambda x: x + x
    want = model(x).tensor
    assert torch.equal(equiconv.accelerate(model, irrep_domain=True)(x).tensor, want)
