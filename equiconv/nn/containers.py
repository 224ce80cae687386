"""Modules that take a feature field apart by labels and put the parts together."""
import escnn.nn
import torch
from escnn.nn import GeometricTensor

from .checks import check_type
from .tensors import OnTensors, adopt, adopting_init, like


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
