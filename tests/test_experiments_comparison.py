"""Several networks compared: plans, runs, interruption and resumption, the report; scores and augmentation."""
import json
import math
import re

import pytest
import torch

from equiconv.cli import INTERRUPTED, MISUSED
from equiconv.experiments import comparison, files, get, metrics
from equiconv.experiments.augmentation import AUGMENTATIONS, random_rotations
from equiconv.experiments.mnist_rot import OFFICIAL
from tests.experiment_runs import compare, interrupt_at, rows, silent
from tests.test_cli import call

TINY = {"widths": [1, 1, 1, 1, 1, 2], "kernels": [3] * 6, "paddings": [0, 1, 1, 1, 1, 1], "hidden": 4, "image_size": 19}
NETWORKS = {"c8": {"model_options": {"order": 4, **TINY}}, "cnn-augmented": {"model_options": TINY}}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def few_test_digits(monkeypatch):
    """60 of them, not 1000."""
    from equiconv.experiments import mnist_rot
    rotated = mnist_rot.rotated_digits
    monkeypatch.setattr(mnist_rot, "rotated_digits", lambda size: (rotated(size)[0], rotated(size)[1].first(60)))


@pytest.fixture(autouse=True)
def no_curves_of_each_run(monkeypatch):
    """They are tested elsewhere, and to draw them takes longer than these runs."""
    from equiconv.experiments import figures
    monkeypatch.setattr(figures, "training_curves", lambda *_: None)


def plan(out, **changes):
    return comparison.plan(get("mnist-rot"), {"networks": NETWORKS}, {
        "out": str(out), "train_sizes": [10, 32], "device": "cpu", "epochs": 2, "least_steps": 3, "batch_size": 16,
        **changes})


# plans

def test_runs_of_a_plan(tmp_path):
    configs = plan(tmp_path, seeds=2).configs(get("mnist-rot"))
    assert list(configs) == [(n, size, seed) for size in (10, 32) for seed in (0, 1) for n in ("c8", "cnn-augmented")]
    few, more = configs["c8", 10, 0], configs["cnn-augmented", 32, 1]
    assert (few.batch_size, few.epochs, few.test_every, few.seed) == (10, 3, 3, 0)  # least_steps
    assert (more.batch_size, more.epochs, more.augmentation, more.model, more.seed) == (16, 2, "rotation", "cnn", 1)
    assert few.schedule == "cosine" and few.lr == 3e-3 and few.model_options["widths"] == TINY["widths"]
    assert len({config.out for config in configs.values()}) == 8


def test_every_experiment_can_be_planned():
    for name in ("cifar", "cifar100", "lensing", "mnist-rot", "projective", "volumes", "volumes-brain"):
        experiment = get(name)
        configs = comparison.plan(experiment, {}, {"device": "cpu"}).configs(experiment)
        assert len(configs) == len(experiment.comparison.networks) * len(experiment.comparison.train_sizes)


def test_flags_come_before_networks_before_file(tmp_path):
    networks = {"c8": {"lr": 0.1}, "mine": {"model": "p4_cnn", "title": "p4"}}
    made = comparison.plan(get("mnist-rot"), {"networks": networks, "lr": 0.5, "epochs": 3}, {"epochs": 4})
    configs = made.configs(get("mnist-rot"))
    assert configs["c8", 10, 0].lr == 0.1 and configs["mine", 10, 0].lr == 0.5
    assert configs["c8", 4000, 0].epochs == 4 and made.networks["mine"].title == "p4"
    assert configs["c8", 10, 0].model_options["order"] == 8  # of the experiment's network, which stays


@pytest.mark.parametrize("given, message", [
    ({"networks": ["c9"]}, "no network 'c9'; there are c8, "), ({"networks": []}, "at least one network"),
    ({"networks": 3}, "networks must be a list"), ({"train_sizes": [0]}, "train_sizes must be at least 1"),
    ({"train_sizes": 10}, "train_sizes must be at least 1"), ({"seeds": 0}, "seeds must be at least 1"),
    ({"seeds": True}, "seeds must be at least 1"), ({"train_size": 3}, "a comparison takes no train_size"),
    ({"depth": 3}, "unknown settings: depth"), ({"networks": {"c8": {"model": "resnet"}}}, "not .resnet"),
    ({"networks": NETWORKS, "train_sizes": [4001]}, "4000 digits"),
    ({"networks": {"c8": {"model_options": {"size": 1}}}}, "option 'size'"),
    ({"augmentation": "blur"}, "augmentation must be one of none, rotation"),
    ({"optimizer": "lion"}, "optimizer must be one of adam"), ({"image_size": 28}, "but the model's is 21")])
