"""Paths: the elements of a steerable basis, each between one irrep of the input and one irrep of the output."""
from dataclasses import dataclass

import numpy as np

from .harmonics import NOISE, decompose, snap
from .representations import IrrepSlot

CHUNK = 1 << 24  # elements of a sampled basis that are transformed at a time, to bound the memory


@dataclass(frozen=True)
class Path:
    """One kernel B = Q_out (block placed at out_slot, in_slot) Q_in^-1, with block[a, b, s] = T[a, b, h] H[h, s]."""
    out_slot: IrrepSlot
    in_slot: IrrepSlot
    coefficients: np.ndarray  # [d_out, d_in, R]: T, over the harmonics of the layer

    @property
    def harmonics(self):
        """Indices of the harmonics that occur in the block."""
        return np.flatnonzero(np.abs(self.coefficients).sum((0, 1)))


def irrep_blocks(sampled_basis, out_layout, in_layout):
    """[(out_slot, in_slot, block [d_out, d_in, S])] for each kernel of sampled_basis [D, out, in, S], float64 NumPy.

    None where kernels are not those blocks: a basis that was cast to bfloat16, or an ill-conditioned change of basis.
    """
    found, step = [], max(1, CHUNK // max(1, sampled_basis[0].size))
    for first in range(0, len(sampled_basis), step):
        kernels = sampled_basis[first:first + step]
        chunk = _transform(kernels, out_layout.change_of_basis_inv, in_layout.change_of_basis, out_layout, in_layout)
        energy = np.square(chunk).sum(-1)
        for axis, layout in ((1, out_layout), (2, in_layout)):
            energy = np.add.reduceat(energy, [slot.start for slot in layout.slots], axis=axis)
        owner = energy.reshape(len(chunk), -1).argmax(1)
        alone = np.zeros_like(chunk)
        for p, (o, i) in enumerate(zip(*np.unravel_index(owner, energy.shape[1:]))):
            out_slot, in_slot = out_layout.slots[o], in_layout.slots[i]
            block = chunk[p, out_slot.components, in_slot.components]
            alone[p, out_slot.components, in_slot.components] = block
            found.append((out_slot, in_slot, block))
        back = _transform(alone, out_layout.change_of_basis, in_layout.change_of_basis_inv, out_layout, in_layout)
        size = np.abs(kernels).max((1, 2, 3))
        if (np.abs(back - kernels).max((1, 2, 3)) > 3 * NOISE * size).any():
            return None
    return found


def _transform(kernels, left, right, out_layout, in_layout):
    """left @ kernel @ right for kernels [D, out, in, S]; nothing to do where a representation is split already."""
    if not out_layout.is_split:
        kernels = np.einsum("na,pabs->pnbs", left, kernels, optimize=True)
    if not in_layout.is_split:
        kernels = np.einsum("pnbs,bm->pnms", kernels, right, optimize=True)
    return kernels


def find_paths(bases):
    """Harmonics and paths of a layer.

    bases  list of (sampled_basis [D, out, in, S] tensor, out RepresentationLayout, in RepresentationLayout)

    Returns (harmonics [R, S], [(out layout, in layout, list of D Paths)] for each basis). The layouts are those that
    came, or opaque ones for kernels that are not blocks between irreps. Raises ValueError for a basis with NaN.
    """
    layouts, split, candidates, seen = [], [], [], set()
    for basis, out_layout, in_layout in bases:
        kernels = basis.detach().cpu().double().numpy()
        if not np.isfinite(kernels).all():
            raise ValueError(f"the sampled basis from {in_layout.name!r} to {out_layout.name!r} must be finite, got "
                             "NaN or infinity")
        blocks = irrep_blocks(kernels, out_layout, in_layout)
        if blocks is None:
            out_layout, in_layout = out_layout.opaque(), in_layout.opaque()
            blocks = irrep_blocks(kernels, out_layout, in_layout)
        layouts.append((out_layout, in_layout))
        split.append(blocks)
        irreps = {}  # the kernels of a pair of irreps are the same wherever the pair occurs again
        for out_slot, in_slot, block in blocks:
            irreps.setdefault((out_slot.irrep, in_slot.irrep, out_slot.start, in_slot.start), []).append(block)
        for (out_irrep, in_irrep, *_), found in irreps.items():
            key = (out_irrep, in_irrep, len(found))
            if key not in seen or out_irrep is None:
                seen.add(key)
                candidates += found
    candidates = [block / np.abs(block).max() for block in candidates if block.any()]
    candidates.sort(key=lambda block: (min(block.shape[:2]), sum(block.shape[:2])))
    harmonics, coefficients = decompose([block for blocks in split for *_, block in blocks],
                                        np.concatenate([b.reshape(-1, b.shape[-1]) for b in candidates]))
    coefficients = iter(snap(coefficients))
    paths = [[Path(o, i, next(coefficients)) for o, i, _ in blocks] for blocks in split]
    return harmonics, [(*pair, found) for pair, found in zip(layouts, paths)]
