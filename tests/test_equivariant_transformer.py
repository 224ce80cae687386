"""Canonical coordinates, poses and resampling, against images whose transformation is computed point by point."""
import math

import pytest
import torch

from equiconv import models
from equiconv.models.equivariant_transformer import (
    COORDINATES,
    TRANSFORMATIONS,
    Cartesian,
    EquivariantTransformer,
    TransformerLayer,
    resample,
)

pytestmark = pytest.mark.usefixtures("one_thread")

GRID, SIZE = 64, 129
SHIFTS = {"RotationScale": (-4, 10), "ShearX": (2,), "HyperbolicRotation": (4,), "PerspectiveX": (4,),
          "PerspectiveY": (-4,)}  # of the axes that move, in steps of the grid: even, for the stride


def picture(points):  # [..., 2] -> [...], smooth, without a symmetry, and practically zero on the axes x = 0 and y = 0
    x, y = points.unbind(-1)
    return sum(weight * torch.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * width ** 2)) for weight, a, b, width in (
        (1.0, 0.4, 0.3, 0.08), (0.7, -0.3, 0.4, 0.09), (-0.8, -0.45, -0.35, 0.08), (0.5, 0.3, -0.4, 0.07)))


def photograph(matrix=None, size=SIZE):
    """[1, 1, size, size]: the picture, transformed by a matrix [1, 3, 3]: its value at p is that at matrix^-1 p."""
    points = Cartesian().grid(size, size)[0].double()
    if matrix is not None:
        mapped = torch.cat([points, torch.ones(size, size, 1)], -1) @ torch.linalg.inv(matrix.double())[0].T
        points = mapped[..., :2] / mapped[..., 2:]
    return picture(points).float()[None, None]