def test_bad_plans(tmp_path, given, message):
    experiment = get("mnist-rot")
    with pytest.raises(ValueError, match=message):
        made = comparison.plan(experiment, given, {"out": str(tmp_path / "out"), "device": "cpu"})
        comparison.compare(made, experiment, silent())
    assert not (tmp_path / "out").exists()  # found before the first run


# runs

def test_comparison_writes_its_files(tmp_path):
    table = compare(get("mnist-rot"), tmp_path, NETWORKS, [10, 32])
    assert len(table) == 4 and {row["network"] for row in table} == set(NETWORKS)
    assert {p.name for p in tmp_path.iterdir()} == {"c8", "cnn-augmented", "comparison.csv", "data_efficiency.png",
                                                    "plan.json", "report.md", "wall_clock.png"}
    text = (tmp_path / "report.md").read_text()
    assert "Complete: 4 runs." in text and "](wall_clock.png)" in text
    # What it says of the networks is what the runs wrote.
    own, other = (next(r for r in table if r["network"] == n and r["train_size"] == "32") for n in NETWORKS)
    gain = float(own["score"]) - float(other["score"])
    line = next(line for line in text.splitlines() if line.startswith("- With 32 training samples"))
    assert f"accuracy (%): **C8 steerable** {float(own['score']):.2f}" in line
    assert f"{abs(gain):.2f} {'more' if gain >= 0 else 'less'}. Training took {float(own['seconds']):.1f} s" in line
    assert float(rows(tmp_path / "c8" / "32-0" / "epochs.csv")[-1]["score"]) == pytest.approx(float(own["score"]))
    steps = rows(tmp_path / "c8" / "32-0" / "steps.csv")
    assert float(own["seconds"]) == pytest.approx(sum(float(step["milliseconds"]) for step in steps) / 1000)


@pytest.mark.parametrize("step", [1, 2])  # within the first run; at the end of the first, so that the second is next
def test_a_resumed_comparison_repeats_an_uninterrupted_one(tmp_path, monkeypatch, step):
    experiment, whole, cut = get("mnist-rot"), plan(tmp_path / "whole"), plan(tmp_path / "cut")
    assert comparison.compare(whole, experiment, silent())
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert not comparison.compare(cut, experiment, silent())
    assert "**Interrupted** after" in (tmp_path / "cut" / "report.md").read_text()
    again = comparison.saved_plan(tmp_path / "cut", {"device": "cpu"})
    assert again.configs(experiment) == cut.configs(experiment)
    assert comparison.compare(again, experiment, silent(), resume=True)
    for name, config in whole.configs(experiment).items():
        a, b = (files.load_checkpoint(f"{folder}/checkpoint.pt")["learner"] for folder in (
            config.out, cut.configs(experiment)[name].out))
        assert a["step"] == b["step"] and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    scores = [[(r["network"], r["train_size"], r["score"]) for r in rows(tmp_path / run / "comparison.csv")]
              for run in ("whole", "cut")]
    assert scores[0] == scores[1] and len(scores[0]) == 4
    assert comparison.compare(again, experiment, silent(), resume=True)  # nothing left to train


def test_a_new_comparison_forgets_the_old_one(tmp_path, monkeypatch):
    experiment, made = get("mnist-rot"), plan(tmp_path, train_sizes=[10])
    assert comparison.compare(made, experiment, silent())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert not comparison.compare(made, experiment, silent())
    assert not any((tmp_path / name / "10-0" / "result.pt").exists() for name in NETWORKS)
    with pytest.raises(ValueError, match="with its own settings, without lr"):
        comparison.saved_plan(tmp_path, {"lr": 0.1})
    with pytest.raises(ValueError, match="nothing to resume"):
        comparison.saved_plan(tmp_path / "nowhere", {})


