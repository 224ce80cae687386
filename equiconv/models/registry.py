"""The networks by name."""
import inspect
from types import SimpleNamespace

_MODELS = {}


def register(*, citation):
    """Decorator: registers the function build(nn, **options) -> torch.nn.Module under its own name.

    citation  where the network was published, as one line
    """
    def decorate(build):
        _MODELS[build.__name__] = SimpleNamespace(build=build, citation=citation)
        return build
    return decorate


def names():
    """The names of the networks, sorted."""
    return sorted(_MODELS)


def citation(name):
    """Where the network was published. Raises ValueError for an unknown name."""
    return _find(name).citation


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
