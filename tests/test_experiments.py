"""Data, settings, training with interruption and resumption, the demonstration, and two processes."""
import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from escnn import group, gspaces

from equiconv import models, nn
from equiconv.experiments import demo, files, get, learner, training
from equiconv.experiments.config import Config, plain, read_file, resolve
from equiconv.experiments.digits import digits, render, rotated_digits
from equiconv.experiments.processes import StopRequest, World
from tests.experiment_runs import interrupt_at, rows, silent

ROOT = Path(__file__).parent.parent
TINY_MODEL = {"order": 4, "widths": [1, 1, 1, 1, 1, 2], "kernels": [3] * 6, "paddings": [0, 1, 1, 1, 1, 1], "hidden": 4,
              "image_size": 19}
TINY = {"device": "cpu", "epochs": 2, "train_size": 48, "batch_size": 16, "lr": 3e-3, "model_options": TINY_MODEL}
ALONE = World(0, 1, torch.device("cpu"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def console():
    return silent()


def settings(tmp_path, **changes):
    return resolve(get("mnist-rot"), {}, {**TINY, "out": str(tmp_path), **changes})


# data

def test_split_is_fixed_and_disjoint():
    train, test = rotated_digits(19)
    assert train.inputs.shape == (4000, 1, 19, 19) and test.inputs.shape == (1000, 1, 19, 19)
    assert train.targets[:8].tolist() == [2, 6, 4, 7, 5, 6, 2, 4]  # reports of different days are comparable
    rotated_digits.cache_clear()
    again, _ = rotated_digits(19)
    assert torch.equal(train.inputs, again.inputs) and torch.equal(train.targets, again.targets)
    counts = torch.bincount(torch.cat([train.targets, test.targets]))
    assert counts.tolist() == [500] * 10  # every digit is in one of the two, once
    assert 0 <= train.inputs.min() and 0.9 < train.inputs.max() <= 1


def test_train_size_takes_the_first_digits(tmp_path):
    experiment = get("mnist-rot")
    small, test = experiment.load(settings(tmp_path))
    large, same_test = experiment.load(settings(tmp_path, train_size=100))
    assert len(small.targets) == 48 and torch.equal(large.inputs[:48], small.inputs)
    assert torch.equal(test.inputs, same_test.inputs)
    with pytest.raises(ValueError, match="4000 digits"):
        experiment.load(settings(tmp_path, train_size=4001))


def test_every_network_for_digits_gets_images_of_its_size(tmp_path):
    for model in get("mnist-rot").models:
        config = settings(tmp_path, model=model, model_options={})
        train, test = get("mnist-rot").load(config)
        assert train.inputs.shape[1:] == test.inputs.shape[1:] == models.input_shape(model)


def test_render_turns_counterclockwise_about_the_centre():
    images = digits()[0][[0, 1000, 2000]]
    upright = render(images, torch.zeros(3), 29)
    assert torch.allclose(render(images, torch.full((3,), 90.0), 29), upright.rot90(1, (2, 3)), atol=1e-5)
    assert (render(images, torch.full((3,), 45.0), 29) - upright).norm() > 0.3 * upright.norm()


def test_batches(tmp_path):
    config = settings(tmp_path, train_size=50)
    first, again, later = (learner.batches(config, epoch, ALONE) for epoch in (0, 0, 1))
    assert [len(b) for b in first] == [16] * 3 and len(torch.cat(first).unique()) == 48
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], later[0])
    shares = [learner.batches(config, 0, World(rank, 2, ALONE.device)) for rank in (0, 1)]
    assert sorted(torch.cat([s[0] for s in shares]).tolist()) == sorted(first[0].tolist())
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"):
        learner.batches(config, 0, World(0, 3, ALONE.device))


# settings

@pytest.mark.parametrize("flags, message", [
    ({"epochs": 0}, "epochs must be at least 1"), ({"dtype": "int8"}, "dtype must be one of float32"),
    ({"lr": -1.0}, "lr must be positive"), ({"batch_size": 64}, "more than the 48 training samples"),
    ({"model": "resnet"}, "takes the models .*, not 'resnet'"), ({"epoch": 3}, "unknown settings: epoch"),
    ({"epochs": "3"}, "epochs must be of type int, got '3'"), ({"experiment": "lenses"}, "not 'mnist-rot'"),
    ({"schedule": "linear"}, "schedule must be one of")])
def test_bad_settings(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **flags)


