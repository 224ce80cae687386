"""Modules that treat the fields of a type by groups: those of one size, or of one representation, together."""
import itertools
from dataclasses import dataclass

import torch

from ..formats import compute_dtype
from ..ops import field_gate


@dataclass(frozen=True)
class FieldGroup:
    """Fields that are treated together: what they have in common, how many there are, and their number of channels."""
    label: object
    fields: int
    size: int


class Tabulated:
    """Mixin of a module with tables that no checkpoint brings back: they survive the meta device."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers"):  # a module on the meta device takes the checkpoint's
            device = next((value.device for value in state_dict.values()), "cpu")
            for name, values in self.__dict__.get("_kept", {}).items():
                if self._buffers[name].is_meta:
                    self._buffers[name] = values.to(device)

    def _apply(self, *args, **kwargs):
        before = {name: self._buffers[name] for name in self._non_persistent_buffers_set if name in self._buffers}
        super()._apply(*args, **kwargs)
        kept = self.__dict__.setdefault("_kept", {})
        for name, values in before.items():
            now = self._buffers[name]
            if now is not None and now.is_meta and not values.is_meta:
                kept[name] = values
            elif now is not None and values.is_meta and not now.is_meta:
                now.copy_(kept[name])
        return self


class ByField(Tabulated):
    """Mixin of a module that splits its input into groups of fields and joins its output from them.

    Where the fields of a group are not adjacent, one permutation of the channels brings them together, one undoes it.
    """

    def _group_fields(self, labels, in_sizes, out_sizes=None, order=None):
        """Defines the groups.

        labels     of the fields of the input, by which they are grouped
        in_sizes   channels of each field of the input
        out_sizes  channels of each field of the output, 0 for one that has none; by default those of the input
        order      of the labels, by default that of their first fields
        """
        order = list(dict.fromkeys(labels)) if order is None else order
        fields = [f for label in order for f in range(len(labels)) if labels[f] == label]
        self._groups = tuple(FieldGroup(label, labels.count(label), in_sizes[labels.index(label)]) for label in order)
        gather = channels_of(fields, in_sizes)
        scatter = channels_of(fields, in_sizes if out_sizes is None else out_sizes)
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        for name, permutation in (("_gather", gather), ("_scatter", torch.argsort(scatter))):
            is_identity = bool((permutation == torch.arange(len(permutation))).all())
            self.register_buffer(name, None if is_identity else permutation.to(device), persistent=False)

    def _split(self, x):
        """[B, channels, *spatial] -> for each group [B, fields, size, *spatial]."""
        if self._gather is not None:
            x = x.index_select(1, self._gather)
        parts = x.split([group.fields * group.size for group in self._groups], 1)
        return [parts[i].unflatten(1, (group.fields, group.size)) for i, group in enumerate(self._groups)]

    def _join(self, parts):
        """For each group [B, fields * size, *spatial] -> [B, channels, *spatial]."""
        return self._unpermute(parts[0] if len(parts) == 1 else torch.cat(parts, 1), 1)

    def _unpermute(self, x, dim):
        return x if self._scatter is None else x.index_select(dim, self._scatter)

    def _per_channel(self, values):
        """For each group [fields, 1 or size] -> [channels]."""
        parts = [v.expand(group.fields, group.size).flatten() for v, group in zip(values, self._groups)]
        whole = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)  # one field's is expanded still
        return self._unpermute(whole, 0)


class Pooling(Tabulated):
    """Mixin of a module on ops.field_pool."""

    def _tabulate_pool(self, sizes, subfields):
        """Its tables, for fields of these sizes; subfields: channels of the subfields of each, which are compared."""
        elements, part = [], 0
        for f, (size, subfield) in enumerate(zip(sizes, subfields)):
            elements += [(f, part + i // subfield) for i in range(size)]
            part += size // subfield
        rows = list(zip(self.in_type.fields_start.tolist(), sizes, subfields))
        device = next((t.device for t in self.buffers()), None)
        self.register_buffer("_fields", torch.tensor(rows, device=device), persistent=False)
        self.register_buffer("_elements", torch.tensor(elements, device=device), persistent=False)


class Gating(Tabulated):
    """Mixin of a module that multiplies each field, or subfield, by a number made of its norm or of a gate."""

    def _tabulate(self, rows, out_channels):
        """The tables of ops.field_gate. rows: (channel, out_channel, size, gate, gate_out, bias) of each field."""
        elements = [(row[0] + i, row[1] + i, f) for f, row in enumerate(rows) for i in range(row[2])]
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        self.register_buffer("_fields", torch.tensor(rows, device=device), persistent=False)
        self.register_buffer("_elements", torch.tensor(elements, device=device), persistent=False)
        self._out_channels = out_channels

    def _gate(self, x, bias, function, **options):
        dtype = compute_dtype(x.dtype)
        bias = None if bias is None else bias.flatten().to(dtype)
        options = {name: value.to(x.dtype if name == "gates" else dtype) for name, value in options.items()}
        return field_gate(x, bias, self._fields, self._elements, function, self._out_channels, **options)


def channels_of(fields, sizes):
    """The channels of fields of these sizes, in the order of `fields`: int64 tensor."""
    starts = [0, *itertools.accumulate(sizes)]
    return torch.tensor([c for f in fields for c in range(starts[f], starts[f] + sizes[f])], dtype=torch.int64)


def sizes_of(field_type):
    return [representation.size for representation in field_type.representations]


def subfields_of(field_type):
    """(channels, channels of a subfield) of each field of an induced type, which supports "induced_norm_<size>"."""
    return [(representation.size, int(name.split("_")[-1])) for representation in field_type.representations
            for name in representation.supported_nonlinearities if name.startswith("induced_norm")]


def in_sorted_order(module):
    """Puts a module's own parameters and buffers into the order of their names.

    escnn adds some in the order of a set, which depends on the hash seed: DistributedDataParallel would write one
    rank's over others of another rank.
    """
    for state in (module._parameters, module._buffers):
        items = sorted(state.items())
        state.clear()
        state.update(items)


def scale(parts, factors):
    """part * factor for each part [B, F, S, *spatial] and factor [F, S or 1], in the wider of their dtypes."""
    return [_per_field(torch.mul, *pair) for pair in zip(parts, factors)]


def shift(parts, offsets):
    """part + offset for each part [B, F, S, *spatial] and offset [F, S or 1], in the wider of their dtypes."""
    return [_per_field(torch.add, *pair) for pair in zip(parts, offsets)]


def _per_field(function, part, values):
    spatial_first = part.movedim((1, 2), (-2, -1))  # [B, *spatial, F, S], whatever the number of dimensions
    return function(spatial_first, values).movedim((-2, -1), (1, 2))
