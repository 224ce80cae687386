"""Containers: sequences, which compute neighbours together; and modules that take a field apart by labels."""
from functools import partial

import escnn.nn
import torch
from escnn.nn import GeometricTensor

from ..reference.field_batch_norm import FUNCTIONS
from . import irrep_domain
from .batchnorm import GNormBatchNorm, IIDBatchNorm1d, IIDBatchNorm2d, IIDBatchNorm3d, InnerBatchNorm
from .checks import check_type, same_type
from .conv import (
    R2Conv,
    R2ConvTransposed,
    R3Conv,
    R3ConvTransposed,
    R3IcoConv,
    R3IcoConvTransposed,
)
from .linear import Linear
from .nonlinearities import activation_of, function_of
from .norm_batchnorm import InducedNormBatchNorm, NormBatchNorm
from .tensors import OnTensors, adopt, adopting_init, has_hooks, is_exactly, like

CONVOLUTIONS = (R2Conv, R3Conv, R3IcoConv, R2ConvTransposed, R3ConvTransposed, R3IcoConvTransposed)
BATCH_NORMS = (InnerBatchNorm, IIDBatchNorm1d, IIDBatchNorm2d, IIDBatchNorm3d, GNormBatchNorm, NormBatchNorm,
               InducedNormBatchNorm)


class _Sequence:
    """Mixin of a sequence of modules: neighbours that one pass can compute are computed by one.

    InnerBatchNorm and ReLU or ELU are one pass over the features. Where `folds` is True, a batch norm of fields in
    evaluation, without gradients of parameters, becomes part of the filter and bias of the convolution before it, and a
    pointwise function after either of them, in evaluation, part of the convolution. Modules that have hooks are run one
    by one. Where `irrep_domain` is True, features stay in the basis of their irreps from one convolution to the next
    where that is possible (see nn/irrep_domain.py).
    """

    folds = irrep_domain = False

    def _adopt(self):
        """Nothing to prepare."""

    def forward(self, input):
        if self.irrep_domain and irrep_domain.is_possible():
            return irrep_domain.run(self, input)
        return self._run(list(self._modules.values()), input)

    def _run(self, modules, x):
        """What the modules of this sequence, which follow each other, make of x."""
        place = 0
        while place < len(modules):
            count, together = self._together(*modules[place:place + 3])
            x = together(x)
            place += count
        return x

    def _together(self, first, second=None, third=None):
        """(how many of the modules can be computed in one pass, the function that does it)"""
        if has_hooks(first) or second is None or has_hooks(second):
            return 1, first
        if is_activated_pair(first, second) and same_type(second.in_type, first.out_type):
            return 2, partial(first.forward, function=function_of(second, FUNCTIONS))
        return self._with_convolution(first, second, third) if self.folds and not first.training else (1, first)

    def _with_convolution(self, first, second, third):
        """As _together, of a convolution in evaluation, a batch norm and a function, or one of these after it."""
        options, last, following = {}, first, second
        if self._folds_into(first, second):
            options, last, following = {"norm": second}, second, third
        if is_epilogue(first, following) and same_type(following.in_type, last.out_type) and not has_hooks(following):
            options["activation"] = activation_of(following)
        return 1 + len(options), partial(first.forward, **options) if options else first

    def _folds_into(self, convolution, norm):
        """Whether a module becomes part, now, of the one before it."""
        return (self.folds and is_folding_pair(convolution, norm) and not (convolution.training or _is_training(norm))
                and not _wants_gradients(convolution, norm) and convolution.why_not_foldable(norm) is None)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != irrep_domain.KNOWN}


def is_epilogue(first, second):
    """Whether the modules are a convolution and a pointwise function that it can apply."""
    return is_exactly(first, CONVOLUTIONS) and activation_of(second) is not None


def _wants_gradients(*modules):
    """Whether parameters of the modules may get gradients; a graph does not ask."""
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or any(
        parameter.requires_grad for module in modules for parameter in module.parameters()))


def is_activated_pair(first, second):
    """Whether the modules are an InnerBatchNorm and a function that it can apply."""
    return is_exactly(first, (InnerBatchNorm,)) and function_of(second, FUNCTIONS) is not None


def is_folding_pair(first, second):
    """Whether the modules are a convolution and a batch norm of fields."""
    return is_exactly(first, (*CONVOLUTIONS, Linear)) and is_exactly(second, BATCH_NORMS)


def _is_training(norm):
    return norm.training or any(child.training for child in norm.children())