def test_flags_come_before_file_before_defaults(tmp_path):
    (tmp_path / "a.toml").write_text('lr = 0.5\nseed = 3\n[model_options]\nimage_size = 33\n')
    (tmp_path / "a.json").write_text('{"lr": 0.5, "seed": 3, "model_options": {"image_size": 33}}')
    in_file = read_file(tmp_path / "a.json")
    if sys.version_info >= (3, 11):
        assert read_file(tmp_path / "a.toml") == in_file
    config = resolve(get("mnist-rot"), in_file, {"seed": 4, "lr": None, "device": "cpu"})
    assert (config.lr, config.seed, config.model_options, config.epochs) == (0.5, 4, {"image_size": 33}, 31)
    bad = [("b.json", "{", "b.json: Expecting"), ("b.yaml", "", "json or .toml"), ("c.json", "[]", "table")]
    for name, text, message in bad:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / name)
    with pytest.raises(ValueError, match="No such file"):
        read_file(tmp_path / "none.json")


def test_resume_keeps_the_settings(tmp_path):
    saved = plain(settings(tmp_path))
    assert resolve(get("mnist-rot"), {}, {"out": str(tmp_path), "epochs": 5}, saved).epochs == 5
    with pytest.raises(ValueError, match="lr would change"):
        resolve(get("mnist-rot"), {}, {"lr": 1.0}, saved)
    with pytest.raises(ValueError, match="schedule that depends"):
        resolve(get("mnist-rot"), {}, {"epochs": 5}, {**saved, "schedule": "cosine"})


def test_cosine_schedule(tmp_path):
    learns = learner.Learner(settings(tmp_path, schedule="cosine", epochs=40), get("mnist-rot"), ALONE)
    rates = []
    for learns.step in range(121):
        rates.append(learns.learning_rate())
    assert max(rates) == pytest.approx(rates[6]) == pytest.approx(3e-3) and rates[0] < 1e-3 and rates[120] < 1e-6
    assert rates[6:] == sorted(rates[6:], reverse=True)


# files

def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "report.md"
    files.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        files.load_checkpoint(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_text("no")
    with pytest.raises(ValueError, match="not a checkpoint"):
        files.load_checkpoint(tmp_path / "checkpoint.pt")


def test_checkpoints_hold_weights_alone(tmp_path, console):
    """And their bases. Equiconv and escnn load them strictly, and compute the same."""
    config = settings(tmp_path, epochs=1, model_options={**TINY_MODEL, "widths": 6 * [24]})
    training.train(config, get("mnist-rot"), console)
    saved = files.load_checkpoint(tmp_path / "checkpoint.pt")["learner"]["model"]
    ours, theirs = (learner.Learner(replace(config, accelerate=accelerate), get("mnist-rot"), ALONE).model
                    for accelerate in (True, False))
    assert saved.keys() == theirs.state_dict().keys() < ours.state_dict().keys()
    numbers = sum(p.numel() for p in ours.parameters()) * 3  # with Adam's
    numbers += sum(v.numel() for k, v in saved.items() if k.endswith("sampled_basis"))
    assert (tmp_path / "checkpoint.pt").stat().st_size < 1.1 * 4 * numbers
    images = torch.randn(2, 1, 19, 19)
    for model in (ours, theirs):
        model.load_state_dict(saved)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)
    linear = nn.Linear(*2 * [gspaces.no_base_space(group.so3_group()).type(group.so3_group().irrep(0))])
    assert linear.state_dict().keys() - files.weights_of(linear).keys() == {"matrix", "expanded_bias"}
    twice = torch.nn.ModuleList([linear, linear])
    assert not [key for key in files.weights_of(twice) if key.endswith(("matrix", "expanded_bias"))]


# training

def test_training_writes_its_files(tmp_path, console):
    config = settings(tmp_path, accelerate=False)
    assert training.train(config, get("mnist-rot"), console)
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {"checkpoint.pt", "curves.png", "epochs.csv", "report.md", "steps.csv"}
    text = (tmp_path / "report.md").read_text()
    assert "| state | complete |" in text and "| seed | `0` |" in text and "interrupted" not in text
    assert [row["step"] for row in rows(tmp_path / "steps.csv")] == ["1", "2", "3", "4", "5", "6"]
    last = rows(tmp_path / "epochs.csv")[-1]
    state = files.load_checkpoint(tmp_path / "checkpoint.pt")
    again = learner.Learner(config, get("mnist-rot"), ALONE)
    again.load_state(state["learner"])
    loss, score = again.evaluate(get("mnist-rot").load(config)[1])  # of the saved network
    assert float(last["test_loss"]) == pytest.approx(loss, rel=1e-5) and float(last["score"]) == pytest.approx(score)


