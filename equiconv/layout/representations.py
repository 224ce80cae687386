"""A representation as irreps: where each one lies, and the change of basis that separates them."""
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class IrrepSlot:
    """One irrep inside a representation: its id in the group, its first component and its size."""
    irrep: tuple
    start: int
    size: int

    @property
    def components(self):
        return slice(self.start, self.start + self.size)


class RepresentationLayout:
    """rho(g) = Q (irrep_1(g) + irrep_2(g) + ...) Q^-1, with the slots of the irreps in the columns of Q."""

    def __init__(self, representation):
        self.name = representation.name
        self.size = representation.size
        self.change_of_basis = np.asarray(representation.change_of_basis, dtype=np.float64)          # [size, size]
        self.change_of_basis_inv = np.asarray(representation.change_of_basis_inv, dtype=np.float64)  # [size, size]
        self.slots, start = [], 0
        for irrep in representation.irreps:
            size = representation.group.irrep(*irrep).size
            self.slots.append(IrrepSlot(tuple(irrep), start, size))
            start += size

    def opaque(self):
        """The same representation as one block: for kernels that do not separate into irreps."""
        return self._without_basis([IrrepSlot(None, 0, self.size)])

    def in_irreps(self):
        """The same irreps without a change of basis: for features that are in the basis of their irreps already."""
        return self._without_basis(self.slots)

    def _without_basis(self, slots):
        other = copy(self)
        other.change_of_basis = other.change_of_basis_inv = np.eye(self.size)
        other.slots = slots
        for name in ("is_split", "is_orthogonal"):
            other.__dict__.pop(name, None)
        return other

    @property
    def is_opaque(self):
        return self.slots[0].irrep is None

    @cached_property
    def is_split(self):
        """Whether the change of basis is the identity, so that it need not be applied."""
        identity = np.eye(self.size)
        return bool((self.change_of_basis == identity).all() and (self.change_of_basis_inv == identity).all())

    @cached_property
    def is_orthogonal(self):
        """Whether the change of basis keeps norms."""
        return self.is_split or bool(np.abs(self.change_of_basis @ self.change_of_basis.T - np.eye(self.size)).max()
                                     < 1e-12)


@dataclass(frozen=True)
class FieldsOf:
    """The fields of one representation in a field type, in order: `channels[f]` is the first channel of field f."""
    layout: RepresentationLayout
    channels: tuple

    def __len__(self):
        return len(self.channels)


def group_fields(representations):
    """{name: FieldsOf} of escnn representations, one for each field. Fields of one name need not be adjacent."""
    first, channels, position = {}, {}, 0
    for representation in representations:
        first.setdefault(representation.name, representation)
        channels.setdefault(representation.name, []).append(position)
        position += representation.size
    return {name: FieldsOf(RepresentationLayout(first[name]), tuple(channels[name])) for name in first}
