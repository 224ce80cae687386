"""Networks by name, the same with escnn's layers and with equiconv's; and the check of their equivariance."""
import functools
import warnings

import escnn.nn
import numpy as np
import pytest
import torch
from escnn import group, gspaces

import equiconv.nn
from equiconv import models
from equiconv.models import registry
from equiconv.models.complexity import complexity
from equiconv.models.e2wrn import WideBlock
from equiconv.models.p4_cnn import all_taps
from equiconv.testing import EquivarianceWarning, check_equivariance
from tests import networks
from tests.networks import CONVENTIONAL, EVERY

SMALL = {"widths": (2, 2, 2, 3, 3, 3), "hidden": 8, "classes": 4}
size_of = functools.cache(models.complexity)


pytestmark = pytest.mark.usefixtures("one_thread")


def misfits(module, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EquivarianceWarning)
        result = check_equivariance(module, **options)
    assert [str(w.message) for w in caught if w.category is EquivarianceWarning] == result.warnings
    return result


def test_registry():
    assert "c8_steerable_cnn" in models.names()
    assert "ICLR 2022" in models.citation("c8_steerable_cnn")
    assert (models.group("p4m_cnn"), models.twin("p4m_cnn")) == ("D4", None)
    assert (models.group("z2_cnn_p4m"), models.twin("z2_cnn_p4m")) == ("", ("p4m_cnn", "parameters"))
    assert models.citation("z2_cnn_p4m") == "conventional twin of p4m_cnn, of equal parameters"
    assert all(bool(models.group(name)) != bool(models.twin(name)) for name in models.names())
    assert all(models.input_shape(name) == models.input_shape(models.twin(name)[0])
               for name in models.names() if models.twin(name))
    with pytest.raises(ValueError, match="no model 'resnet'; there are .*c8_steerable_cnn"):
        models.create("resnet")
    with pytest.raises(ValueError, match="no option 'depth'; it has .*widths"):
        models.create("c8_steerable_cnn", depth=3)


def test_complexity_is_that_of_the_arithmetic():
    """Against a count by hand: a steerable convolution with a stride, one dense with groups, a linear layer."""
    plane = gspaces.rot2dOnR2(4)
    fields, regular = plane.type(plane.trivial_repr), plane.type(*2 * [plane.regular_repr])

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = equiconv.nn.R2Conv(fields, regular, 3, stride=2, bias=False)  # 9 x 9 -> 4 x 4
            self.dense = torch.nn.Conv2d(8, 4, (2, 3), groups=2)  # -> 3 x 2
            self.linear = torch.nn.Linear(24, 5)

        def forward(self, x):
            return self.linear(self.dense(self.conv(fields(x)).tensor).flatten(1))

    model = Small()
    weights = sum(p.numel() for p in model.parameters())
    model.linear.bias.requires_grad_(False)
    result = complexity(model, (1, 9, 9))
    assert result.macs == 8 * 9 * 16 + 4 * 4 * 6 * 6 + 24 * 5
    assert result.parameters == weights - 5


@pytest.mark.parametrize("name,parameters,gmacs", [
    ("c8_steerable_cnn", 2.07, 4.0), ("e2sfcnn", 2.69, 7.70), ("se3_cnn", 0.229, 8.07), ("e2wrn10_4", 1.06, 2.435),
    ("e2wrn28_10", 37.2, 98.4), ("wrn28_10", 36.5, 5.95), ("deeplense_c4_cnn", 3.6, 23.4), ("exp_e2sfcnn", 1.2, 3.5),
])
def test_complexity_at_the_published_sizes(name, parameters, gmacs):
    found = size_of(name)
    assert found.parameters / 1e6 == pytest.approx(parameters, rel=5e-3)
    assert found.macs / 1e9 == pytest.approx(gmacs, rel=5e-3)


TWINS = {"c8_steerable_cnn": "cnn", "deeplense_c4_cnn": "deeplense_cnn", "e2sfcnn": "e2sf_cnn", "se3_cnn": "cnn_3d",
         "exp_e2sfcnn": "exp_e2sf_cnn", "p4_cnn": "z2_cnn", "p4m_cnn": "z2_cnn_p4m", "hnet": "hnet_cnn",
         "equivariant_transformer": "et_cnn", "equivariant_mlp": "plain_mlp",
         **{f"e2{name}": name for name in ("wrn10_4", "wrn16_8", "wrn28_7", "wrn28_10")}}


