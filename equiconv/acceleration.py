"""accelerate(): an escnn model becomes an equiconv model, in place."""
from dataclasses import dataclass

from escnn import nn
from escnn.nn import EquivariantModule
from torch.nn import Module, Sequential

from .nn import ACCELERATED, containers
from .nn.batchnorm import _BatchNorm
from .nn.planner import METHODS, Planned

#: why classes of escnn are left
PLAIN = {**dict.fromkeys((nn.ReLU, nn.ELU, nn.LeakyReLU), "one kernel of torch already"),
         **dict.fromkeys((nn.IdentityModule, nn.RestrictionModule), "computes nothing")}


@dataclass(frozen=True)
class Row:
    """What became of one module: its name in the model, its class, its status and the reason for it.

    status  "accelerated", "left", or "folded" of a batch norm that in evaluation is part of the convolution before it
    reason  why it was left; where folding was asked for, why an accelerated batch norm is not folded
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


def accelerate(model, *, method=None, fold=None, verbose=False):
    """Converts every supported escnn module of a built model in place, and returns the model.

    Modules stay the same objects: parameters, hooks, names, mode, device and dtype are untouched, and optimizers and
    references to them stay valid. Modules without an accelerated class, and classes of the user's own, are left as
    they are. A second call changes nothing.

    model    torch.nn.Module (an escnn module, or any module that contains some)
    method   of all its convolutions, one of nn.planner.METHODS ("auto", "dense", ...); None: as they are, which is
             "auto" for new ones
    fold     whether, in evaluation, a batch norm of fields becomes part of the filter and bias of the convolution
             directly before it in a SequentialModule or torch.nn.Sequential: one pass over the features less. Training,
             parameters and state_dict are untouched, evaluation with gradients of parameters too; what is folded is
             made again as soon as one of the numbers changes that it was made of. None: as it is, which is not for
             new models
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
    for module in model.modules():
        if type(module) is Sequential and (_pairs(module, containers.is_activated_pair)
                                           or fold and _pairs(module, containers.is_folding_pair)):
            module.__class__ = containers.Sequential
        if fold is not None and isinstance(module, containers._Sequence):
            module.folds = bool(fold)
    if verbose:
        print(acceleration_report(model))
    return model


def convert_sync_batchnorm(model, process_group=None):
    """Makes every batch norm of fields use the statistics of all processes, in place, and returns the model.

    Values, gradients and running statistics are those of one process with the whole batch, under
    DistributedDataParallel and a loss that is the mean over the batch; processes may have different numbers of images.
    torch's own batch norms in the model are left: torch.nn.SyncBatchNorm.convert_sync_batchnorm is for the part of the
    model that has them.

    model          torch.nn.Module; escnn's batch norms in it are accelerated
    process_group  of torch.distributed; None: the default one. One process alone computes as before

    Raises TypeError if model is not a module.
    """
    for module in _modules(model).values():
        cls = ACCELERATED.get(type(module))
        if cls is not None and issubclass(cls, _BatchNorm):
            accelerate(module)
        if isinstance(module, _BatchNorm):
            module.synchronised, module.process_group = True, process_group
    return model


def acceleration_report(model):
    """AccelerationReport of the equivariant modules of a model: which are accelerated, which are not and why.

    Containers, which compute nothing themselves, are left out.
    """
    rows, modules = AccelerationReport(), _modules(model)
    folded = _folded(modules)
    for name, module in modules.items():
        cls = type(module)
        if isinstance(module, containers.SequentialModule):
            continue
        elif module in folded:
            rows.append(Row(name, cls.__name__, *folded[module]))
        elif isinstance(module, tuple(ACCELERATED.values())):
            rows.append(Row(name, cls.__name__, "accelerated", method=getattr(module, "method", "")))
        elif cls in ACCELERATED:
            rows.append(Row(name, cls.__name__, "left", "not converted yet: call equiconv.accelerate"))
        elif isinstance(module, tuple(ACCELERATED)):
            rows.append(Row(name, cls.__name__, "left", "a subclass of its own, which may compute something else"))
        elif isinstance(module, EquivariantModule) and not _is_container(module):
            rows.append(Row(name, cls.__name__, "left", PLAIN.get(cls, "no accelerated version yet")))
    return rows


def _pairs(sequence, condition):
    """The pairs of modules that follow each other in a sequence and meet the condition."""
    children = list(sequence.children())
    return [pair for pair in zip(children, children[1:]) if condition(*pair)]


def _folded(modules):
    """{batch norm: (status, reason)} of a model that was to be folded."""
    names = {module: name for name, module in modules.items()}
    sequences = [m for m in modules.values() if isinstance(m, containers._Sequence) and m.folds]
    if not sequences:
        return {}
    alone = "not folded: no convolution directly before it in a SequentialModule or torch.nn.Sequential"
    found = {m: ("accelerated", alone) for m in modules.values() if isinstance(m, _BatchNorm)}
    for convolution, norm in (p for s in sequences for p in _pairs(s, containers.is_folding_pair)):
        problem = convolution.why_not_foldable(norm)
        found[norm] = (("folded", f"in evaluation, into {names[convolution]!r}") if problem is None
                       else ("accelerated", f"not folded: {problem}"))
    return found


def _is_container(module):
    return any(isinstance(child, EquivariantModule) for child in module.children())


def _modules(model):
    if not isinstance(model, Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    return dict(model.named_modules())
