"""The networks by name."""
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .complexity import complexity as complexity_of

_MODELS = {}


@dataclass(frozen=True)
class _Model:
    build: Callable
    citation: str
    input_shape: tuple
    group: str
    twin: tuple | None


def register(*, input_shape, citation="", group="", twin=None, name=None):
    """Decorator: registers the function build(nn, **options) -> torch.nn.Module.

    input_shape  of one input at the published sizes, without the batch: (C, H, W) for images
    citation     where the network was published, as one line
    group        to which it is equivariant at the published sizes, like C8; none of a conventional network
    twin         of a conventional network: (name of the one that it is compared with, "parameters" or "width": what
                 both have as many of)
    name         by default the function's own
    """
    if twin is not None:
        what = f"conventional twin of {twin[0]}, of equal {twin[1]}"
        citation = f"{what}: {citation}" if citation else what

    def decorate(build):
        _MODELS[name or build.__name__] = _Model(build, citation, input_shape, group, twin)
        return build
    return decorate


def names():
    """The names of the networks, sorted."""
    return sorted(_MODELS)


def citation(name):
    """Where the network was published. Raises ValueError for an unknown name."""
    return _find(name).citation


def input_shape(name):
    """Shape of one input at the published sizes, without the batch. Raises ValueError for an unknown name."""
    return _find(name).input_shape


def group(name):
    """To which the network is equivariant at the published sizes, like "C8"; "" of a conventional one.

    Raises ValueError for an unknown name.
    """
    return _find(name).group


def twin(name):
    """(name of the network that a conventional one is compared with, "parameters" or "width": what is equal), or None.

    Raises ValueError for an unknown name.
    """
    return _find(name).twin


def complexity(name):
    """Complexity (parameters, macs) of the network at the published sizes, for one input.

    Neither weights nor activations are allocated. Raises ValueError for an unknown name.
    """
    with torch.device("meta"):
        model = create(name)
    return complexity_of(model, input_shape(name))


def create(name, nn=None, **options):
    """The network of that name, its weights drawn from torch's global generator.

    name     one of names()
    nn       namespace of layers: escnn.nn, equiconv.nn (default)
    options  of the network: sizes, group order, ... ; its defaults are the published ones

    Raises ValueError for an unknown name, an unknown option or a value that the network cannot have.
    """
    build = _find(name).build
    known = list(inspect.signature(build).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"model {name!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    if nn is None:
        from .. import nn
    return build(nn, **options)


def _find(name):
    if name not in _MODELS:
        raise ValueError(f"there is no model {name!r}; there are {', '.join(names())}")
    return _MODELS[name]