@pytest.mark.parametrize("name,twin", TWINS.items())
def test_twins_of_equal_parameters(name, twin):
    assert size_of(twin).parameters == pytest.approx(size_of(name).parameters, rel=0.15)


@pytest.mark.parametrize("name,twin", [item for item in TWINS.items() if item[0] not in (
    "hnet", "equivariant_transformer", "p4m_cnn")])
def test_twins_of_equal_width(name, twin):
    """The dense filters of both have the same shapes, but for the last: e2wrn has an odd scalar field more, and a sum
    of invariants in the head is a maximum over the group in steerable networks."""
    assert size_of(f"{twin}_wide").macs == pytest.approx(size_of(name).macs, rel=2e-3)


@pytest.mark.parametrize("name,top,more", [("hnet", 25 * 128 * 10 * 7 * 7, 3), ("p4m_cnn", 16 * 56 * 10, 7)])
def test_twin_of_the_width_but_for_the_top(name, top, more):
    """The last convolution has more outputs for each of the twin's: a complex one of each order, one for each element
    of the group."""
    assert size_of(name).macs == size_of(f"{TWINS[name]}_wide").macs + more * top


def test_twin_of_the_width_of_the_transformer():
    """It is its CNN."""
    alone = models.create("equivariant_transformer", transformations=())
    twin = models.create("et_cnn_wide")
    assert alone.state_dict().keys() == twin.state_dict().keys()
    assert all(v.shape == twin.state_dict()[k].shape for k, v in alone.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVENTIONAL)
def test_twins_compiled(name):
    model, images = networks.build(name), networks.images(name)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONVENTIONAL)
def test_twins_are_not_invariant(name):
    model, images = networks.build(name), networks.images(name)
    for _ in range(5):  # statistics of batches
        model(images)
    space = gspaces.rot2dOnR2(4) if images.dim() == 4 else gspaces.octaOnR3()
    fields = space.type(*images.shape[1] * [space.trivial_repr])
    assert misfits(model, in_type=fields, input_size=images.shape[-1]).max_exact > 1e-2


def test_e2wrn_of_escnns_example():
    with torch.device("meta"):
        model = models.create("e2wrn28_10", kernels=(5, 3, 5))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(79.7, abs=0.05)


def test_published_sizes(monkeypatch):
    monkeypatch.setattr(escnn.nn.init, "generalized_he_init", lambda *_: None)  # takes seconds
    model = models.create("c8_steerable_cnn", nn=escnn.nn)
    convolutions = [m for m in model.modules() if isinstance(m, escnn.nn.R2Conv)]
    assert [len(c.out_type) for c in convolutions] == [24, 48, 48, 96, 96, 64]
    assert [c.kernel_size for c in convolutions] == [7, 5, 5, 5, 5, 5]
    assert sum(c.weights.numel() for c in convolutions) > 2.0e6  # 2.07 M with the head
    shape = (1, 1, 29, 29)
    for layer in model.features:
        shape = layer.evaluate_output_shape(shape)
    assert shape == (1, 64, 1, 1)


