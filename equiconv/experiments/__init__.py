"""Experiments that train the published networks on data that needs no download.

An experiment is one file that defines EXPERIMENT, and one line here.
"""
from importlib import import_module

_FILES = {"mnist-rot": "mnist_rot"}


def names():
    """The names of the experiments, sorted."""
    return sorted(_FILES)


def get(name):
    """The Experiment of that name. Raises ValueError for an unknown one."""
    if name not in _FILES:
        raise ValueError(f"there is no experiment {name!r}; there are {', '.join(names())}")
    return import_module(f".{_FILES[name]}", __name__).EXPERIMENT
