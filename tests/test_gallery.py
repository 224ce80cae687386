"""The pictures: what is in them, that they can be made again, and what the command line answers."""
import json
import warnings

import numpy as np
import pytest
import torch
from escnn import gspaces
from PIL import Image
from typer.testing import CliRunner

from equiconv import models, nn
from equiconv.cli import MISUSED, app
from equiconv.experiments.data import MissingData
from equiconv.gallery import draw_errors, draw_kernels, errors, kernels, responses, scenes
from equiconv.testing import check_equivariance

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["gallery", *map(str, arguments)])


@pytest.mark.parametrize("dimensions", [2, 3])
def test_rotations_are_those_of_escnn(dimensions):
    """turn() and rotation() against GeometricTensor.transform, which interpolates by another spline."""
    space = gspaces.rot2dOnR2(-1) if dimensions == 2 else gspaces.rot3dOnR3()
    angle = np.radians(50.0)
    g = space.fibergroup.element(angle) if dimensions == 2 else space.fibergroup.element(angle * responses.AXIS, "EV")
    action = responses.rotation(50, dimensions)
    vector = space.irrep(1) if dimensions == 2 else space.fibergroup.standard_representation()
    np.testing.assert_allclose(space.basespace_action(g), action, atol=1e-6)
    np.testing.assert_allclose(vector(g), action, atol=1e-6)
    field = np.zeros((21,) * dimensions)
    field[(8, *[13] * (dimensions - 1))] = 1
    field = scenes.gaussian_filter(field, 2)
    expected = nn.FieldType(space, [space.trivial_repr])(torch.from_numpy(field)[None, None]).transform(g).tensor[0, 0]
    assert np.abs(scenes.turn(field, action) - expected.numpy()).max() < 0.02 * field.max()


@pytest.mark.parametrize(["dimensions", "size"], [(2, 65), (3, 25)])
def test_only_the_steerable_response_stands_still(dimensions, size):
    scene = scenes.photograph(None, size) if dimensions == 2 else scenes.volume(None, size)
    ticks = []
    show = responses.respond(scene, size, [0, 50, 90], 0, lambda: ticks.append(1))
    steerable, conventional = show.responses
    assert len(ticks) == 3 and show.inputs.shape == (3, *[size] * dimensions)
    assert steerable.camera.shape == steerable.comoving.shape == (3, 1 + dimensions, *[size] * dimensions)
    assert 0 < steerable.mean_error < 0.1 and conventional.mean_error > 0.5
    assert abs(steerable.parameters / conventional.parameters - 1) < 0.2
    if dimensions == 2:
        assert steerable.errors[2] < 1e-5  # a quarter turn needs no interpolation
    again = responses.respond(scene, size, [0, 50], 0, lambda: None)
    assert again.responses[0].errors[1] == pytest.approx(steerable.errors[1], rel=1e-4)


def test_image(tmp_path):
    done = call("image", "--out", tmp_path, "--size", 33, "--frames", 4)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "rotating-image.json").read_text())
    mean = written["mean equivariance error"]
    assert mean["steerable CNN"] < mean["conventional CNN"]
    assert f"steerable CNN: mean equivariance error {100 * mean['steerable CNN']:.3g} %" in done.output
    assert written["degrees"] == [0, 90, 180, 270]
    with Image.open(tmp_path / "rotating-image.gif") as film:
        assert film.n_frames == 4 and film.info["loop"] == 0
        film.seek(1)
        second = np.asarray(film.convert("RGB")).copy()
        film.seek(2)
        assert (second != np.asarray(film.convert("RGB"))).any()
    with Image.open(tmp_path / "rotating-image.png") as still:
        assert min(still.size) > 1000


def test_volume(tmp_path):
    np.save(tmp_path / "blocks.npy", np.kron(np.arange(8).reshape(2, 2, 2), np.ones((9, 9, 9))))
    done = call("volume", "--volume", tmp_path / "blocks.npy", "--out", tmp_path, "--size", 17, "--frames", 4)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "rotating-volume.gif") as film:
        assert film.n_frames == 4
    assert (tmp_path / "rotating-volume.png").exists() and "conventional CNN: mean" in done.output


def test_volume_is_the_brain_of_nilearn_or_a_phantom(monkeypatch):
    values = torch.zeros(1, 20, 24, 18)  # axes x, y, z
    values[0, 12:, 15:, 11:] = 1
    monkeypatch.setattr(scenes.brain, "volumes", lambda: (values - values.mean(), None))
    found = scenes.volume(None, 21)
    assert found.shape == (21, 21, 21) and found.min() == 0 and found.max() == 1
    z, y, x = (np.indices(found.shape) * found).sum((1, 2, 3)) / found.sum() - 10  # axes -z, -y, x
    assert z < -2 and y < -2 and x > 2

    def missing():
        raise MissingData
    monkeypatch.setattr(scenes.brain, "volumes", missing)
    np.testing.assert_allclose(scenes.volume(None, 21), scenes.volume(None, 21)[..., ::-1], atol=0.3)  # a head's halves


