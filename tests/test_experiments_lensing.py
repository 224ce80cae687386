"""Gravitational lenses: their simulation, where lenstronomy is installed, and the comparison on images made here."""
import sys

import numpy as np
import pytest
import torch

from equiconv.experiments import get, lenses, lensing
from equiconv.experiments.config import resolve
from equiconv.experiments.data import MissingData
from tests.experiment_runs import compare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def spots(monkeypatch):
    """In place of lenses: bright squares, the larger the higher the class. The sizes asked for."""
    asked = []

    def simulated(folder, count, size):
        asked.append((count, size))
        images = np.random.default_rng(0).normal(0, 0.1, (count, size, size)).astype(np.float32)
        classes = np.arange(count) % 3
        for image, c in zip(images, classes):
            image[5:8 + 2 * c, 5:8 + 2 * c] += 1
        return images, classes
    for name, value in (("COUNT", 30), ("TEST_SIZE", 12)):
        monkeypatch.setattr(lensing, name, value)
    monkeypatch.setattr(lensing, "simulated", simulated)
    lensing.lenses.cache_clear()
    yield asked
    lensing.lenses.cache_clear()


def test_networks_train(tmp_path, spots):
    tiny = {"widths": [1] * 6, "kernels": [5] * 6, "hidden": 4, "image_size": 21, "paddings": [0, 2, 2, 2, 2, 2]}
    networks = {"c4": {"model_options": tiny}, "h-net": {"model_options": {"features": 1, "image_size": 20}},
                "resnet": {"image_size": 21, "model_options": {"widths": [1, 1, 1]}}}
    table = compare(get("lensing"), tmp_path, networks, [16])
    assert set(spots) == {(30, 21)}  # the same images for all, less a row where a network needs an even size
    for row in table:
        areas = [float(row[f"AUC {name}"]) for name in lenses.CLASSES]
        assert all(0 <= area <= 1 for area in areas) and float(row["AUC"]) == pytest.approx(sum(areas) / 3)
    assert {"roc.png", "lenses.png"} <= {p.name for p in tmp_path.iterdir()}


def test_areas_of_perfect_outputs():
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    assert set(lensing.areas(5.0 * torch.eye(3)[targets], targets).values()) == {1.0}
    assert lensing.areas(torch.zeros(6, 3), targets)["AUC"] == 0.5


def test_more_images_for_more_training(spots):
    experiment = get("lensing")
    train, test = experiment.load(resolve(experiment, {}, {"train_size": 40, "batch_size": 8, "device": "cpu"}))
    assert spots == [(52, lensing.SIZE)] and len(train.targets) == 40 and len(test.targets) == 12
    assert train.inputs.shape == (40, 1, lensing.SIZE, lensing.SIZE)


def test_missing_lenstronomy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lenstronomy", None)
    with pytest.raises(MissingData, match=r"pip install 'equiconv\[lensing\]'"):
        lenses.simulated(tmp_path, 3, 21)
    assert not list(tmp_path.iterdir())


def test_images_depend_on_their_number_only(tmp_path):
    pytest.importorskip("lenstronomy")
    images, classes = lenses.simulated(tmp_path, 4, 21)
    assert images.shape == (4, 21, 21) and classes.tolist() == [0, 1, 2, 0]
    assert np.allclose(images[3], lenses.simulate(3, 21), atol=2e-3)  # kept in half precision
    assert not np.allclose(images[0], images[3], atol=0.1)
    (kept,) = tmp_path.iterdir()
    np.save(kept, np.zeros((4, 21, 21), dtype=np.float16))
    assert lenses.simulated(tmp_path, 4, 21)[0].max() == 0  # not simulated again


def test_masses_of_subhalos():
    rng = np.random.default_rng(0)
    drawn = [lenses._substructure(1, rng) for _ in range(400)]
    masses = np.concatenate([m for m, _ in drawn])
    assert len(masses) / 400 == pytest.approx(lenses.SUBHALOS, rel=0.05)
    assert lenses.LIGHTEST <= masses.min() and masses.max() <= lenses.HEAVIEST
    # dN/dm ~ m^slope: of those from m to 2 m, 2^(slope + 1) times as many as of those from m / 2 to m
    counts = np.histogram(masses, lenses.LIGHTEST * 2.0 ** np.arange(4))[0]
    assert counts[1] / counts[0] == pytest.approx(2 ** (lenses.SLOPE + 1), rel=0.1)
    assert masses.sum() / 400 == pytest.approx(lenses.VORTEX, rel=0.05)  # one class is as heavy as the other
    radii = np.concatenate([np.hypot(*points.T) for _, points in drawn])
    low, high = lenses.SUBHALO_RADII
    assert low <= radii.min() and radii.max() <= high and radii.mean() == pytest.approx((low + high) / 2, rel=0.02)


def test_vortex():
    rng = np.random.default_rng(0)
    for _ in range(20):
        masses, points = lenses._substructure(2, rng)
        assert sum(masses) == pytest.approx(lenses.VORTEX) and np.linalg.matrix_rank(points, tol=1e-9) == 1
        assert np.allclose(points.mean(0), 0)
        assert lenses.VORTEX_LENGTH[0] <= np.hypot(*(points[-1] - points[0])) <= lenses.VORTEX_LENGTH[1]
    assert lenses._substructure(0, rng) == ([], [])