def test_seconds_to_a_score():
    group = comparison.comparison_report.Group("", [{"curve": [[1.0, 50.0], [2.0, 80.0]], "score": 80.0},
                                                    {"curve": [[1.0, 70.0], [4.0, 90.0]], "score": 90.0}])
    assert group.seconds_to(60) == 1.5 and group.seconds_to(80) == 3 and group.seconds_to(85) is None
    assert group.mean("score") == 85 and group.spread("score") == pytest.approx(math.sqrt(50))


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"networks": NETWORKS, "epochs": 1, "least_steps": 2}))
    arguments = ["train", "mnist-rot", "--compare", "--out", "here", "--device", "cpu"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        done = call(*arguments, "--config", "a.json", "--train-sizes", "10,16")
    assert done.exit_code == INTERRUPTED and "go on with --resume" in done.output, done.output
    done = call(*arguments, "--resume", "--lr", 0.5)
    assert done.exit_code == MISUSED and "without lr" in done.output
    done = call(*arguments, "--resume")
    assert done.exit_code == 0 and "report: here/report.md" in done.output, done.output
    assert re.search(r"With 16 training samples, accuracy \(%\):\s+C8 steerable", done.output)
    for wrong, message in ((["--train-sizes", "ten"], "whole numbers with"), (["--networks", "c9"], "no network")):
        done = call(*arguments, *wrong)
        assert done.exit_code == MISUSED and message in done.output, done.output
    done = call("train", "--networks", "c8")
    assert done.exit_code == MISUSED and "--networks goes with --compare" in done.output


def test_official_mnist_rot(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train_valid", 12), ("test", 3)):
        table = torch.cat([torch.rand(count, 784, generator=generator), torch.arange(count)[:, None] % 10], 1)
        lines = [" ".join(f"{v:.4f}" for v in row) for row in table.tolist()]
        (tmp_path / OFFICIAL.format(part)).write_text("\n".join(lines))
    experiment = get("mnist-rot")
    config = comparison.resolve(experiment, {}, {"data": str(tmp_path), "train_size": 12, "batch_size": 4})
    train, test = experiment.load(config)
    assert train.inputs.shape == (12, 1, 29, 29) and test.targets.tolist() == [0, 1, 2]
    assert sorted(train.targets.tolist()) == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    (tmp_path / OFFICIAL.format("test")).write_text("1 2 3\n")
    from equiconv.experiments.mnist_rot import official_digits
    official_digits.cache_clear()
    with pytest.raises(ValueError, match="785 numbers"):
        experiment.load(config)


# scores and augmentation

def test_auc_is_the_probability_of_the_right_order():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (50,), generator=generator).double()  # with ties
    positive = torch.rand(50, generator=generator) < 0.4
    a, b = scores[positive], scores[~positive]
    right = (a[:, None] > b).double() + 0.5 * (a[:, None] == b)
    assert metrics.auc(scores, positive) == pytest.approx(right.mean().item())
    false, true = metrics.roc(scores, positive)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1) and len(false) == 7
    assert metrics.auc(positive.double(), positive) == 1


def test_dice():
    outputs = torch.eye(3)[torch.tensor([[0, 0, 1, 1]])].permute(0, 2, 1)  # [1, classes, 4]
    assert metrics.dice(outputs, torch.tensor([[0, 1, 1, 1]])) == pytest.approx([200 / 3, 80.0, 100.0])


@pytest.mark.parametrize("dim", [2, 3])
def test_random_rotations_are_uniform(dim):
    torch.manual_seed(0)
    turns = random_rotations(20000, dim)
    assert torch.allclose(turns @ turns.mT, torch.eye(dim).expand_as(turns), atol=1e-5)
    assert torch.allclose(torch.det(turns), torch.ones(1), atol=1e-5)
    assert turns.mean(0).abs().max() < 0.02 and (turns.square().mean(0) - 1 / dim).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(4, 1, 17, 17), (4, 1, 21, 21, 21)])
def test_rotation_keeps_the_distance_to_the_centre(shape):
    steps = [torch.linspace(-1, 1, n) for n in shape[2:]]
    radius = torch.stack(torch.meshgrid(*steps, indexing="ij")).square().sum(0)
    balls = (1 - radius).clamp(min=0).square().expand(shape)
    torch.manual_seed(0)
    turned, classes = AUGMENTATIONS["rotation"](balls, torch.arange(4))
    assert (turned - balls).abs().max() < 0.05 and classes.tolist() == [0, 1, 2, 3]
    bar = torch.zeros(shape)
    bar[:, 0, shape[2] // 2, shape[2] // 2:] = 1
    turned, _ = AUGMENTATIONS["rotation"](bar, classes)
    assert (turned[0] - turned[1]).norm() > 0.5 and (turned - bar).norm() > 0.5  # each by another angle


def test_crop_and_flip():
    images = torch.arange(1.0, 65).reshape(1, 1, 8, 8).expand(32, 1, 8, 8)
    torch.manual_seed(0)
    changed, _ = AUGMENTATIONS["crop-flip"](images, torch.zeros(32))
    assert changed.shape == images.shape
    rising = [(image[image > 0].diff() > 0).float().mean() > 0.5 for image in changed]
    assert 0 < sum(rising) < 32  # some are mirrored
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 16
    assert all(set(image.flatten().tolist()) <= {0, *range(1, 65)} for image in changed)
