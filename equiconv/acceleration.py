"""accelerate(): an escnn model becomes an equiconv model, in place."""
from dataclasses import dataclass

from escnn import nn
from escnn.nn import EquivariantModule
from torch.nn import Module, Sequential

from .nn import ACCELERATED, containers
from .nn.batchnorm import _BatchNorm
from .nn.irrep_domain import bases_of_modules
from .nn.planner import METHODS, Planned, planned_of

#: why classes of escnn are left
PLAIN = {**dict.fromkeys((nn.ReLU, nn.ELU, nn.LeakyReLU), "one kernel of torch already"),
         **dict.fromkeys((nn.IdentityModule, nn.RestrictionModule), "computes nothing")}


@dataclass(frozen=True)
class Row:
    """What became of one module: its name in the model, its class, its status and the reason for it.

    status  "accelerated", "left", or "folded" of what in evaluation is part of the convolution before it
    reason  why it was left; where folding was asked for, why an accelerated batch norm is not folded
    method  of a convolution that is accelerated: "auto", "factorised" or "dense"
    basis   "a -> b" where features stay in the basis of their irreps: what is read and what is written, "fields" or
            "irreps"; else ""
    """
    name: str
    cls: str
    status: str
    reason: str = ""
    method: str = ""
    basis: str = ""


class AccelerationReport(list):
    """List of Row; prints as a table."""

    def __str__(self):
        if not self:
            return "no equivariant modules"
        cells = [("module", "class", "status", "method", "basis", "reason")]
        cells += [(row.name or "(the model)", row.cls, row.status, row.method, row.basis, row.reason) for row in self]
        widths = [max(map(len, column)) for column in zip(*cells)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells)


def accelerate(model, *, method=None, fold=None, irrep_domain=None, verbose=False):
    """Converts every supported escnn module of a built model in place, and returns the model.

    Modules stay the same objects: parameters, hooks, names, mode, device and dtype are untouched, and optimizers and
    references to them stay valid. Modules without an accelerated class, and classes of the user's own, are left as
    they are. A second call changes nothing.

    model    torch.nn.Module (an escnn module, or any module that contains some)
    method   of all its convolutions, one of nn.planner.METHODS ("auto", "dense", ...); None: as they are, which is
             "auto" for new ones
    fold     whether, in evaluation, a batch norm of fields becomes part of the filter and bias of the convolution
             directly before it in a SequentialModule or torch.nn.Sequential, and a pointwise function (ReLU, ELU,
             LeakyReLU, PointwiseNonLinearity) after either of them is applied as the result is written: one pass
             over the features instead of three. Training, parameters and state_dict are untouched, evaluation with
             gradients of parameters too; what is folded is made again as soon as one of the numbers changes that it was
             made of. None: as it is, which is not for new models
    irrep_domain  whether features stay in the basis of their irreps from one convolution of a sequence to the next,
             where the modules between them allow it (see nn/irrep_domain.py), so that each change of basis is applied
             once. Results, types, parameters and state_dict stay what they are. On a CPU it gains nothing in most
             networks, and costs up to a fifth where pointwise functions lie between. None: as it is, which is not for
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
        if method is not None and (planned := planned_of(module)) is not None:
            planned.method = method
    for module in model.modules():
        if type(module) is Sequential and (_pairs(module, containers.is_activated_pair)
                                           or fold and _pairs(module, containers.is_folding_pair)
                                           or fold and _pairs(module, containers.is_epilogue)
                                           or irrep_domain and any(isinstance(m, Planned) for m in module.modules())):
            module.__class__ = containers.Sequential
        if fold is not None and isinstance(module, containers._Sequence):
            module.folds = bool(fold)
        if irrep_domain is not None and isinstance(module, containers._Sequence):
            module.irrep_domain = bool(irrep_domain)
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
    modules = _modules(model)
    folded, bases = _activated(modules) | _folded(modules), _bases(modules)
    return AccelerationReport(
        Row(name, type(module).__name__, *status, getattr(module, "method", "") if status[0] == "accelerated" else "",
            bases.get(module, ""))
        for name, module in modules.items() if (status := folded.get(module) or _status(module)))


def _status(module):
    """(status, reason) of a module, or None where there is nothing to say of it."""
    cls = type(module)
    if isinstance(module, containers.SequentialModule):
        return None
    if isinstance(module, tuple(ACCELERATED.values())) or planned_of(module) is not None:
        return "accelerated", ""
    if cls in ACCELERATED:
        return "left", "not converted yet: call equiconv.accelerate"
    if isinstance(module, tuple(ACCELERATED)):
        return "left", "a subclass of its own, which may compute something else"
    if isinstance(module, EquivariantModule) and not _is_container(module):
        own = cls.__module__.startswith(f"{__package__}.")
        return "left", "plain torch" if own else PLAIN.get(cls, "no accelerated version yet")
    return None


def _pairs(sequence, condition):
    """The pairs of modules that follow each other in a sequence and meet the condition."""
    children = list(sequence.children())
    return [pair for pair in zip(children, children[1:]) if condition(*pair)]


def _activated(modules):
    """{pointwise function: (status, reason)} of those that a batch norm applies in training."""
    names, found = {module: name for name, module in modules.items()}, {}
    for sequence in (module for module in modules.values() if isinstance(module, containers._Sequence)):
        for norm, function in _pairs(sequence, containers.is_activated_pair):
            status, reason = _status(function)
            found[function] = status, "; ".join(filter(None, (reason, f"in training one pass with {names[norm]!r}")))
    return found


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
    return found | _epilogues(sequences, found, names)


def _epilogues(sequences, norms, names):
    """{pointwise function: (status, reason)} of those that convolutions apply; norms: those of _folded."""
    found = {}
    for sequence in sequences:
        before = {norm: convolution for convolution, norm in _pairs(sequence, containers.is_folding_pair)
                  if norms[norm][0] == "folded"}
        for first, second in _pairs(sequence, lambda first, second: containers.activation_of(second) is not None):
            convolution = before.get(first, first)
            if containers.is_epilogue(convolution, second) and first.out_type == second.in_type:
                found[second] = "folded", f"in evaluation, into {names[convolution]!r}"
    return found


def _bases(modules):
    """{module: "fields -> irreps" or the like} of the modules that read or write irreps."""
    found = {}
    for sequence in modules.values():  # inner ones later: what they are part of comes first
        if isinstance(sequence, containers._Sequence) and sequence.irrep_domain:
            for module, bases in bases_of_modules(sequence).items():
                found.setdefault(module, bases)
    return {module: f"{bases.read} -> {bases.written}" for module, bases in found.items() if any(bases)}


def _is_container(module):
    return any(isinstance(child, EquivariantModule) for child in module.children())


def _modules(model):
    if not isinstance(model, Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    return dict(model.named_modules())
