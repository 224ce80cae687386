"""Every option of ExpE2SFCNN: with both libraries' layers, its invariance, a step of training."""
import escnn.nn
import pytest
import torch

import equiconv.nn
from equiconv import models
from equiconv.models.complexity import complexity
from equiconv.models.exp_e2sfcnn import FIELDS, commutes_with_i
from equiconv.testing import check_equivariance

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*without antialiasing")]

SMALL = {"fixed_parameters": False, "widths": (2, 2, 2, 2, 2, 4), "kernels": 6 * (3,), "paddings": 6 * (1,),
         "hidden": 8, "image_size": 12, "classes": 3, "frequency": 1}
QUICK = {("regular", "D4"), ("vectorfield", "C4"), ("squash", "SO2"), ("gated_norm", "SO2"), ("sharednorm2", "SO2"),
         ("inducedgated_norm", "O2")}
REFLECTIONS_TOO = ("inducedhnet_conv", "inducedgated_conv", "inducedgated_norm")
OPTIONS = [*QUICK, *((name, "O2" if name in REFLECTIONS_TOO else "SO2" if name.startswith(("real", "h", "s", "g", "f"))
                      and name != "scalarfield" else "C4") for name in FIELDS), ("gated_conv", "D4"),
           ("hnet_conv", "O2"), ("quotient", "D4"), ("quotient", "C6"), ("gated_conv_shared", "O2")]
OPTIONS = [pytest.param(*option, marks=[] if option in QUICK else pytest.mark.slow)
           for option in sorted(dict.fromkeys(OPTIONS))]


