"""Harmonic convolutions beside escnn's steerable ones, and the harmonic network."""
import copy

import escnn.nn
import pytest
import torch
from escnn import gspaces

import equiconv.nn
from equiconv import autotuning, models
from equiconv.models.harmonic import RING_WIDTH, HarmonicConv, ModulusBatchNorm, ModulusReLU, complex_fields, modulus
from equiconv.testing import check_equivariance

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*without antialiasing")]

PLANE = gspaces.rot2dOnR2(-1, maximum_frequency=2)
KERNEL, RINGS = 5, 3
REAL = PLANE.type(PLANE.trivial_repr)


def fields(*orders, channels=1):
    return complex_fields(escnn.nn, PLANE, orders, channels)


def span(filters, tolerance=1e-4):
    """[rank, n], an orthonormal basis of the rows' span."""
    _, values, rows = torch.linalg.svd(filters.double(), full_matrices=False)
    return rows[values > tolerance * values.max()]


def steerable(in_type, out_type):
    """[dimension, C out, C in, taps]: all kernels of escnn's convolution on the same rings."""
    conv = escnn.nn.R2Conv(in_type, out_type, KERNEL, bias=False, initialize=False, sigma=RINGS * [RING_WIDTH],
                           rings=torch.linspace(0, KERNEL // 2, RINGS).tolist(), frequencies_cutoff=lambda r: 5.0)
    return torch.stack([conv.basisexpansion(w) for w in torch.eye(conv.weights.numel())])


@pytest.mark.parametrize("in_type,out_type", [
    (REAL, fields(0)), (REAL, fields(1)), (fields(0), fields(1)), (fields(1), fields(0)), (fields(1), fields(1)),
    (fields(2), fields(1)), (fields(1), fields(2)), (fields(0), fields(0)),
], ids=str)
def test_filters_span_the_complex_linear_ones_of_escnn(in_type, out_type):
    """Over all profiles and phases: exactly those steerable kernels that commute with the multiplication by i."""
    torch.manual_seed(0)
    conv = HarmonicConv(in_type, out_type, KERNEL, rings=RINGS)
    drawn = []
    for _ in range(40):
        torch.nn.init.normal_(conv.profile), torch.nn.init.uniform_(conv.phase, 0, 6)
        drawn.append(conv.filter().flatten())
    got, kernels = span(torch.stack(drawn).detach()), steerable(in_type, out_type)
    if in_type != REAL:
        i = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        kernels = (kernels - torch.einsum("ab,nbct,cd->nadt", i, kernels, i)) / 2
    expected = span(kernels.flatten(1))
    assert len(got) == len(expected) == 2 * RINGS
    torch.testing.assert_close(got.T @ got, expected.T @ expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("in_type,out_type,phase", [
    (REAL, fields(0, 1, 2, channels=3), True), (fields(0, 1, channels=2), fields(0, 1, 2, channels=3), True),
    (fields(2, channels=2), fields(0, 1), False),
], ids=["real", "complex", "phaseless"])
def test_factorised(in_type, out_type, phase, dtype):
    """The filter, output and gradients of the dense convolution, by the method of steerable ones."""
    torch.manual_seed(0)
    conv = HarmonicConv(in_type, out_type, KERNEL, padding=2, phase=phase)
    plain = HarmonicConv(in_type, out_type, KERNEL, padding=2, phase=phase, factorised=False)
    plain.load_state_dict(conv.state_dict())
    conv, plain = conv.to(dtype), plain.to(dtype)
    conv.method = "factorised"
    filter = equiconv.ops.expand_filter(conv.steerable_weights(), conv._steerable.plan, (KERNEL, KERNEL))
    torch.testing.assert_close(filter, plain.filter(), rtol=1e-4, atol=1e-5)
    x = torch.randn(2, in_type.size, 9, 9, dtype=dtype)
    found = []
    for layer in (conv, copy.deepcopy(conv), plain):
        y = layer(in_type(x)).tensor
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        found.append([y, *(p.grad for p in layer.parameters())])
    assert len(found[0]) == (3 if phase else 2)
    for got in found[:2]:
        for a, b in zip(got, found[2]):
            assert (a - b).norm() < 1e-5 * b.norm()


def test_method():
    conv, plain = (HarmonicConv(REAL, fields(0, 1), KERNEL, factorised=factorised) for factorised in (True, False))
    model = torch.nn.Sequential(conv, plain)
    assert (conv.method, plain.method) == ("auto", "dense")
    equiconv.accelerate(model, method="factorised")
    assert (conv.method, plain.method) == ("factorised", "dense")
    with pytest.raises(ValueError, match="always dense"):
        plain.method = "factorised"
    with pytest.raises(ValueError, match="method must be"):
        conv.method = "quick"


@pytest.mark.parametrize("train", [True, False])
def test_autotune(monkeypatch, train):
    """Measures what the model computes with, in its mode; what is always dense has no choice."""
    model = torch.nn.Sequential(HarmonicConv(REAL, fields(0, 1), KERNEL), HarmonicConv(fields(0, 1), fields(1), KERNEL),
                                HarmonicConv(fields(1), fields(0), KERNEL, factorised=False)).train(train)
    equiconv.accelerate(model[:2], method="dense")
    called, factorised = [], type(model[0].planned).factorised
    monkeypatch.setattr(type(model[0].planned), "factorised", lambda self, x, *arguments: called.append(
        (self, x.requires_grad)) or factorised(self, x, *arguments))
    monkeypatch.setattr(autotuning, "time_of", lambda function, *_: function() or len(called))
    report = equiconv.autotune(model, REAL(torch.randn(2, 1, 13, 13)))
    assert [t.name for t in report] == ["0", "1"]  # each is factorised first, when `called` is shorter
    assert called == [(conv.planned, train) for conv in model[:2]]
    assert all(t.seconds == {"factorised": i, "dense": i} for i, t in enumerate(report, 1))
    assert report[1].input_shape == (2, 4, 9, 9) and all(conv.method == "factorised" for conv in model[:2])


@pytest.mark.parametrize("train,work", [(True, "a training step"), (False, "inference")])
def test_plan_of_the_mode(train, work):
    conv = HarmonicConv(REAL, fields(0, 1), KERNEL).train(train)
    with torch.no_grad():
        conv(REAL(torch.randn(2, 1, 9, 9)))
    assert f"estimated for {work}" in conv.planned.plan_report().reason


def test_acceleration_report():
    model = torch.nn.Sequential(HarmonicConv(REAL, fields(0, 1), KERNEL), ModulusReLU(fields(0, 1)))
    assert [(row.status, row.reason, row.method) for row in equiconv.acceleration_report(model)] == [
        ("accelerated", "", "auto"), ("left", "plain torch", "")]


def test_filters_are_those_of_the_paper():
    """R(r) e^(i (m p + b)), tap by tap; between all orders, the same R and b for the same m."""
    torch.manual_seed(0)
    in_type, out_type = fields(0, 1, channels=2), fields(0, 1, 2, channels=3)
    conv = HarmonicConv(in_type, out_type, KERNEL, rings=RINGS)
    assert conv.profile.shape == (4, 3, 2, RINGS)  # m = -1, 0, 1, 2
    filters = conv.filter().detach().reshape(3, 3, 2, 2, 2, 2, KERNEL, KERNEL)  # [order, field, part] of out, of in
    for o, i, out, into in ((0, 0, 1, 0), (0, 1, 2, 1), (1, 0, 0, 1), (1, 1, 2, 0), (2, 0, 1, 1)):
        m = o - i
        for row, column in ((0, 0), (1, 4), (2, 3), (3, 1)):
            x, y = column - 2, 2 - row
            value = sum(conv.profile[m + 1, out, into, ring] * torch.complex(
                *conv.harmonics[:, m + 1, ring, row, column]) for ring in range(RINGS))
            radial = value * torch.exp(-1j * m * torch.atan2(torch.tensor(float(y)), torch.tensor(float(x))))
            assert abs(radial.imag) < 1e-5
            value = value * torch.exp(1j * conv.phase[m + 1, out, into])
            expected = torch.stack([torch.stack([value.real, -value.imag]), torch.stack([value.imag, value.real])])
            torch.testing.assert_close(filters[o, out, :, i, into, :, row, column], expected.detach())


def test_phase_is_a_rotation_of_the_output():
    torch.manual_seed(0)
    conv = HarmonicConv(fields(0), fields(0, 1), KERNEL)
    x = torch.randn(2, 2, 9, 9)
    before = torch.view_as_complex(conv(fields(0)(x)).tensor.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())
    with torch.no_grad():
        conv.phase.add_(0.7)
    after = torch.view_as_complex(conv(fields(0)(x)).tensor.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())
    torch.testing.assert_close(after, before * torch.exp(torch.tensor(0.7j)))


@pytest.mark.parametrize("make", [
    lambda: HarmonicConv(REAL, fields(0, 1, 2, channels=2), KERNEL, padding=2),
    lambda: HarmonicConv(fields(0, 1), fields(0, 1, 2), KERNEL, padding=2),
    lambda: HarmonicConv(fields(1), fields(0), KERNEL, padding=2, phase=False),
    lambda: ModulusReLU(fields(0, 1, 2)), lambda: ModulusBatchNorm(fields(0, 1, 2)),
], ids=["real", "complex", "phaseless", "relu", "batch_norm"])
def test_layers_are_equivariant(make):
    """Exactly to rotations by 90 degrees; to others within the error of sampling."""
    torch.manual_seed(0)
    layer = make()
    if isinstance(layer, ModulusReLU):
        torch.nn.init.constant_(layer.bias, -0.3)
    for _ in range(3):  # statistics of batches
        layer(layer.in_type(torch.randn(2, layer.in_type.size, 9, 9)))
    result = check_equivariance(layer, input_size=33)
    assert len(result.exact) == 3 and result.max_exact < 1e-5 < result.max_interpolated < 0.05


def test_modulus_layers():
    torch.manual_seed(0)
    out = fields(0, 1, channels=2)
    x = torch.randn(3, 8, 5, 5)
    z = torch.view_as_complex(x.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())
    torch.testing.assert_close(modulus(out(x)), z.abs())
    relu = ModulusReLU(out)
    torch.nn.init.uniform_(relu.bias, -1, 0.5)
    expected = torch.relu(z.abs() + relu.bias[:, None, None]) * z / z.abs()
    torch.testing.assert_close(relu(out(x)).tensor, torch.view_as_real(expected).movedim(-1, 2).flatten(1, 2))
    norm = ModulusBatchNorm(out)
    mean, variance = z.abs().mean((0, 2, 3)), z.abs().var((0, 2, 3), correction=0)
    normed = (z.abs() - mean[:, None, None]) / (variance + norm.norm.eps).sqrt()[:, None, None]
    expected = torch.relu(normed) * z / z.abs()
    torch.testing.assert_close(norm(out(x)).tensor, torch.view_as_real(expected).movedim(-1, 2).flatten(1, 2))
    zero = out(torch.zeros(3, 8, 5, 5, requires_grad=True))
    relu(zero).tensor.sum().backward()
    assert zero.tensor.grad.isfinite().all()


def test_network_is_invariant():
    torch.manual_seed(0)
    model = models.create("hnet", features=2, image_size=32)
    for _ in range(10):
        model(torch.randn(8, 1, 32, 32))
    result = check_equivariance(model)
    assert len(result.exact) == 3 and result.max_exact < 1e-5 < result.max_interpolated < 0.02


def test_published_size():
    """33 thousand parameters, says the paper's table 1."""
    assert models.complexity("hnet").parameters == pytest.approx(33e3, rel=0.05)
    model = models.create("hnet")
    convolutions = [m for m in model.modules() if isinstance(m, HarmonicConv)]
    assert [len(c.out_type) // 2 for c in convolutions] == [8, 8, 16, 16, 32, 32, 10]
    assert [c.phase is None for c in convolutions] == 6 * [False] + [True]


@pytest.mark.slow
def test_compiled():
    torch.manual_seed(0)
    model = models.create("hnet", nn=equiconv.nn, features=2, image_size=12)
    images = torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


@pytest.mark.parametrize("make,match", [
    (lambda: HarmonicConv(REAL, fields(0), 4), "odd, got 4"),
    (lambda: HarmonicConv(fields(0), REAL, 5), "out_type must be of complex fields"),
    (lambda: HarmonicConv(fields(0) + fields(1, channels=2), fields(0), 5), "in_type must be .*equally many"),
    (lambda: HarmonicConv(fields(1, 0), fields(0), 5), "in_type must be .*complex_fields"),
    (lambda: HarmonicConv(fields(0), fields(1), 5)(fields(1)(torch.zeros(1, 2, 5, 5))), "input must be of type"),
    (lambda: models.create("hnet", image_size=30), "multiple of 4"),
])
def test_what_does_not_fit(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("factorised", [True, False])
def test_modules_without_values(factorised):
    """On the meta device, then given memory and a checkpoint, or a checkpoint's tensors."""
    module = HarmonicConv(fields(0, 1), fields(0, 1), KERNEL, factorised=factorised)
    x = module.in_type(torch.randn(2, module.in_type.size, 7, 7))
    with torch.device("meta"):
        filled, assigned = (HarmonicConv(fields(0, 1), fields(0, 1), KERNEL, factorised=factorised) for _ in range(2))
    filled.to_empty(device="cpu").load_state_dict(module.state_dict())
    assigned.load_state_dict(module.state_dict(), assign=True)
    for other in (filled, assigned):
        assert torch.equal(other(x).tensor, module(x).tensor)