@pytest.mark.parametrize("step", [1, 2, 3])  # within an epoch, at its end, at the start of the next
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, console, monkeypatch, step):
    experiment = get("mnist-rot")
    whole, cut = settings(tmp_path / "whole"), settings(tmp_path / "cut")
    assert training.train(whole, experiment, console)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert not training.train(cut, experiment, console)
    assert files.load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["learner"]["step"] == step + 1
    assert f"**interrupted** after step {step + 1}" in (tmp_path / "cut" / "report.md").read_text()
    assert training.train(cut, experiment, console, resume=True)
    a, b = (files.load_checkpoint(tmp_path / run / "checkpoint.pt") for run in ("whole", "cut"))
    assert all(torch.equal(a["learner"]["model"][k], v) for k, v in b["learner"]["model"].items())
    losses = [[(row["step"], row["loss"]) for row in rows(tmp_path / run / "steps.csv")] for run in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert len(rows(tmp_path / "cut" / "epochs.csv")) == 2


def test_a_new_run_replaces_an_earlier_one(tmp_path, console, monkeypatch):
    """Nothing of the earlier one stays beside it."""
    experiment, config = get("mnist-rot"), settings(tmp_path)
    assert training.train(config, experiment, console)
    interrupt_at(monkeypatch, 1)
    assert not training.train(config, experiment, console)
    assert not (tmp_path / "epochs.csv").exists() and len(rows(tmp_path / "steps.csv")) == 2


@pytest.fixture
def interruptible():
    """SIGINT interrupts, as in a process of the user's: those of pytest-xdist ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_a_second_signal_acts_at_once(interruptible):
    with pytest.raises(KeyboardInterrupt), StopRequest(ALONE) as stop:
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_divergence_is_reported(tmp_path, console):
    with pytest.raises(training.Diverged, match="lower learning rate"):
        training.train(settings(tmp_path, lr=1e30), get("mnist-rot"), console)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("accelerate", [True, False])
def test_dtypes(tmp_path, dtype, accelerate):
    """The first loss is float32's, but only to the precision of the dtype."""
    losses = []
    for kind in ("float32", dtype):
        config = settings(tmp_path, dtype=kind, accelerate=accelerate)
        learns = learner.Learner(config, get("mnist-rot"), ALONE)
        train, _ = get("mnist-rot").load(config)
        losses.append([learns.learn(train.inputs[b], train.targets[b]) for b in learner.batches(config, 0, ALONE)])
        outputs = learns.outputs(train.inputs[:2])
        assert outputs.dtype == (torch.float64 if kind == "float64" else torch.float32)
    first = [steps[0].item() for steps in losses]
    assert 0 < abs(first[0] - first[1]) < {"float64": 1e-5, "bfloat16": 0.1, "float16": 0.01}[dtype]
    assert torch.stack(losses[1]).isfinite().all()


def test_the_network_learns(tmp_path, console):
    """Twelve steps on the same 16 digits: the loss must fall."""
    config = settings(tmp_path, train_size=16, epochs=12, lr=0.03)
    training.train(config, get("mnist-rot"), console)
    losses = [float(row["loss"]) for row in rows(tmp_path / "steps.csv")]
    assert losses[-1] < 0.8 * losses[0]


# two processes

NOTE_GRADIENTS = """
import torch
from equiconv.cli import main
from equiconv.experiments import learner
learn = learner.Learner.learn
def noted(self, *batch):
    loss = learn(self, *batch)
    if self.step == 1:
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        torch.save((gradients, self.model.state_dict()), f"rank{self.world.rank}.pt")
    return loss
learner.Learner.learn = noted
main()
"""


def test_two_processes(tmp_path):
    """torchrun: gradients are averaged, every process has the weights and bases of the first, one of them speaks."""
    (tmp_path / "settings.json").write_text(json.dumps({**TINY, "epochs": 1}))
    (tmp_path / "script.py").write_text(NOTE_GRADIENTS)
    # Each process orders its sets in a way of its own, as it is by default.
    environment = {**os.environ, "PYTHONHASHSEED": "random", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py",
               "train", "--config", "settings.json", "--out", "out"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    assert "| processes | 2 |" in (tmp_path / "out" / "report.md").read_text()

    (gradients, state), (other_gradients, other_state) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(g, other_gradients[name]) for name, g in gradients.items())
    own = [name for name in state if "running" in name]  # each process normalises its own half of a batch
    assert own and all(torch.equal(v, other_state[name]) for name, v in state.items() if name not in own)

    # The same step in one process: the mean of the losses of both halves.
    config, experiment = settings(tmp_path, epochs=1), get("mnist-rot")
    train, test = experiment.load(config)
    alone = learner.Learner(config, experiment, ALONE)
    halves = [learner.batches(config, 0, World(rank, 2, ALONE.device))[0] for rank in (0, 1)]
    loss = sum(experiment.loss(alone.model(train.inputs[half]), train.targets[half]) for half in halves) / 2
    loss.backward()
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, p in alone.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert float(rows(tmp_path / "out" / "steps.csv")[0]["loss"]) == pytest.approx(loss.item(), rel=1e-5)

    # The checkpoint is the network that was evaluated.
    alone.load_state(files.load_checkpoint(tmp_path / "out" / "checkpoint.pt")["learner"])
    reported = rows(tmp_path / "out" / "epochs.csv")[-1]["test_loss"]
    assert float(reported) == pytest.approx(alone.evaluate(test)[0], rel=1e-5)


# the demonstration

def test_demo(tmp_path, console):
    config = settings(tmp_path, epochs=3, schedule="cosine")
    assert demo.run(config, get("mnist-rot"), console, time_construction=False)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "demo.png", "report.md", "steps.csv"}
    steps = rows(tmp_path / "steps.csv")
    assert len(steps) == 9 and set(steps[0]) == {"step", "escnn_loss", "equiconv_loss", "escnn_ms", "equiconv_ms"}
    assert float(steps[0]["escnn_loss"]) == pytest.approx(float(steps[0]["equiconv_loss"]), rel=1e-5)
    text = (tmp_path / "report.md").read_text()
    assert "**Interrupted**" not in text and "test accuracy (%)" in text and "](demo.png)" in text
    record = demo.Record(**files.load_checkpoint(tmp_path / "checkpoint.pt")["record"])
    assert 0 < record.difference < 1e-4


