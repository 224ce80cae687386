"""The settings of a run: defaults, then a file, then flags."""
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from .. import models
from .augmentation import AUGMENTATIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SCHEDULES = ("constant", "cosine", "steps")
OPTIMIZERS = ("adam", "amsgrad", "sgd")
FREE_ON_RESUME = ("device", "compile", "out", "epochs", "data")


@dataclass(frozen=True)
class Config:
    """batch_size    samples of a step, over all processes
    train_size    samples that are used to train
    test_every    epochs from one test to the next; the last epoch is tested always
    dtype         bfloat16 and float16 through autocast; float64 also for the weights
    optimizer     "adam", "amsgrad" or "sgd" (Nesterov momentum 0.9)
    schedule      of the learning rate: "constant"; "cosine" down to zero after a short warm-up; or "steps": to a fifth
                  after 30, 60 and 80 percent of all steps
    augmentation  of the training samples, in every step anew: a name in augmentation.AUGMENTATIONS
    accelerate    build the model from equiconv.nn, else from escnn.nn
    image_size    pixels of the inputs along each axis; 0 for what the model takes at its published sizes
    data          folder of the experiment's data, where it needs one or keeps one
    out           folder of everything that the run writes
    """
    experiment: str
    model: str
    model_options: dict = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    epochs: int = 10
    batch_size: int = 64
    train_size: int = 1000
    test_every: int = 1
    seed: int = 0
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: str = "adam"
    schedule: str = "constant"
    augmentation: str = "none"
    accelerate: bool = True
    compile: bool = False
    image_size: int = 0
    data: str = ""
    out: str = ""

    def __post_init__(self):
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name), f.type)
        for name in ("epochs", "batch_size", "train_size", "test_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "image_size", "weight_decay"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.lr > 0, f"lr must be positive, got {self.lr}")
        for name, allowed in (("dtype", DTYPES), ("schedule", SCHEDULES), ("optimizer", OPTIMIZERS),
                              ("augmentation", AUGMENTATIONS), ("device", ("cpu", "cuda")),
                              ("model", models.names())):
            value = getattr(self, name)
            _require(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        _require(self.device == "cpu" or torch.cuda.is_available(), "device is cuda, but torch finds no CUDA device")
        _require(self.batch_size <= self.train_size,
                 f"batch_size is {self.batch_size}, more than the {self.train_size} training samples")


def resolve(experiment, file_settings, flags, saved=None):
    """The Config of an Experiment: its defaults (or, to resume, the saved settings), then a file's, then the flags.

    file_settings, flags  dicts; flags that are None were not given
    saved                 settings of the run to resume, or None

    Raises ValueError for unknown names, bad values, and changes that a resumed run cannot take.
    """
    given = {**file_settings, **{name: value for name, value in flags.items() if value is not None}}
    known = {f.name for f in fields(Config)}
    _require(set(given) <= known, f"unknown settings: {', '.join(sorted(set(given) - known))}")
    _require(given.get("experiment", experiment.name) == experiment.name,
             f"the settings are for experiment {given.get('experiment')!r}, not {experiment.name!r}")
    base = {"model": experiment.models[0], "out": f"runs/{experiment.name}", **experiment.defaults,
            "device": "cuda" if torch.cuda.is_available() else "cpu"}
    if given.get("model", base["model"]) != base["model"]:
        base.pop("model_options", None)  # they are the default model's
    if saved is not None:
        changed = [n for n in given if n not in FREE_ON_RESUME and _plain(given[n]) != saved[n]]
        _require(not changed, f"a run is resumed with its own settings; {', '.join(changed)} would change")
        _require(saved["schedule"] == "constant" or given.get("epochs", saved["epochs"]) == saved["epochs"],
                 "epochs cannot change under a schedule that depends on them")
        base = {**saved, "device": base["device"]}
    settings = {**base, **given, "experiment": experiment.name}
    _require(settings["model"] in experiment.models, f"experiment {experiment.name!r} takes the models "
             f"{', '.join(experiment.models)}, not {settings['model']!r}")
    return Config(**settings)


def read_file(path):
    """The settings in a JSON or TOML file, as a dict. Raises ValueError that says what is wrong with it."""
    path = Path(path)
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"{path}: settings are read from .json or .toml")
    try:
        settings = json.loads(path.read_text()) if path.suffix == ".json" else _toml(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _require(isinstance(settings, dict), f"{path}: settings must be a table of names and values")
    return settings


def plain(config):
    """The settings as plain values, as they are saved."""
    return _plain(asdict(config))


def _plain(value):
    return json.loads(json.dumps(value))


def _toml(text):
    try:
        import tomllib
    except ImportError as error:
        raise ValueError("TOML needs Python 3.11; use JSON") from error
    return tomllib.loads(text)


def _check_type(name, value, type_):
    ok = isinstance(value, (int, float) if type_ is float else type_) and (type_ is bool or not isinstance(value, bool))
    _require(ok, f"{name} must be of type {type_.__name__}, got {value!r}")


def _require(condition, message):
    if not condition:
        raise ValueError(message)
