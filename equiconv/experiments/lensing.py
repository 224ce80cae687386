"""Which dark matter is in a gravitational lens? Three classes of simulated images."""
from functools import lru_cache

import torch

from . import figures
from .data import Split, image_size
from .experiment import Comparison, Experiment, Network
from .lenses import CLASSES, simulated
from .metrics import auc, one_against_rest, roc

COUNT = 3000  # images, of which the first are for tests
TEST_SIZE = 600
SIZE = 53  # pixels: odd, so that networks with strides can be equivariant
FOLDER = "runs/data"


@lru_cache(1)
def lenses(folder, count, size):
    """(train, test): Splits of images [n, 1, size, size]."""
    images, classes = simulated(folder, count, size)
    inputs, targets = torch.from_numpy(images)[:, None], torch.from_numpy(classes)
    return Split(inputs[TEST_SIZE:], targets[TEST_SIZE:]), Split(inputs[:TEST_SIZE], targets[:TEST_SIZE])


def load(config):
    size = image_size(config, SIZE)
    count = max(COUNT, config.train_size + TEST_SIZE)
    whole = lenses(config.data or FOLDER, count, size + (size + 1) % 2)  # some networks take even sizes: less one row
    train, test = (Split(split.inputs[..., :size, :size], split.targets) for split in whole)
    return train.first(config.train_size), test


def areas(outputs, targets):
    """{column: area under the ROC curve} of each class against the others, and their mean."""
    found = [auc(*pair) for pair in one_against_rest(outputs, targets)]
    return {**{f"AUC {name}": area for name, area in zip(CLASSES, found)}, "AUC": sum(found) / len(found)}


def draw(folder, test, outputs):
    def curves(_, axes):
        for c, name in enumerate(CLASSES):
            axes[c].plot([0, 1], [0, 1], color="0.7", lw=0.8)
            for (title, scores), look in zip(outputs.items(), figures.LINES):
                pair = one_against_rest(scores, test.targets)[c]
                axes[c].plot(*roc(*pair), label=f"{title}: AUC {auc(*pair):.3f}", **{**look, "marker": None})
            axes[c].set(xlabel="false positive rate", ylabel="true positive rate", title=name, aspect="equal",
                        xlim=(0, 1), ylim=(0, 1))
            axes[c].legend(loc="lower right", fontsize=7)
    figures.save(folder / "roc.png", 10, 3.6, 3, curves)
    figures.examples(folder / "lenses.png", [test.inputs[test.targets == c][:6, 0] for c in range(3)], CLASSES,
                     "inferno", label="brightness")
    return {"roc.png": "ROC curves of each class against the others",
            "lenses.png": "Simulated lenses of the test set: six of each class"}


def _network(title, model, settings=(), **options):
    return Network(title, {"model": model, "model_options": {"classes": 3, **options}, **dict(settings)})


def _resnet(title, **settings):
    """With a receptive field as large as the lens: a 7x7 stem and a stride in the first stage, as ResNet18 has them."""
    return _network(title, "wrn10_4", settings, widths=[15, 30, 60], stem_kernel=7, stride=2, dropout=0.0,
                    in_channels=1)


EXPERIMENT = Experiment(
    name="lensing",
    summary="strong gravitational lenses, simulated with lenstronomy: " + ", ".join(CLASSES),
    load=load,
    models=("deeplense_c4_cnn", "hnet", "equivariant_transformer_rotation", "wrn10_4"),
    defaults={"epochs": 30, "batch_size": 64, "train_size": COUNT - TEST_SIZE, "lr": 1e-4,
              "model_options": {"flatten": False, "image_size": SIZE}},
    # 66 000 to 70 000 weights each: the published C4 network with a quarter of its fields, and its equals. Those with
    # cheaper steps take more of them, for about as many seconds.
    comparison=Comparison(
        networks={"c4": _network("C4 CNN", "deeplense_c4_cnn", widths=[6, 12, 12, 24, 24, 16], flatten=False,
                                 image_size=SIZE),
                  "h-net": _network("H-Net", "hnet", features=6, gain=3, image_size=SIZE - 1),
                  "et": _network("ET", "equivariant_transformer_rotation", {"epochs": 20}, features=36),
                  "resnet": _resnet("ResNet", epochs=30),
                  "resnet-augmented": _resnet("ResNet, rotations added", epochs=30, augmentation="rotation")},
        train_sizes=(COUNT - TEST_SIZE,),
        settings={"epochs": 10, "batch_size": 16, "lr": 2e-3, "schedule": "cosine"},
        figures=draw,
        details=areas,
    ),
)