@pytest.mark.parametrize("order", [4, 8])
def test_same_network_from_both_namespaces(order):
    torch.manual_seed(0)
    original = models.create("c8_steerable_cnn", nn=escnn.nn, order=order, **SMALL)
    model = models.create("c8_steerable_cnn", order=order, **SMALL)  # equiconv.nn
    assert any(isinstance(m, tuple(equiconv.nn.ACCELERATED.values())) for m in model.modules())
    assert not any(isinstance(m, tuple(equiconv.nn.ACCELERATED.values())) for m in original.modules())
    model.load_state_dict(original.state_dict())
    images = torch.randn(3, 1, 29, 29)
    expected, got = original(images), model(images)  # in training mode: batch statistics
    assert got.shape == (3, 4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()
    gradients = {name: p.grad for name, p in original.named_parameters() if p.requires_grad}
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients.pop(name), rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert not gradients


def test_every_network_is_tested():
    """Below; ExpE2SFCNN with all its options in a file of its own."""
    def function(name):
        build = registry._find(name).build
        return getattr(build, "func", build)
    tested = {function(name) for name in [*EVERY, "exp_e2sfcnn"]}
    assert {name for name in models.names() if function(name) not in tested} == set()


@pytest.mark.parametrize("name", EVERY)
def test_every_network_from_both_namespaces(name):
    original, model = networks.build(name, escnn.nn), networks.build(name)
    model.load_state_dict(original.state_dict())
    images = networks.images(name)
    for training in (True, False):
        original.train(training), model.train(training)
        torch.testing.assert_close(model(images), original(images), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name,weights", [("e2sfcnn", 2.69e6), ("se3_cnn", 0.229e6)])
def test_published_weights(name, weights, monkeypatch):
    monkeypatch.setattr(escnn.nn.init, "generalized_he_init", lambda *_, **__: None)  # takes minutes
    model = models.create(name, nn=escnn.nn)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / weights, 2) == 1


@pytest.mark.parametrize("name,options,match", [
    ("e2sfcnn", {"image_size": 9}, "leaves no pixel after layer 2"), ("e2sfcnn", {"widths": (2, 2)}, "six widths"),
    ("e2sfcnn", {"kernels": (9, 7, 6, 7, 7, 5)}, "must be odd"),
    ("p4_cnn", {"image_size": 27}, "must be even"),
    ("p4_cnn", {"image_size": 26}, "leaves 3 pixels.*28 is the smallest"),
    ("se3_cnn", {"image_size": 32}, "odd number: 33 would do"), ("se3_cnn", {"image_size": 17}, "leaves 2 voxels"),
    ("se3_cnn", {"widths": (1,)}, "as many samples as widths"),
    ("e2wrn28_10", {"depth": 20}, "10, 16, 22, 28, ..., got 20"), ("e2wrn28_10", {"group": "O2"}, "got 'O2'"),
    ("e2wrn28_10", {"kernels": (3, 4, 3)}, "three odd numbers"),
    ("e2wrn28_10", {"restricted": ("D4",)}, "groups of two stages, got 1"),
    ("e2wrn28_10", {"restricted": ("C4", "C1")}, "must be a subgroup.*got D8, C4, C1"),
    ("e2wrn28_10", {"restricted": ("D4", "D8")}, "must be a subgroup.*got D8, D4, D8"),
])
def test_sizes_that_do_not_fit(name, options, match):
    with pytest.raises(ValueError, match=match):
        models.create(name, **options)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_of_training(name):
    model = networks.build(name)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    before = {k: p.detach().clone() for k, p in trained.items()}
    outputs = model(networks.images(name))
    outputs = outputs.flatten(2).mean(2) if outputs.dim() > 2 else outputs  # of a segmentation: over the voxels
    loss = torch.nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 2]))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert loss.isfinite()
    for k, p in trained.items():
        assert p.isfinite().all()
        assert k.endswith("bias") or not torch.equal(p, before[k]), k  # before a batch norm, a bias has no effect


@pytest.mark.parametrize("group,restricted,kernels", [
    ("D8", ("D4", "D1"), [5, 3, 3]), ("C8", ("C4", "C1"), [5, 3, 3]), ("D4", ("D4", "D2"), [3, 3, 3]),
    ("D1", ("D1", "D1"), [3, 3, 3]), ("C6", ("C3", "C3"), [5, 5, 5]),
])
def test_e2wrn_by_stage(group, restricted, kernels):
    model = models.create("e2wrn28_10", group=group, restricted=restricted, depth=10, widening=1).eval()
    blocks = [m for m in model.features if isinstance(m, WideBlock)]
    assert [block.residual[0].kernel_size for block in blocks] == kernels
    rotations = [block.residual[0].in_type.gspace.rotations_order for block in blocks]
    assert [group, *restricted] == [f"{group[0]}{n}" for n in rotations]
    assert model(torch.randn(2, 3, 9, 9)).shape == (2, 10)