def test_demo_resumes(tmp_path, console, monkeypatch):
    monkeypatch.setattr(demo, "BLOCK", 2)
    experiment = get("mnist-rot")
    whole, cut = settings(tmp_path / "whole"), settings(tmp_path / "cut")
    assert demo.run(whole, experiment, console, time_construction=False)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert not demo.run(cut, experiment, console, time_construction=False)
    assert "**Interrupted** after step 3" in (tmp_path / "cut" / "report.md").read_text()
    assert demo.run(cut, experiment, console, resume=True, time_construction=False)
    assert "**Interrupted**" not in (tmp_path / "cut" / "report.md").read_text()
    losses = [[(row["escnn_loss"], row["equiconv_loss"]) for row in rows(tmp_path / run / "steps.csv")]
              for run in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_demo_takes_the_faster_number_of_threads(tmp_path, console, monkeypatch):
    chosen = []
    monkeypatch.setattr(demo._Demo, "measure_untrained", lambda *_: chosen.append(torch.get_num_threads()))
    for fastest in (1, 3):
        torch.set_num_threads(3)
        monkeypatch.setattr(demo._Demo, "forward_seconds", lambda _, threads, fastest=fastest: abs(threads - fastest))
        demo.run(settings(tmp_path, epochs=1), get("mnist-rot"), console)
        assert torch.get_num_threads() == 3  # as before
    assert chosen == [1, 3]


def test_demo_ratios_pair_neighbouring_turns():
    """A slowdown of the machine that meets both networks alike must not show in the ratio."""
    blocks = [[10.0] * 5, [40.0] * 5, [10.0] * 5, [90.0] * 5, [20.0] * 5]
    slow = sum(blocks, [])
    record = demo.Record(milliseconds={"escnn": [2 * t for t in slow], "equiconv": slow})
    assert record.ratios() == [2.0] * 3  # the first two turns are warm-up
    table = {row[0]: row[1:] for row in demo.results(record, "accuracy (%)")}
    assert table["median step (ms)"] == (f"{2 * statistics.median(slow[10:]):.1f}", "20.0", "2.00")
    assert table["test accuracy (%)"][:2] == ("-", "-")


def test_config_is_saved_as_plain_values(tmp_path):
    config = settings(tmp_path, model_options={"widths": (1, 2)})
    assert Config(**json.loads(json.dumps(plain(config)))).model_options == {"widths": [1, 2]}
