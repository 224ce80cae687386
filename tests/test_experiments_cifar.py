"""CIFAR from files of the original format, made here."""
import numpy as np
import pytest
import torch

from equiconv.experiments import cifar, get
from equiconv.experiments.config import resolve
from equiconv.experiments.data import MissingData
from tests.experiment_runs import compare

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"depth": 10, "dropout": 0.0}


def write(folder, classes, count=16):
    """Files of `count` records each; the bytes of every one, by name."""
    cifar.read.cache_clear()
    rng, written = np.random.default_rng(classes), {}
    train_files, test_file = cifar.FILES[classes]
    for name in (*train_files, test_file):
        records = rng.integers(0, 256, (count, cifar.LABELS[classes] + 3072), dtype=np.uint8)
        records[:, 0] %= 10 if classes == 10 else 20
        records[:, cifar.LABELS[classes] - 1] %= classes
        records.tofile(folder / name)
        written[name] = records
    return written


@pytest.mark.parametrize("classes", [10, 100])
def test_records_are_read(tmp_path, classes):
    written = write(tmp_path, classes)
    train, test = cifar.read(str(tmp_path), classes)
    labels = cifar.LABELS[classes]
    records = np.concatenate([r for name, r in written.items() if not name.startswith("test")])
    assert len(train.targets) == (80 if classes == 10 else 16) and len(test.targets) == 16
    assert train.targets.tolist() == records[:, labels - 1].tolist()
    # Red, green, blue; each by rows; normalised by the training images.
    raw = records[:, labels:].reshape(-1, 3, 32, 32) / 255.0
    expected = (raw - raw.mean((0, 2, 3), keepdims=True)) / raw.std((0, 2, 3), keepdims=True, ddof=1)
    assert np.allclose(train.inputs.numpy(), expected, atol=1e-5)
    pixel = next(r for n, r in written.items() if n.startswith("test"))[5, labels + 1024 + 2 * 32 + 7] / 255.0
    mean, deviation = raw.mean((0, 2, 3))[1], raw.std((0, 2, 3), ddof=1)[1]
    assert test.inputs[5, 1, 2, 7].item() == pytest.approx((pixel - mean) / deviation, abs=1e-5)


def test_bad_files(tmp_path):
    def load(**settings):
        cifar.read.cache_clear()
        experiment = get("cifar")
        return experiment.load(resolve(experiment, {"train_size": 64, "batch_size": 8, "device": "cpu"}, settings))
    with pytest.raises(MissingData, match="which --data names"):
        load()
    with pytest.raises(MissingData, match="data_batch_1.bin: there is no such file"):
        load(data=str(tmp_path))
    write(tmp_path, 10)
    assert load(data=str(tmp_path))[0].inputs.shape == (64, 3, 32, 32)
    with pytest.raises(ValueError, match="train_size is 81, but there are 80"):
        load(data=str(tmp_path), train_size=81)
    with pytest.raises(ValueError, match="CIFAR-10 has 10 classes"):
        load(data=str(tmp_path), model_options={"classes": 100})
    (tmp_path / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match="have 3073 bytes, and 3072 are no multiple"):
        load(data=str(tmp_path))
    (tmp_path / "test_batch.bin").write_bytes(bytes([11]) + bytes(3072))
    with pytest.raises(ValueError, match="classes of CIFAR-10 are 0 to 9, but there is 11"):
        load(data=str(tmp_path))


def test_both_networks_train(tmp_path):
    write(tmp_path, 100)
    networks = {"e2wrn10-4": {"model_options": {"widening": 1, "classes": 100, "delta_orthogonal": False, **SMALL}},
                "wrn10-4": {"model_options": {"widths": [4, 8, 8], "classes": 100, **SMALL}}}
    table = compare(get("cifar100"), tmp_path / "out", networks, [8], data=str(tmp_path))
    assert [row["network"] for row in table] == list(networks)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "crop-flip" in text and "| sgd |" in text


def test_schedule_in_steps(tmp_path):
    from equiconv.experiments.learner import Learner
    from equiconv.experiments.processes import World
    experiment = get("cifar")
    config = resolve(experiment, {"model": "wrn10_4"}, {
        "model_options": {"widths": [1, 1, 1]}, "device": "cpu", "epochs": 10, "train_size": 80, "batch_size": 8})
    learns = Learner(config, experiment, World(0, 1, torch.device("cpu")))
    rates = []
    for learns.step in range(100):
        rates.append(learns.learning_rate())
    assert isinstance(learns.optimizer, torch.optim.SGD)
    assert [rates.count(rate) for rate in sorted(set(rates), reverse=True)] == [30, 30, 20, 20]
    assert rates[0] == 0.1 and rates[-1] == pytest.approx(0.1 * 0.2 ** 3)