def test_e2wrn_is_equivariant_to_the_last_group():
    model = networks.build("e2wrn28_10")
    d8 = model.in_type.fibergroup
    kept, lost = d8.element((1, 0)), d8.element((0, 2))  # a reflection, a rotation by 90 degrees
    result = misfits(model, input_size=33, elements=[kept, lost])
    assert result.exact == {kept, lost}
    assert result.errors[kept] < 1e-5 < 1e-3 < result.errors[lost]
    assert misfits(networks.build("e2wrn10_4"), input_size=33).max < 1e-5  # D4 throughout


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("space", [gspaces.rot2dOnR2(4), gspaces.flipRot2dOnR2(4)], ids=str)
def test_p4_filters_are_all_of_a_group_convolution(space, kernel):
    """Between two regular fields: one free filter for each element of the group."""
    fields = space.type(space.regular_repr)
    conv = equiconv.nn.R2Conv(fields, fields, kernel, bias=False, initialize=False, **all_taps(kernel))
    filters = torch.func.vmap(lambda w: conv.basisexpansion(w).flatten())(torch.eye(conv.weights.numel()))
    assert torch.linalg.matrix_rank(filters) == space.fibergroup.order() * kernel ** 2


@pytest.mark.parametrize("name", ["p4_cnn", "p4m_cnn"])
def test_p4_networks_are_invariant_to_the_whole_group(name):
    result = misfits(networks.build(name))
    assert len(result.exact) == len(result.errors) == (3 if name == "p4_cnn" else 7)
    assert result.max < 1e-5


def test_equivariant_mlp():
    """From both namespaces; compiled; a step of training; equivariant exactly to the rotations of the grids' cube, and
    to others within the error of sampling."""
    torch.manual_seed(0)
    original, model = (models.create("equivariant_mlp", nn, frequencies=(1, 2, 2, 2)) for nn in (escnn.nn, None))
    model.load_state_dict(original.state_dict())
    x = torch.randn(8, 3)
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    before = model.layers[0].weights.detach().clone()
    loss = model(x).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert loss.isfinite() and not torch.equal(model.layers[0].weights, before)

    model.eval()
    rotations = model.in_type.fibergroup
    elements = {"cube": list(rotations.grid("cube")), "others": list(rotations.grid("rand", 8))}
    errors = {}
    for kind, chosen in elements.items():
        expected = torch.cat([model.out_type(model(x)).transform(g).tensor for g in chosen])
        got = torch.cat([model(model.in_type(x).transform(g).tensor) for g in chosen])
        errors[kind] = ((got - expected).norm() / expected.norm()).item()
    assert errors["cube"] < 1e-5 < errors["others"] < 0.1
    with pytest.raises(ValueError, match="as many frequencies"):
        models.create("equivariant_mlp", widths=(3, 8))


def test_weights_follow_torchs_generator():
    """Also those of initialisations that draw from NumPy's, which goes on as if nothing had been drawn."""
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(models.create("e2wrn28_10", depth=10, widening=1))
    assert np.random.rand() == expected  # noqa: NPY002
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in built)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("name", ["e2sfcnn", "e2wrn10_4", "p4_cnn", "p4m_cnn", "se3_cnn"])
def test_networks_are_invariant(name):
    model = networks.build(name).eval()
    images = networks.images(name)
    turned = images.rot90(1, (2, 3))
    torch.testing.assert_close(model(turned), model(images), rtol=1e-3, atol=1e-4)


def test_options_change_the_network():
    model = models.create("c8_steerable_cnn", in_channels=3, image_size=37, **SMALL)
    assert model(torch.randn(2, 3, 37, 37)).shape == (2, 4)
    with pytest.raises(ValueError, match="image size 28 .*near it, .*29.* would do"):
        models.create("c8_steerable_cnn", image_size=28, **SMALL)
    with pytest.raises(ValueError, match="must be odd"):
        models.create("c8_steerable_cnn", kernels=(7, 4, 5, 5, 5, 5), **SMALL)
    with pytest.raises(ValueError, match="six widths"):
        models.create("c8_steerable_cnn", widths=(2, 2))


