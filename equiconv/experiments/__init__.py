"""Experiments that train the published networks on data that need no download, or lie in a folder.

An experiment is one file that defines an Experiment, and one line here.
"""
from importlib import import_module

_FILES = {"cifar": ("cifar", "CIFAR10"), "cifar100": ("cifar", "CIFAR100"), "lensing": ("lensing", "EXPERIMENT"),
          "mnist-rot": ("mnist_rot", "EXPERIMENT"), "projective": ("projective", "EXPERIMENT"),
          "volumes": ("volumes", "EXPERIMENT"), "volumes-brain": ("brain", "EXPERIMENT")}


def names():
    """The names of the experiments, sorted."""
    return sorted(_FILES)


def get(name):
    """The Experiment of that name. Raises ValueError for an unknown one."""
    if name not in _FILES:
        raise ValueError(f"there is no experiment {name!r}; there are {', '.join(names())}")
    file, attribute = _FILES[name]
    return getattr(import_module(f".{file}", __name__), attribute)


def taking(model):
    """The names of the experiments that take a model, sorted."""
    return [name for name in names() if model in get(name).models]
