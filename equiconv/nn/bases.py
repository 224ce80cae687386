"""The two bases that features can be in: that of their fields, and that of the irreps that the fields consist of."""
from typing import NamedTuple

import torch
from escnn.nn import GeometricTensor

from ..formats import compute_dtype
from ..layout.representations import group_fields


class Bases(NamedTuple):
    """Whether a convolution reads and writes features in the basis of their irreps, not in that of their fields."""
    reads_irreps: bool = False
    writes_irreps: bool = False

    @property
    def read(self):
        return "irreps" if self.reads_irreps else "fields"

    @property
    def written(self):
        return "irreps" if self.writes_irreps else "fields"


FIELDS = Bases()


class InIrreps(GeometricTensor):
    """Fields x of the type, as the components Q^-1 x of their irreps. Only modules that expect one are given one."""


class ChangesOfBasis:
    """The changes of basis of a type's fields: Q from the basis of its irreps to that of the field.

    is_split       whether all of them are the identity
    is_orthogonal  whether all of them keep norms
    """

    def __init__(self, field_type):
        groups = group_fields(field_type.representations)
        self._layouts = [fields.layout for fields in groups.values()]
        self._sizes = [len(fields) * fields.layout.size for fields in groups.values()]
        self.is_split = all(layout.is_split for layout in self._layouts)
        self.is_orthogonal = all(layout.is_orthogonal for layout in self._layouts)
        order = torch.tensor([channel + i for fields in groups.values() for channel in fields.channels
                              for i in range(fields.layout.size)])
        is_ordered = bool((order == torch.arange(len(order))).all())
        self._orders = (None, None) if is_ordered else (order, order.argsort())  # to groups of fields, and back
        self._placed = {}

    def map(self, x, function):
        """function(the fields of one representation [B, fields * size, ...], Q, Q^-1) for all of them, [B, C, ...].

        Q and Q^-1, [size, size] of the dtype that x is computed in, are None where they are the identity.
        """
        gather, scatter, matrices = self._tables(x.device, compute_dtype(x.dtype))
        x = x if gather is None else x.index_select(1, gather)
        parts = [function(part, *both) for part, both in zip(x.split(self._sizes, 1), matrices)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if scatter is None else y.index_select(1, scatter)

    def to_irreps(self, values):
        """Q^-1 of each field of values [C], one for each channel."""
        return self.map(values[None], lambda part, _, q_inv: _times(q_inv, part))[0].to(values.dtype)

    def to_fields(self, values):
        """Q of each field of values [C], one for each channel."""
        return self.map(values[None], lambda part, q, _: _times(q, part))[0].to(values.dtype)

    def _tables(self, device, dtype):
        key = (device, dtype)
        if key not in self._placed:
            with torch.inference_mode(False):
                orders = [None if order is None else order.to(device) for order in self._orders]
                matrices = [(None, None) if layout.is_split else
                            [torch.tensor(matrix, device=device, dtype=dtype)
                             for matrix in (layout.change_of_basis, layout.change_of_basis_inv)]
                            for layout in self._layouts]
            self._placed[key] = *orders, matrices
        return self._placed[key]


def changes_of_basis(field_type):
    """The ChangesOfBasis of a field type, made once."""
    known = field_type.__dict__.get("_changes_of_basis")
    if known is None:
        known = field_type.__dict__["_changes_of_basis"] = ChangesOfBasis(field_type)
    return known


def _times(matrix, part):
    """matrix [n, n] times each n of part [1, N], in full precision also under autocast."""
    return part if matrix is None else (matrix * part.view(-1, 1, len(matrix))).sum(-1).view(1, -1)