def test_check_of_an_invariant_model():
    model = models.create("c8_steerable_cnn", **SMALL).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = misfits(model)
    assert len(result.errors) == 7 and len(result.exact) == 3
    assert result.passed and result.max_exact < 1e-5 < result.max_interpolated < 0.3
    assert result.warnings == []
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "rotation by 90 deg" in str(result) and "interpolated" in str(result)
    assert not check_equivariance(model, tolerance=1e-5).passed  # interpolated elements count then


def test_check_notices_a_conventional_network():
    plain = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 81, 3))
    result = check_equivariance(plain, input_size=11)
    assert not result.passed and result.max_exact > 1e-2


def test_check_of_fields():
    """The answer is a field, and must turn with the input: a scalar field that stands still would be wrong."""
    plane = gspaces.flipRot2dOnR2(4)
    scalar, vector = plane.type(plane.trivial_repr), plane.type(plane.irrep(1, 1))
    conv = escnn.nn.R2Conv(scalar, vector, 5, padding=2)
    result = check_equivariance(conv, input_size=15)
    assert len(result.errors) == 7 and result.exact == set(result.errors) and result.max < 1e-5

    class Twisted(escnn.nn.R2Conv):
        def forward(self, x):
            return self.out_type(super().forward(x).tensor.flip(1))  # exchanges the components of the vector

    assert check_equivariance(Twisted(scalar, vector, 5, padding=2), input_size=15).max > 0.1


def test_check_without_a_base_space():
    space = gspaces.no_base_space(group.so3_group(1))
    fields = space.type(*[space.irrep(1)] * 2)
    result = check_equivariance(escnn.nn.Linear(fields, fields))
    assert result.exact == set(result.errors) and result.max < 1e-5


def test_check_continuous_group_and_elements():
    plane = gspaces.rot2dOnR2(-1)
    fields = plane.type(plane.irrep(1))
    conv = equiconv.nn.R2Conv(fields, fields, 5, padding=2)
    assert len(check_equivariance(conv).errors) == 16
    elements = [plane.fibergroup.element(angle) for angle in (0.3, torch.pi / 2)]
    result = check_equivariance(conv, elements=elements)
    assert list(result.errors) == elements and result.exact == {elements[1]}
    assert result.max_exact < 1e-5 < result.max_interpolated < 0.1


def test_warning_says_what_to_mend():
    plane = gspaces.rot2dOnR2(8)
    fields = plane.type(plane.regular_repr)
    pool = escnn.nn.SequentialModule(escnn.nn.R2Conv(fields, fields, 3, padding=1),
                                     escnn.nn.PointwiseMaxPool2D(fields, 3, 2, 1))
    bad = misfits(pool, input_size=16)
    assert not bad.passed
    assert "kernel 3, stride 2, padding 1 on 16 pixels" in bad.warnings[0]
    assert "(size + 2*padding - kernel) % stride == 0" in bad.warnings[0]
    assert "13, 15, 17" in bad.warnings[0]
    assert "Antialiased" in bad.warnings[1]  # C8 has elements off the grid
    good = misfits(pool, input_size=17)
    assert good.max_exact < 1e-5 and len(good.warnings) == 1
    smooth = escnn.nn.PointwiseMaxPoolAntialiased2D(fields, 2, 2)  # an even kernel, then a strided blur
    results = [misfits(smooth, input_size=n) for n in (15, 16)]
    assert [bool(r.warnings) for r in results] == [r.max_exact > 1e-3 for r in results] == [True, False]


def test_bad_arguments():
    plane = gspaces.rot2dOnR2(4)
    fields, other = plane.type(plane.regular_repr), plane.type(plane.trivial_repr)
    relu = escnn.nn.ReLU(fields)
    with pytest.raises(ValueError, match="in_type"):
        check_equivariance(relu, in_type=other)
    with pytest.raises(ValueError, match="input_size"):
        check_equivariance(relu, input_size=(8, 9))
    with pytest.raises(ValueError, match="elements"):
        check_equivariance(relu, elements=[group.cyclic_group(8).element(1)])
    class Two(torch.nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="one tensor, got tuple"):
        check_equivariance(Two(), input_size=8)
