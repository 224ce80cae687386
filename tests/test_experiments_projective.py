"""Digits under projective transformations."""
import pytest
import torch

from equiconv.experiments import get, projective
from equiconv.experiments.config import resolve
from equiconv.experiments.digits import digits, render, warp
from tests.experiment_runs import compare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """100, of which 20 are for tests."""
    def few():
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(5000, generator=generator)[:100]
        return digits()[0][order], digits()[1][order], generator
    projective.transformed_digits.cache_clear()
    monkeypatch.setattr(projective, "shuffled_digits", few)
    monkeypatch.setattr(projective, "TEST_SIZE", 20)
    yield
    projective.transformed_digits.cache_clear()


def test_warp_shows_the_image_at_the_mapped_points():
    """Against a translation by whole pixels, and a scaling by 2 about the centre."""
    images = digits()[0][[0, 1000, 2000]]
    upright = render(images, torch.zeros(3), 28)
    move = torch.eye(3).repeat(3, 1, 1)
    move[:, 0, 2], move[:, 1, 2] = 2 * 4 / 28, -2 * 3 / 28  # to the right and up in the image
    moved = warp(images, move, 28)
    assert torch.allclose(moved[..., 3:, :-4], upright[..., :-3, 4:], atol=1e-5)
    larger = warp(images, torch.diag(torch.tensor([0.5, 0.5, 1.0])).expand(3, 3, 3), 28)
    assert torch.allclose(larger.mean((1, 2, 3)), 4 * upright[..., 7:21, 7:21].sum((1, 2, 3)) / 28 ** 2, rtol=0.03)


def test_matrices_have_no_horizon_in_the_image():
    matrices = projective.random_matrices(500, torch.Generator().manual_seed(0))
    edge = 64 / 28
    corners = torch.tensor([[x * edge, y * edge, 1.0] for x in (-1, 1) for y in (-1, 1)])
    assert (corners @ matrices.mT)[..., 2].min() > 0.3
    areas = torch.det(matrices[:, :2, :2])  # at the centre: the digits appear 1 to 4 times as large
    assert 0.25 <= areas.min() < 0.3 and 0.9 < areas.max() <= 1.0001


def test_split_is_fixed():
    train, test = projective.transformed_digits(32)
    assert train.inputs.shape == (80, 1, 32, 32) and len(test.targets) == 20
    projective.transformed_digits.cache_clear()
    assert torch.equal(projective.transformed_digits(32)[0].inputs, train.inputs)
    config = resolve(get("projective"), {}, {"train_size": 30, "batch_size": 10, "device": "cpu"})
    assert get("projective").load(config)[0].inputs.shape == (30, 1, 64, 64)


def test_networks_train(tmp_path):
    small = {"grid": 52, "features": 4}
    networks = {"et-polar": {"model_options": {"pose_features": 4, **small}}, "cnn": {"model_options": small}}
    table = compare(get("projective"), tmp_path, networks, [8])
    assert [row["network"] for row in table] == list(networks)
    assert {"digits.png", "wall_clock.png"} <= {p.name for p in tmp_path.iterdir()}
    assert "amsgrad" in (tmp_path / "report.md").read_text()