def build(name, group, nn=None, **options):
    torch.manual_seed(0)
    model = models.create("exp_e2sfcnn", nn, fields=name, group=group, **(SMALL | options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("log_bias"):  # norms below exp(0) = 1 would all be 0, or most
                parameter.fill_(-2)
    return model


@pytest.mark.parametrize("name,group", OPTIONS)
def test_option(name, group):
    original, model = build(name, group, escnn.nn), build(name, group)
    assert any(isinstance(m, tuple(equiconv.nn.ACCELERATED.values())) for m in model.modules())
    model.load_state_dict(original.state_dict())
    images = 3 * torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for training in (True, True, True, False):
        original.train(training), model.train(training)
        torch.testing.assert_close(model(images), original(images), rtol=1e-3, atol=1e-4)

    answers = model(images)
    spread = answers.std(0).mean().item()
    assert spread > 1e-3  # so that invariance says something
    turned = [images.rot90(1, (2, 3)), images.flip(2)] if group[0] in "DO" else [images.rot90(1, (2, 3))]
    if group != "C6":
        for image in turned:
            assert (model(image) - answers).abs().max().item() < 1e-4 * spread + 1e-6
    if group[0] in "CS" and name != "trivial":  # scalars' kernels are round, whatever the group
        assert (model(images.flip(2)) - answers).abs().max().item() > 1e-2 * spread

    model.train()
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    loss = torch.nn.functional.cross_entropy(model(images), torch.arange(8) % 3)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before]
    assert sum(moved) > 0.8 * len(moved)  # before a batch norm, a bias has no effect


def test_error_of_sampling():
    """Rotations off the grid: within what interpolation makes of the images, and larger for another group."""
    options = {"kernels": 6 * (5,), "paddings": 6 * (2,), "image_size": 36}
    c8, c4 = build("regular", "C8", **options), build("regular", "C4", **options)
    eighth = [g for g in c8.in_type.fibergroup.elements if g != c8.in_type.fibergroup.identity]
    result = check_equivariance(c8, elements=eighth)
    assert result.max_exact < 1e-5 < result.max_interpolated < 0.2
    assert len(result.exact) == 3 and len(result.errors) == 7
    assert check_equivariance(c4, in_type=c4.in_type).max < 1e-5


@pytest.mark.parametrize("name,group,restricted,where", [
    ("regular", "D4", (3, "C4"), "R2Conv"), ("gated_norm", "O2", (2, "SO2"), "MultipleModule"),
    *(pytest.param(*option, marks=pytest.mark.slow) for option in (
        ("regular", "C4", (1, "C1"), "R2Conv"),
        ("quotient", "D4", (2, "C4"), "R2Conv"),
        ("vectorfield", "C8", (3, "C4"), "VectorFieldNonLinearity"), ("regvector", "C8", (5, "C4"), "MultipleModule"),
        ("hnet_conv", "O2", (5, "SO2"), "R2Conv"), ("hnet_norm", "D4", (5, "C4"), "R2Conv"),
        ("sharednorm", "O2", (3, "SO2"), "R2Conv"), ("sharednorm2", "O2", (3, "SO2"), "R2Conv"),
        ("gated_conv", "D4", (5, "C4"), "MultipleModule"), ("gated_norm_shared", "O2", (4, "SO2"), "MultipleModule"),
        ("inducedgated_norm", "D8", (2, "D4"), "MultipleModule"),
        ("inducedhnet_conv", "D8", (5, "D4"), "MultipleModule")))])
def test_restriction(name, group, restricted, where):
    """As published: the convolution of that layer is of the larger group, and all that follows it of the smaller; but
    gates and induced fields. Invariant to the smaller group's rotations, and no more to the larger one's elements."""
    original = build(name, group, escnn.nn, restricted=restricted)
    model = build(name, group, restricted=restricted)
    model.load_state_dict(original.state_dict())
    images = 3 * torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for training in (True, True, False):
        original.train(training), model.train(training)
        torch.testing.assert_close(model(images), original(images), rtol=1e-3, atol=1e-4)
    answers = model(images)
    spread = answers.std(0).mean().item()
    assert spread > 1e-3
    if restricted[1] != "C1":
        assert (model(images.rot90(1, (2, 3))) - answers).abs().max() < 1e-4 * spread + 1e-6
    if group[0] in "DO" and restricted[1][0] in "CS":
        assert (model(images.flip(2)) - answers).abs().max() > 1e-2 * spread
    modules = list(model.features)
    place = next(i for i, m in enumerate(modules) if isinstance(m, escnn.nn.RestrictionModule))
    assert type(modules[place - 1]).__name__ == where
    convolutions = [isinstance(m, escnn.nn.R2Conv) for m in modules]
    assert sum(convolutions[:place]) == restricted[0] and sum(convolutions) == 6
    orders = {m.out_type.fibergroup.order() for m in modules[place + 1:]}
    assert len(orders) == 1 and orders != {model.in_type.fibergroup.order()} or group == "O2"


@pytest.mark.parametrize("name,group", [("regular", "C8"), ("vectorfield", "C8"),
                                        *(pytest.param(*option, marks=pytest.mark.slow) for option in (
                                            ("squash", "SO2"), ("gated_norm", "D4")))])
def test_fixed_parameters(name, group):
    """The third to fifth convolution have as many weights as with regular fields of C16, up to whole widths."""
    options = {"fields": name, "group": group, "frequency": 2, "kernels": 6 * (3,), "paddings": 6 * (1,)}
    weights = []
    with torch.device("meta"):
        for given in (options, options | {"fields": "regular", "group": "C16"}):
            model = models.create("exp_e2sfcnn", **given)
            weights.append([m.weights.numel() for m in model.modules() if isinstance(m, escnn.nn.R2Conv)][2:5])
    for own, reference in zip(*weights):
        assert own == pytest.approx(reference, rel=0.15)


def test_published_size():
    found = models.complexity("exp_e2sfcnn")
    assert found.parameters / 1e6 == pytest.approx(1.20, abs=5e-3) and found.macs / 1e9 == pytest.approx(3.5, abs=0.05)


def test_kernels_of_harmonic_networks():
    """realhnet: half as many kernels between complex irreps; realhnet2 is wider for that."""
    assert commutes_with_i({"in_irrep": (1,), "out_irrep": (2,), "irrep:frequency": 1})
    assert not commutes_with_i({"in_irrep": (1,), "out_irrep": (2,), "irrep:frequency": 3})
    options = {"group": "SO2", "fixed_parameters": True, "widths": 6 * (4,)}
    with torch.device("meta"):
        found = {name: complexity(models.create("exp_e2sfcnn", fields=name, **(SMALL | options)), (1, 12, 12))
                 for name in ("hnet_conv", "realhnet", "realhnet2")}
    assert found["realhnet"].macs == found["hnet_conv"].macs < found["realhnet2"].macs
    assert found["realhnet"].parameters < found["hnet_conv"].parameters


@pytest.mark.parametrize("options,match", [
    ({"fields": "norm"}, "must be one of regular, quotient, .*got 'norm'"),
    ({"group": "SO2"}, "'regular' need a group with finitely many rotations"),
    ({"group": "X4"}, "must be C or D"), ({"fields": "vectorfield", "group": "D4"}, "no reflections"),
    ({"fields": "inducedhnet_conv", "group": "SO2"}, "need a group with reflections"),
    ({"fields": "realhnet", "group": "C8"}, "all rotations"), ({"fields": "quotient", "group": "C5"}, "even"),
    ({"restricted": (6, "C4")}, "layer from 1 to 5, got 6"), ({"restricted": (2, "C6")}, "subgroup of C16, got 'C6'"),
    ({"restricted": (2, "D4")}, "subgroup of C16, got 'D4'"), ({"image_size": 20}, "no pixel after layer 6"),
])
def test_what_does_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        models.create("exp_e2sfcnn", **options)
