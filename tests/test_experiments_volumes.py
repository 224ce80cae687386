"""Shapes of four cubes, and brain tissue, in random orientations."""
import sys

import pytest
import torch
from escnn import gspaces

from equiconv import models
from equiconv.experiments import brain, get, volumes
from equiconv.experiments.config import resolve
from equiconv.experiments.data import MissingData
from equiconv.testing import check_equivariance
from tests.experiment_runs import compare

pytestmark = pytest.mark.usefixtures("one_thread")


# shapes

def shape(name):
    return torch.tensor(volumes.SHAPES[name], dtype=torch.float32)


def test_shapes_are_of_four_cubes():
    for name in volumes.SHAPES:
        volume = volumes.voxelised(shape(name), torch.eye(3), 4.0, torch.zeros(3), 21)
        assert volume.sum().item() == pytest.approx(4 * 4.0 ** 3, rel=0.2) and 0 <= volume.min() and volume.max() == 1


def test_a_turned_shape_is_the_turned_volume():
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # in the plane of the first two axes
    shift = torch.tensor([1.0, 0.0, 0.0])
    upright = volumes.voxelised(shape("tripod"), torch.eye(3), 3.5, shift, 17)
    turned = volumes.voxelised(shape("tripod"), turn, 3.5, turn @ shift, 17)
    assert torch.allclose(turned, upright.rot90(1, (0, 1)), atol=1e-5)


def test_mirror_images_cannot_be_turned_into_each_other():
    group = gspaces.octaOnR3().fibergroup
    one, other = ((s - s.mean(0)) for s in (shape("corner 1"), shape("corner 2")))

    def same(a, b):
        return torch.cdist(a, b).amin(1).max() < 1e-5
    turns = [torch.tensor(group.irrep(1)(g), dtype=torch.float32) for g in group.elements]
    assert not any(same(one @ turn.T, other) for turn in turns)
    assert any(same(-one @ turn.T, other) for turn in turns)


def test_volumes_train(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "TRAIN_SIZE", 16)
    monkeypatch.setattr(volumes, "TEST_SIZE", 48)
    volumes.splits.cache_clear()
    small = {"widths": [1, 1], "pooled": 2, "hidden": 4, "image_size": 9, "stem": 1}
    networks = {"se3": {"model_options": {"samples": [24, 24], "cube_orbits": 1, "frequency": 1, **small}},
                "cnn-augmented": {"model_options": {"inner": [1, 1], **small}}}
    table = compare(get("volumes"), tmp_path, networks, [16])
    assert [row["network"] for row in table] == list(networks)
    assert (tmp_path / "shapes.png").exists()
    volumes.splits.cache_clear()


# the brain

@pytest.fixture
def head(monkeypatch):
    """A head with the brain in it: bright white matter within grey matter."""
    steps = torch.linspace(-1, 1, 60)
    radius = torch.stack(torch.meshgrid(steps[10:50], steps, steps[10:50], indexing="ij")).square().sum(0).sqrt()
    classes = torch.where(radius < 0.4, 2, torch.where(radius < 0.7, 1, 0))
    monkeypatch.setattr(brain, "volumes", lambda: (classes[None].float(), classes))
    for name, count in (("TRAIN_SIZE", 16), ("TEST_SIZE", 8)):
        monkeypatch.setattr(brain, name, count)
    brain.splits.cache_clear()
    yield classes
    brain.splits.cache_clear()


def test_patches_are_cut_and_turned():
    volume = torch.arange(9.0 ** 3).reshape(1, 9, 9, 9)
    centre, upright = torch.tensor([[4.0, 5.0, 3.0]]), torch.eye(3)[None]
    inputs, targets = brain.patches(volume, volume[0].long(), centre, upright, 3)
    assert torch.allclose(inputs[0], volume[:, 3:6, 4:7, 2:5], atol=1e-3)
    assert torch.equal(targets[0], volume[0, 3:6, 4:7, 2:5].long())
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])  # of points: shows the volume turned the other way
    turned = brain.patches(volume, volume[0].long(), centre, turn, 3)
    assert torch.allclose(turned.inputs, inputs.rot90(-1, (2, 3)), atol=1e-3)
    assert torch.equal(turned.targets, targets.rot90(-1, (1, 2)))


def test_halves_do_not_overlap(head, monkeypatch):
    """Patches of a volume that is 1 in front of its middle, and 0 behind, show one of the two."""
    front = torch.zeros(head.shape)
    front[:, 30:] = 1
    monkeypatch.setattr(brain, "volumes", lambda: (front[None], head))
    monkeypatch.setattr(brain, "NOISE", 0.0)
    train, test = brain.splits(5)
    assert train.inputs.max() < 1e-4 and test.inputs.amax((1, 2, 3, 4)).min() > 0.99  # zero outside of the volume
    assert len(train.targets) == 16 and len(test.targets) == 8 and train.targets.shape[1:] == (5, 5, 5)


def test_segmentation_trains(head, tmp_path):
    small = {"widths": [1], "kernels": [3]}
    networks = {"se3": {"model_options": {"frequency": 1, **small}}, "cnn": {"model_options": small}}
    table = compare(get("volumes-brain"), tmp_path, networks, [16], image_size=5)
    assert [row["network"] for row in table] == list(networks)
    for row in table:
        parts = [float(row[f"Dice, {tissue} matter"]) for tissue in ("grey", "white")]
        assert float(row["score"]) == pytest.approx(sum(parts) / 2)
    assert (tmp_path / "patches.png").exists() and "mean Dice" in (tmp_path / "report.md").read_text()


def test_missing_nilearn(monkeypatch):
    brain.volumes.cache_clear()
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(MissingData, match=r"pip install 'equiconv\[brain\]'"):
        brain.volumes()


def test_the_real_brain():
    pytest.importorskip("nilearn")
    brightness, classes = brain.volumes()
    assert brightness.shape == (1, 99, 117, 95) and classes.shape == (99, 117, 95)
    means = [brightness[0][classes == c].mean() for c in (1, 2)]
    assert means[0] < means[1] and torch.bincount(classes.flatten()).min() > 20000  # white matter is brighter in T1


# the segmentation networks

def test_segmenter_is_equivariant():
    torch.manual_seed(0)
    model = models.create("se3_segmenter", widths=(2, 2), kernels=(3, 3), frequency=1)
    # Of fields: a plain tensor would count as invariant.
    assert check_equivariance(model.layers, input_size=9).max_exact < 1e-5
    with pytest.raises(ValueError, match="as many odd kernels as widths"):
        models.create("se3_segmenter", widths=(2, 2), kernels=(3,))


def test_twin_of_equal_parameters():
    sizes = [sum(p.numel() for p in models.create(name).parameters()) for name in ("se3_segmenter", "cnn_segmenter")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)
    for network in get("volumes-brain").comparison.networks.values():
        found = sum(p.numel() for p in models.create(network.settings["model"],
                                                     **network.settings["model_options"]).parameters())
        sizes.append(found)
    assert sizes[3] == pytest.approx(sizes[2], rel=0.15)


def test_sizes_that_do_not_fit():
    experiment = get("volumes")
    with pytest.raises(ValueError, match="image_size is 33, but the model's is 17"):
        experiment.load(resolve(experiment, {}, {"image_size": 33, "device": "cpu"}))