def steps(transformation, counts):
    """Parameters that shift the axes that move by so many steps of the grid."""
    found = []
    for (_, axis), count in zip(transformation.axes, counts, strict=True):
        positions = axis.positions(GRID)
        found.append((count * (positions[1] - positions[0]))[None])
    return found


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_are_shifts_in_their_coordinates(name):
    """At every point of the grid, to rounding: matrix(s) maps the point of (u, v) to that of (u, v) shifted by s."""
    transformation = TRANSFORMATIONS[name]
    parameters = steps(transformation, SHIFTS[name])
    matrix = transformation.matrix(*parameters)[0]
    v, u = torch.meshgrid(transformation.v.positions(GRID), transformation.u.positions(GRID), indexing="ij")
    moved = {3: u, 2: v}
    for (dim, _), parameter in zip(transformation.axes, parameters):
        moved[dim] = moved[dim] + parameter
    for (x, y), (expected_x, expected_y) in zip(transformation.points(u, v), transformation.points(moved[3], moved[2])):
        mapped = torch.stack([x, y, torch.ones_like(x)], -1) @ matrix.T
        near = (mapped[..., 2] > 0.1) & (expected_x.abs() < 2) & (expected_y.abs() < 2)
        assert near.float().mean() > 0.3
        got = mapped[..., :2] / mapped[..., 2:]
        torch.testing.assert_close(got[near], torch.stack([expected_x, expected_y], -1)[near], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_canonical_images_are_shifted(name):
    """A transformed image, analytically, is the canonical image shifted by whole steps: up to interpolation."""
    transformation = TRANSFORMATIONS[name]
    layer = TransformerLayer(transformation, 1, GRID)
    matrix = transformation.matrix(*steps(transformation, SHIFTS[name]))
    before, after = layer.canonical(photograph()), layer.canonical(photograph(matrix))
    assert before.shape == (1, len(transformation.grid(2, 2)), GRID, GRID)
    assert difference(after, before) > 0.3
    expected = before.roll(SHIFTS[name], [dim for dim, _ in transformation.axes])
    for (dim, axis), count in zip(transformation.axes, SHIFTS[name]):
        if not axis.periodic:  # what the grid shows of both
            start, length = max(count, 0), GRID - abs(count)
            expected, after = expected.narrow(dim, start, length), after.narrow(dim, start, length)
    assert difference(after, expected) < 0.03


def peaked(layer):
    """The layer, evaluating, with heatmaps that are almost zero but at their peak, which is not where nothing is."""
    with torch.no_grad():
        for heatmap in layer.pose.heatmaps:
            heatmap.weight.abs_().mul_(300)
    return layer.eval()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_estimated_pose_moves_with_the_image(name):
    transformation = TRANSFORMATIONS[name]
    torch.manual_seed(0)
    layer = peaked(TransformerLayer(transformation, 1, GRID))
    parameters = steps(transformation, SHIFTS[name])
    with torch.no_grad():
        before = layer.pose(layer.canonical(photograph()))
        after = layer.pose(layer.canonical(photograph(transformation.matrix(*parameters))))
    for (_, axis), s, p, q in zip(transformation.axes, parameters, before, after):
        step = (axis.positions(GRID)[1] - axis.positions(GRID)[0]).item()
        assert (q - p).item() == pytest.approx(s.item(), abs=0.25 * step)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_output_is_invariant(name):
    """To its transformation, up to interpolation; to another one it is not."""
    transformation = TRANSFORMATIONS[name]
    torch.manual_seed(0)
    front = EquivariantTransformer([name], grid=GRID).eval()
    peaked(front.layers[0])
    matrix = transformation.matrix(*steps(transformation, SHIFTS[name]))
    other = TRANSFORMATIONS["PerspectiveX" if name == "ShearX" else "ShearX"]
    sheared = other.matrix(torch.tensor([0.4]))
    with torch.no_grad():
        plain = front(photograph())
        assert difference(front(photograph(matrix)), plain) < 0.1
        assert difference(front(photograph(sheared)), plain) > 0.2
        assert difference(photograph(matrix), photograph()) > 0.2


def test_rotations_by_90_degrees_are_undone_exactly():
    images = photograph(size=33).expand(2, 3, -1, -1)
    torch.manual_seed(0)
    front = EquivariantTransformer(["RotationScale"], in_channels=3, grid=32).eval()
    peaked(front.layers[0])
    for turns in (1, 2, 3):
        torch.testing.assert_close(front(images.rot90(turns, (2, 3))), front(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name,options", [("equivariant_transformer", {"transformations": ()}),
                                          ("equivariant_transformer_rotation", {})])
def test_networks_are_invariant_to_rotations_by_90_degrees(name, options):
    torch.manual_seed(0)
    model = models.create(name, **options).eval()
    images = torch.randn(2, 1, 33, 33)
    torch.testing.assert_close(model(images.rot90(1, (2, 3))), model(images), rtol=1e-5, atol=1e-5)


def test_sequence_composes_what_its_layers_find():
    """Each layer looks at what those before leave, and the output is interpolated once."""
    torch.manual_seed(0)
    names = ["ShearX", "RotationScale", "PerspectiveY"]
    front = EquivariantTransformer(names, grid=GRID).eval()
    images = photograph()
    matrix = None
    for layer in front.layers:
        found = layer.transformation.matrix(*layer.pose(layer.canonical(images, matrix)))
        matrix = found if matrix is None else matrix @ found
    torch.testing.assert_close(front.matrix(images), matrix)
    torch.testing.assert_close(front(images), resample(images, Cartesian().grid(GRID, GRID)[0], matrix))


def test_resampling_undoes_a_transformation():
    """At the points of matrix p, an image transformed by the matrix shows what was at p."""
    matrix = TRANSFORMATIONS["PerspectiveX"].matrix(torch.tensor([0.3])) @ TRANSFORMATIONS["ShearX"].matrix(
        torch.tensor([0.2]))
    points = Cartesian().grid(SIZE, SIZE)[0]
    assert difference(resample(photograph(matrix), points, matrix), photograph()) < 0.03
    assert difference(photograph(matrix), photograph()) > 0.5
    torch.testing.assert_close(resample(photograph(), points), photograph())


def test_beyond_the_horizon_nothing_is_seen():
    matrix = TRANSFORMATIONS["PerspectiveX"].matrix(torch.tensor([2.0]))  # the horizon is at x = -1/2
    points = Cartesian().grid(SIZE, SIZE)[0]
    seen = resample(torch.ones(1, 1, SIZE, SIZE), points, matrix)[0, 0]
    assert seen.isfinite().all() and (seen[:, points[0, :, 0] < -0.5] == 0).all() and (seen == 1).any()


def test_gradients_through_the_resampling():
    """The loss of what follows trains the layers: by finite differences, in float64."""
    torch.manual_seed(0)
    front = EquivariantTransformer(["RotationScale", "ShearX"], grid=16, features=4).double().eval()
    images = photograph(size=17).double()
    parameter = front.layers[0].pose.offsets
    (gradient,) = torch.autograd.grad(front(images).square().sum(), parameter)
    for i in range(2):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[i] += sign * 1e-6
                losses.append(front(images).square().sum())
                parameter[i] -= sign * 1e-6
        assert gradient[i].item() == pytest.approx(((losses[0] - losses[1]) / 2e-6).item(), rel=1e-4)


def test_a_layer_learns_to_undo_rotations():
    """By the loss behind it alone: a spot at random angles about the centre comes to rest to the right of it."""
    def spots(angles, size):
        points = Cartesian().grid(size, size)[0]
        centres = 0.4 * torch.stack([angles.cos(), angles.sin()], -1)[:, None, None]
        return torch.exp(-(points - centres).square().sum(-1) / 0.18)[:, None]

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    front = EquivariantTransformer(["RotationScale"], grid=32, features=8)
    optimizer = torch.optim.Adam(front.parameters(), lr=3e-3)
    target, losses = spots(torch.zeros(1), 32), []
    for _ in range(32):
        images = spots(2 * math.pi * torch.rand(16, generator=generator), 32)
        loss = (front(images) - target).square().mean() / target.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    without = (images - target).square().mean() / target.square().mean()
    assert losses[-1] < 0.01 < 0.1 < losses[0] and without > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bilinear_sampling_in_log_polar_coordinates_is_periodic(dtype):
    points = COORDINATES["log-polar"].grid(8, 4)[0]
    angles = torch.atan2(points[..., 1], points[..., 0])[:, 0]
    assert angles.diff().max() == pytest.approx(math.pi / 4, abs=1e-5)  # -pi is there once
    assert resample(torch.ones(1, 1, 5, 5, dtype=dtype), points).dtype == dtype


@pytest.mark.parametrize("options,match", [
    ({"transformations": ("Shear",)}, "must be of RotationScale, ShearX, .*got 'Shear'"),
    ({"coordinates": "polar"}, "must be of cartesian, log-polar, got 'polar'"),
    ({"grid": 63}, "multiple of 2, the strides' product, got 63"), ({"grid": 48}, "50 is the smallest"),
    ({"pose_kernel": 4}, "must be odd, got 4"),
])
def test_what_does_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        models.create("equivariant_transformer", **options)