def test_kernels(tmp_path):
    conv = kernels.build("SO2", "trivial", "0,1", 5)
    elements = kernels._filter(conv, torch.eye(len(conv.weights))[-1])
    assert elements.shape == (3, 1, 5, 5) and np.abs(elements).max() > 0
    np.testing.assert_allclose(kernels._filter(conv, conv.weights)[:, 0],
                               conv.expand_parameters()[0].detach()[:, 0], atol=1e-6)
    assert draw_kernels(tmp_path / "kernels.png", conv) == len(conv.weights)
    with Image.open(tmp_path / "kernels.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    assert (colours[:, 0] - colours[:, 2]).max() > 60 and (colours[:, 2] - colours[:, 0]).max() > 60  # red and blue
    for group, fields in (("D4", "regular"), ("C1", "trivial"), ("O2", "1"), ("SO3", "1")):
        done = call("kernels", "--group", group, "--in-type", fields, "--out-type", fields, "--kernel-size", 3, "--out",
                    tmp_path, "--random")
        assert done.exit_code == 0, done.output
        assert (tmp_path / f"kernels-{group}.png").exists()


def test_kernels_between_two_fields_are_drawn_without_the_others(tmp_path):
    conv = kernels.build("SO2", "trivial", "0,1,2", 9)
    sections = kernels._sections(conv, 100)
    assert [s.heading for s in sections] == [f"irrep 0 → irrep {l}" for l in range(3)]
    assert [s.kernels[0].shape for s in sections] == [(1, 1, 9, 9), (2, 1, 9, 9), (2, 1, 9, 9)]
    whole = [kernels._filter(conv, one) for one in torch.eye(len(conv.weights))]
    drawn = [kernel for section in sections for kernel in section.kernels]
    assert len(drawn) == len(whole)
    for kernel, element in zip(drawn, whole):
        assert np.abs(kernel).sum() == pytest.approx(np.abs(element).sum()) and np.abs(kernel).max((1, 2, 3)).min() > 0
    draw_kernels(tmp_path / "kernels.png", conv)
    with Image.open(tmp_path / "kernels.png") as picture:
        colours = np.asarray(picture.convert("RGB")).astype(int)
    assert ((colours.max(2) - colours.min(2)) > 15).mean() > 0.1  # of the picture is neither white nor zero


@pytest.mark.parametrize("arguments,all_fit", [
    (("SO2", "trivial", "0,1,2", 9), True), (("O2", "0,1,2", "0,1,2", 5), True),
    (("C8", "regular", "regular", 3), False), (("C64", "trivial", "regular", 3), True),
    (("octa", "regular", "regular", 3), False)])
def test_kernels_fit_on_a_page(arguments, all_fit):
    found = kernels._sections(kernels.build(*arguments), kernels.MOST)
    sections, tile = kernels._on_a_page(found, kernels.TILES, kernels.LARGE)
    placed, width, height = kernels._shelves(sections, tile)
    assert width <= kernels.WIDTH and height <= kernels.HEIGHT and sections and (sections == found) == all_fit
    places = [(x, y, x + s.extent(tile)[0], y + s.extent(tile)[1]) for s, x, y in placed]
    for i, a in enumerate(places):
        assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in places[:i])


def test_errors_are_told_one_by_one(tmp_path, monkeypatch):
    def error_curve(name, seed):
        if name == "p4_cnn":
            raise ValueError("interrupted")
        return {45: 0.25, 90: 0.75}, True
    monkeypatch.setattr(errors, "error_curve", error_curve)
    done = call("errors", "--models", "hnet,p4_cnn", "--out", tmp_path)
    assert done.exit_code == MISUSED and "hnet " in done.output and "mean 5.0e-01  largest 7.5e-01" in done.output


def test_errors(tmp_path, monkeypatch):
    """A panel and a column for each network; the values are those of check_equivariance."""
    monkeypatch.setattr(errors, "STEP", 45)
    done = call("errors", "--models", "p4_cnn", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "equivariance-errors.csv").read_text().splitlines()
    assert lines[0] == "degrees,p4_cnn" and [line.split(",")[0] for line in lines[1:]] == ["45", "90", "135", "180"]
    found = [float(line.split(",")[1]) for line in lines[1:]]
    assert max(found[1], found[3]) < 1e-5 < min(found[0], found[2])
    torch.manual_seed(0)
    plane = gspaces.rot2dOnR2(4)
    (expected,) = check_equivariance(models.create("p4_cnn"), input_size=28,
                                     elements=[plane.fibergroup.element(1)]).errors.values()
    assert found[1] == pytest.approx(expected, rel=0.5)  # rounding alone
    draw_errors(tmp_path, {"a": ({45: 0.1, 90: 1e-9}, True), "b": ({45: 1.0, 90: 1.0}, False)})
    assert (tmp_path / "equivariance-errors.png").exists()


@pytest.mark.parametrize(["arguments", "message"], [
    (["image", "--image", "absent.jpg"], "absent.jpg is not an image"),
    (["image", "--size", 5], "size must be at least 17"),
    (["image", "--frames", 0], "frames must be at least 4"),
    (["volume", "--volume", "absent.npy"], "absent.npy is not an .npy file"),
    (["kernels", "--group", "E8"], "no group 'E8'"),
    (["kernels", "--group", "C4", "--out-type", "7"], "no irrep 7"),
    (["kernels", "--group", "SO2", "--in-type", "regular"], "has no regular representation"),
    (["errors", "--models", "resnet"], "no model 'resnet'"),
    (["errors", "--models", "equivariant_mlp"], "neither images nor volumes"),
])
def test_bad_arguments(tmp_path, arguments, message):
    done = call(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == MISUSED and message in done.output
    assert "Traceback" not in done.output and not (tmp_path / "out").exists()
