"""Containers: sequences, which compute neighbours together; and modules that take a field apart by labels."""
from functools import partial

import escnn.nn
import torch
from escnn.nn import GeometricTensor

from .batchnorm import InnerBatchNorm, _BatchNorm
from .checks import check_type
from .conv import _Conv
from .linear import Linear
from .tensors import OnTensors, adopt, adopting_init, like


class _Sequence:
    """Mixin of a sequence of modules: neighbours that one pass can compute are computed by one.

    InnerBatchNorm, or a convolution, and ReLU or ELU are one pass over the features. Where `folds` is True, a batch
    norm of fields in evaluation, without gradients of parameters, becomes part of the filter and bias of the
    convolution before it. Modules that have hooks are run one by one.
    """

    folds = False

    def _adopt(self):
        """Nothing to prepare."""

    def forward(self, input):
        modules, x, place = list(self._modules.values()), input, 0
        while place < len(modules):
            compute, count = self._together(*modules[place:place + 3])
            x = compute(x)
            place += count
        return x

    def _together(self, first, second=None, third=None):
        """(a function that computes the next modules in one pass, how many they are)"""
        if _has_hooks(first) or _has_hooks(second):
            return first, 1
        if self.folds and is_folding_pair(first, second) and not (first.training or _is_training(second)):
            if not _wants_gradients(first, second) and first.why_not_foldable(second) is None:
                if _applies(first, third) and third.in_type == second.out_type and not _has_hooks(third):
                    return partial(first.forward, norm=second, function=_function_of(third)), 3
                return partial(first.forward, norm=second), 2
        if _applies(first, second) and second.in_type == first.out_type:
            return partial(first.forward, function=_function_of(second)), 2
        return first, 1


def _applies(first, second):
    """Whether the second is a function that the first can apply to its output."""
    return isinstance(first, (InnerBatchNorm, _Conv)) and _function_of(second) is not None


def _has_hooks(module):
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _function_of(module):
    """The name of the function that a pointwise nonlinearity computes, one of those of ops.field_norm_inner; or None.

    Of those classes themselves: their subclasses may compute something else.
    """
    if type(module) is escnn.nn.ReLU:
        return "relu"
    return "elu" if type(module) is escnn.nn.ELU and module.alpha == 1 else None


def _wants_gradients(*modules):
    """Whether parameters of the modules may get gradients; a graph does not ask."""
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or any(
        parameter.requires_grad for module in modules for parameter in module.parameters()))


def is_activated_pair(first, second):
    """Whether the modules are an InnerBatchNorm and a function that it can apply."""
    return isinstance(first, InnerBatchNorm) and _function_of(second) is not None


def is_folding_pair(first, second):
    """Whether the modules are a convolution and a batch norm of fields."""
    return isinstance(first, (_Conv, Linear)) and isinstance(second, _BatchNorm)


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
