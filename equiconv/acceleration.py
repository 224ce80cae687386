"""accelerate(): an escnn model becomes an equiconv model, in place."""
from dataclasses import dataclass

from escnn.nn import EquivariantModule
from torch.nn import Module

from .nn import ACCELERATED
from .nn.planner import METHODS, Planned


@dataclass(frozen=True)
class Row:
    """What became of one module: its name in the model, its class, "accelerated" or "left", and the reason if left.

    method  of a convolution that is accelerated: "auto", "factorised" or "dense"
    """
    name: str
    cls: str
    status: str
    reason: str = ""
    method: str = ""


class AccelerationReport(list):
    """List of Row; prints as a table."""

    def __str__(self):
        if not self:
            return "no equivariant modules"
        cells = [("module", "class", "status", "method", "reason")]
        cells += [(row.name or "(the model)", row.cls, row.status, row.method, row.reason) for row in self]
        widths = [max(map(len, column)) for column in zip(*cells)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells)


def accelerate(model, *, method=None, verbose=False):
    """Converts every supported escnn module of a built model in place, and returns the model.

    Modules stay the same objects: parameters, hooks, names, mode, device and dtype are untouched, and optimizers and
    references to them stay valid. Modules without an accelerated class, and classes of the user's own, are left as
    they are. A second call changes nothing.

    model    torch.nn.Module (an escnn module, or any module that contains some)
    method   of all its convolutions, one of nn.planner.METHODS ("auto", "dense", ...); None: as they are, which is
             "auto" for new ones
    verbose  print acceleration_report(model) afterwards

    Raises TypeError if model is not a module, ValueError for another method.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"accelerate: method must be one of {METHODS}, got {method!r}")
    for module in _modules(model).values():
        cls = ACCELERATED.get(type(module))
        if cls is not None:
            module.__class__ = cls
            module._adopt()
        if method is not None and isinstance(module, Planned):
            module.method = method
    if verbose:
        print(acceleration_report(model))
    return model


def acceleration_report(model):
    """AccelerationReport of the equivariant modules of a model: which are accelerated, which are not and why.

    Containers, which compute nothing themselves, are left out.
    """
    rows = AccelerationReport()
    for name, module in _modules(model).items():
        cls = type(module)
        if isinstance(module, tuple(ACCELERATED.values())):
            rows.append(Row(name, cls.__name__, "accelerated", method=getattr(module, "method", "")))
        elif cls in ACCELERATED:
            rows.append(Row(name, cls.__name__, "left", "not converted yet: call equiconv.accelerate"))
        elif isinstance(module, tuple(ACCELERATED)):
            rows.append(Row(name, cls.__name__, "left", "a subclass of its own, which may compute something else"))
        elif isinstance(module, EquivariantModule) and not _is_container(module):
            rows.append(Row(name, cls.__name__, "left", "no accelerated version yet"))
    return rows


def _is_container(module):
    return any(isinstance(child, EquivariantModule) for child in module.children())


def _modules(model):
    if not isinstance(model, Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    return dict(model.named_modules())
