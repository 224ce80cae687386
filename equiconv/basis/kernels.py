"""Steerable kernels between two irreps, and between two representations: the solutions of the kernel constraint.

By the Wigner-Eckart theorem (G. Cesa, L. Lang, M. Weiler, A Program to Build E(N)-Equivariant Steerable CNNs, 2022,
theorem 2.1) each kernel is a Clebsch-Gordan coefficient, times an endomorphism, times a harmonic. The elements, their
order and their attributes are those of escnn.
"""
from dataclasses import dataclass

import numpy as np

from ..layout.representations import RepresentationLayout
from .averaging import group_key
from .cache import Memory
from .clebsch_gordan import tensor_product
from .restriction import restriction, subgroup_key

_irrep_kernels = Memory(4096)


@dataclass(frozen=True)
class IrrepKernels:
    """The kernels between two irreps: kernel[q] = coefficients[j][q] @ harmonic of irrep j.

    coefficients  {irrep id j of the harmonics: [Q, d_out, d_in, d_j]}, in escnn's order
    labels        {j: list of Q dicts}: what escnn calls k (endomorphism), s (copy in the product), and, if the
                  harmonics belong to a larger group, _j and t (irrep and copy in the restriction of j)
    """
    coefficients: dict
    labels: dict


def irrep_kernels(harmonics, group, in_irrep, out_irrep):
    """IrrepKernels over some harmonics (see harmonics.py) for ids of irreps of their symmetry group."""
    present = tuple(j for j, multiplicity in harmonics.js if multiplicity)
    key = (type(harmonics.group), subgroup_key(harmonics.subgroup_id), group_key(group), present, in_irrep, out_irrep)
    return _irrep_kernels.get(key, lambda: _build_irrep_kernels(harmonics, group, present, in_irrep, out_irrep))


def _build_irrep_kernels(harmonics, group, present, in_irrep, out_irrep):
    coefficients, labels = {}, {}
    for j in present:
        parts = restriction(harmonics.group, harmonics.subgroup_id, j)  # irrep of the group -> [d, d_j, t]
        found, names = [], []
        for inner, cg in tensor_product(group, out_irrep, in_irrep):  # [d_out, d_in, s, d]
            if inner not in parts:
                continue
            endomorphisms = group.irrep(*inner).endomorphism_basis()
            # einsum of three would choose an order; of two it does not
            turned = np.einsum("kdi,djt->kijt", endomorphisms, parts[inner])
            table = np.einsum("nmsi,kijt->kstnmj", cg, turned)
            found.append(table.reshape(-1, *table.shape[3:]))
            names += [{"_j": inner, "t": t, "s": s, "k": k} for k, s, t in np.ndindex(table.shape[:3])]
        if found:
            coefficients[j] = np.concatenate(found)
            restricted = harmonics.subgroup_id is not None
            labels[j] = names if restricted else [{"s": n["s"], "k": n["k"]} for n in names]
    return IrrepKernels(coefficients, labels)


@dataclass(frozen=True)
class Element:
    """One element of a steerable basis: where in the representations it lies, and which function it is."""
    source: int     # which of the basis's harmonics
    in_index: int   # number of the irrep in the input representation, and in the output representation
    out_index: int
    j: tuple        # irrep of the harmonic
    kernel: int     # row of IrrepKernels.coefficients[j]
    function: int   # which of the harmonics of that irrep


class SteerableBasis:
    """A basis of the equivariant kernels between two representations, as irrep blocks.

    in_repr, out_repr  escnn representations of one group
    harmonics          list of harmonics (see harmonics.py)
    union              whether elements are described as by escnn's UnionBasis, which several harmonics make up

    Iterating gives the attributes of each element, as escnn's KernelBasis does.
    """

    def __init__(self, in_repr, out_repr, harmonics, union=False):
        group = in_repr.group
        self.in_layout, self.out_layout = RepresentationLayout(in_repr), RepresentationLayout(out_repr)
        self.harmonics, self.shape, self.is_union = harmonics, (out_repr.size, in_repr.size), union
        self.in_irreps, self.out_irreps = ([tuple(i) for i in r.irreps] for r in (in_repr, out_repr))
        self.kernels = [{(i, o): irrep_kernels(source, group, i, o)
                         for i in set(self.in_irreps) for o in set(self.out_irreps)} for source in harmonics]
        self.elements = [element for source in range(len(harmonics)) for element in self._elements(source)]
        self.key = (group_key(group), *(source.key for source in harmonics), *(
            (tuple(r.irreps), layout.change_of_basis.tobytes(), layout.change_of_basis_inv.tobytes())
            for r, layout in ((in_repr, self.in_layout), (out_repr, self.out_layout))))

    @property
    def dim(self):
        return len(self.elements)

    def __len__(self):
        return len(self.elements)

    def _elements(self, source):
        harmonics, kernels = self.harmonics[source], self.kernels[source]
        trivial = harmonics.group.trivial_representation.id
        for j, multiplicity in sorted(harmonics.js, key=lambda item: item[0] != trivial):  # the trivial one first
            for ii, i in enumerate(self.in_irreps):
                for oo, o in enumerate(self.out_irreps):
                    for kernel in range(len(kernels[i, o].coefficients.get(j, ()))):
                        for function in range(multiplicity):
                            yield Element(source, ii, oo, j, kernel, function)

    def __iter__(self):
        attributes, position, place_of_j = {}, {}, {}
        sources = {e.source: None for e in self.elements}
        number = {source: i for i, source in enumerate(sources)}  # escnn leaves empty ones out
        for idx, e in enumerate(self.elements):
            key = e.source, e.j
            if key not in attributes:
                attributes[key] = self.harmonics[e.source].attributes(e.j)
            kernels = self.kernels[e.source][self.in_irreps[e.in_index], self.out_irreps[e.out_index]]
            label = kernels.labels[e.j][e.kernel]
            start = (e.source, e.in_index, e.out_index)
            found = {**attributes[key][e.function], **label, "j": e.j, "i": e.function,
                     "in_irrep": self.in_irreps[e.in_index], "out_irrep": self.out_irreps[e.out_index],
                     "in_irrep_idx": e.in_index, "out_irrep_idx": e.out_index,
                     "shape": kernels.coefficients[e.j].shape[1:3],
                     "irreps_basis_idx": position.get(start, 0), "j_idx": place_of_j.get(key, 0),
                     "idx": position.get(e.source, 0)}
            for count in (start, e.source):
                position[count] = position.get(count, 0) + 1
            place_of_j[key] = place_of_j.get(key, 0) + 1
            if self.is_union:
                found.update(shape=self.shape, basis_id=number[e.source], basis_idx=found["idx"], idx=idx)
            yield found

    def __getitem__(self, index):
        """Attributes of one element."""
        for i, attributes in enumerate(self):
            if i == index:
                return attributes
        raise IndexError(f"index must be below {len(self)}, got {index}")

    def __eq__(self, other):
        return isinstance(other, SteerableBasis) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def __deepcopy__(self, memo):
        return self  # never changed after construction