class SequentialModule(_Sequence, escnn.nn.SequentialModule):
    """escnn.nn.SequentialModule, with the same arguments and state."""

    def forward(self, input):
        """input: GeometricTensor of in_type -> GeometricTensor of out_type."""
        check_type(self, input)
        return super().forward(input)


class Sequential(_Sequence, torch.nn.Sequential):
    """torch.nn.Sequential, with the same arguments and state."""


class ReshuffleModule(OnTensors, escnn.nn.ReshuffleModule):
    """escnn.nn.ReshuffleModule, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.ReshuffleModule)

    def _compute(self, x):
        return x.index_select(1, self.indices)


class BranchingModule(escnn.nn.BranchingModule):
    """escnn.nn.BranchingModule, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.BranchingModule)

    def _adopt(self):
        if self.reshuffle_layer is not None:
            adopt(self.reshuffle_layer, ReshuffleModule)
        self._ranges = {label: tuple(getattr(self, f"indices_{label}").tolist())
                        for label, contiguous in self._contiguous.items() if contiguous}

    def forward(self, input):
        """input: GeometricTensor -> {label: GeometricTensor of out_type[label]}."""
        check_type(self, input)
        if self.reshuffle_layer is not None:
            input = self.reshuffle_layer(input)
        return {label: GeometricTensor(self._channels(input.tensor, label), self.out_type[label], input.coords)
                for label in self._contiguous}

    def export(self):
        """A module from a tensor [B, C, *spatial] to {label: tensor}; sets this one to eval mode."""
        self.eval()
        order = torch.arange(self.in_type.size, device=next((b.device for b in self.buffers()), None))
        if self.reshuffle_layer is not None:
            order = self.reshuffle_layer.indices
        return _Branches({label: self._channels(order[None], label)[0] for label in self._contiguous}).eval()

    def _channels(self, x, label):
        if label in self._ranges:
            start, stop = self._ranges[label]
            return x[:, start:stop]
        return like(x.index_select(1, getattr(self, f"indices_{label}")), x)


class MergeModule(escnn.nn.MergeModule):
    """escnn.nn.MergeModule, with the same arguments and state. The output has the widest dtype of the modules'."""
    __init__ = adopting_init(escnn.nn.MergeModule)

    def _adopt(self):
        """Nothing to prepare."""

    def forward(self, input):
        """input: {label: GeometricTensor} -> GeometricTensor of out_type."""
        outputs = [getattr(self, f"submodule_{i}")(*[input[label] for label in labels])
                   for i, labels in enumerate(self._labels)]
        first = outputs[0]
        if not all(first.has_same_coords(output) for output in outputs[1:]):
            raise ValueError("MergeModule: the modules must return the same coords")
        y = torch.cat([output.tensor for output in outputs], 1)
        return GeometricTensor(like(y, first.tensor), self.out_type, first.coords)

    def export(self):
        """A module from {label: tensor} to a tensor; sets this one to eval mode, and raises where a module has none."""
        self.eval()
        return _Merge([getattr(self, f"submodule_{i}").export() for i in range(len(self._labels))], self._labels).eval()


class MultipleModule(escnn.nn.MultipleModule):
    """escnn.nn.MultipleModule, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.MultipleModule)

    def _adopt(self):
        adopt(self.branching, BranchingModule)
        adopt(self.merging, MergeModule)

    def forward(self, input):
        """input: GeometricTensor of in_type -> GeometricTensor of out_type."""
        check_type(self, input)
        return self.merging(self.branching(input))

    def export(self):
        """A module of plain torch operations on tensors; sets this one to eval mode."""
        self.eval()
        return torch.nn.Sequential(self.branching.export(), self.merging.export()).eval()


class _Branches(torch.nn.Module):
    """BranchingModule on bare tensors: {label: its channels}."""

    def __init__(self, channels):
        super().__init__()
        self.labels = list(channels)
        for i, label in enumerate(channels):
            self.register_buffer(f"channels_{i}", channels[label].clone())

    def forward(self, x):
        return {label: x.index_select(1, getattr(self, f"channels_{i}")) for i, label in enumerate(self.labels)}


class _Merge(torch.nn.Module):
    """MergeModule on bare tensors."""

    def __init__(self, modules, labels):
        super().__init__()
        self.parts, self.labels = torch.nn.ModuleList(modules), labels

    def forward(self, input):
        return torch.cat([part(*map(input.get, labels)) for part, labels in zip(self.parts, self.labels)], 1)
