"""A steerable basis on the taps of a filter: normalised as escnn does it, kept as irrep blocks."""
import math
from dataclasses import dataclass

import numpy as np

from ..layout.harmonics import find_harmonics
from ..layout.paths import Path
from .averaging import ROUNDING
from .cache import Memory

VANISHES = 1e-6  # norm below which an element is left out, as in escnn
TINY = np.finfo(np.float64).tiny
CHUNK = 1 << 22  # elements of a dense basis that are made at a time, to bound the memory

_sampled, _paths = Memory(256), Memory(256)


@dataclass(frozen=True)
class Block:
    """One element between its two irreps: its kernel [d_out, d_in, S] is coefficients @ the rows of a harmonic."""
    out_slot: object
    in_slot: object
    harmonic: tuple           # key in SampledBasis.rows
    coefficients: np.ndarray  # [d_out, d_in, d]


class SampledBasis:
    """The elements of a SteerableBasis that a mask lets through and that do not vanish on the taps.

    basis   SteerableBasis
    points  [S, dimensions] float64: the taps
    mask    [dim] bool

    blocks  list of Block
    kept    [dim] bool: which elements the blocks are
    rows    {key of a harmonic: [d, S]}
    """

    def __init__(self, basis, points, mask):
        self.basis, self.taps = basis, len(points)
        self.in_layout, self.out_layout = basis.in_layout, basis.out_layout
        needed = {(e.source, e.j) for e, wanted in zip(basis.elements, mask) if wanted}
        samples = {source: basis.harmonics[source].sample(points) for source in {source for source, _ in needed}}
        self.rows, self.blocks, self.kept = {}, [], np.zeros(len(basis), dtype=bool)
        scales = {}
        for index, element in enumerate(basis.elements):
            if not mask[index]:
                continue
            block = self._block(element, samples[element.source][element.j][element.function], scales)
            if block is not None:
                self.blocks.append(block)
                self.kept[index] = True
        self.key = (basis.key, np.asarray(points).tobytes(), self.kept.tobytes())

    def _block(self, element, rows, scales):
        out_slot, in_slot = self.out_layout.slots[element.out_index], self.in_layout.slots[element.in_index]
        kernels = self.basis.kernels[element.source][in_slot.irrep, out_slot.irrep]
        coefficients = kernels.coefficients[element.j][element.kernel]
        size = self.out_layout.size if self.basis.is_union else out_slot.size
        orthogonal = self.in_layout.is_orthogonal and self.out_layout.is_orthogonal
        key = (element.source, in_slot.irrep, out_slot.irrep, element.j, element.kernel, element.function)
        key += () if orthogonal else (element.in_index, element.out_index)
        if key not in scales:
            kernel = combine(coefficients, rows)
            if not orthogonal:
                left = self.out_layout.change_of_basis[:, out_slot.components]
                right = self.in_layout.change_of_basis_inv[in_slot.components]
                kernel = np.einsum("nbs,bm->nms", np.einsum("na,abs->nbs", left, kernel), right)
            norm = np.sqrt(np.square(kernel).sum() / size)
            scales[key] = None if norm < VANISHES else coefficients / norm
        if scales[key] is None:
            return None
        harmonic = (self.basis.harmonics[element.source].key, element.j, element.function)
        self.rows.setdefault(harmonic, rows)
        return Block(out_slot, in_slot, harmonic, scales[key])

    @classmethod
    def of(cls, basis, points, basis_filter=None):
        """The elements whose attributes a function accepts (all, for None). Layers with the same ones share them."""
        mask = np.ones(len(basis), dtype=bool) if basis_filter is None else np.array(
            [bool(basis_filter(attributes)) for attributes in basis], dtype=bool)
        points = np.asarray(points, dtype=np.float64)
        return _sampled.get((basis.key, points.tobytes(), mask.tobytes()), lambda: cls(basis, points, mask))

    def __len__(self):
        return len(self.blocks)

    def kernel(self, block):
        """[d_out, d_in, S] of one block."""
        return combine(block.coefficients, self.rows[block.harmonic])

    def chunks(self):
        """(first, kernels [n, out, in, S] float64) of the dense basis, a part at a time."""
        out, in_ = self.out_layout, self.in_layout
        step = max(1, CHUNK // (out.size * in_.size * self.taps))
        for first in range(0, len(self), step):
            blocks = self.blocks[first:first + step]
            dense = np.empty((len(blocks), out.size, in_.size, self.taps))
            for kernel, block in zip(dense, blocks):
                left = out.change_of_basis[:, block.out_slot.components]
                right = in_.change_of_basis_inv[block.in_slot.components]
                narrow = np.einsum("abs,bm->ams", self.kernel(block), right)
                np.einsum("na,ams->nms", left, narrow, out=kernel)
            dense[np.abs(dense) < ROUNDING] = 0
            yield first, dense

    def distance(self, stored):
        """Largest difference of a tensor [D, out, in, S] from the dense basis, relative to its largest element."""
        differences = [np.abs(kernels - _numpy(stored, first, kernels)).max() for first, kernels in self.chunks()]
        return float(np.max(differences)) / max(float(stored.abs().max()), TINY)

    def residual(self, stored, rounding):
        """How far apart the spaces are that this basis and a tensor [D, out, in, S] span.

        rounding  relative error that the elements of the tensor may have

        Returns the largest distance of an element of one of them from the span of the other, relative to its norm: 1
        for an element of zeros, which stands for none; large, too, where elements of the tensor repeat each other and
        leave a part of the space out; infinite where some are not finite.
        """
        if not stored.isfinite().all():
            return math.inf
        spans = {}
        for block in self.blocks:
            spans.setdefault((block.out_slot, block.in_slot), []).append(self.kernel(block).ravel())
        spans = {slots: np.linalg.qr(np.stack(kernels).T)[0] for slots, kernels in spans.items()}
        found, outside = self._coordinates(spans, lambda first, like: _numpy(stored, first, like))
        own, _ = self._coordinates(spans, lambda first, like: like)
        _, lengths, directions = np.linalg.svd(found, full_matrices=False)
        directions = directions[lengths > rounding]
        left_out = np.linalg.norm(own - own @ directions.T @ directions, axis=1)
        return float(max(outside.max(), left_out.max()))

    def _coordinates(self, spans, kernels_like):
        """(coordinates [D, n] in the orthonormal bases `spans`, distances [D] from their span), for elements of norm 1.

        kernels_like  function from (first, kernels [n, out, in, S] of this basis) to the kernels that are asked about
        """
        out, in_ = self.out_layout, self.in_layout
        coordinates, outside = [], []
        for first, like in self.chunks():
            kernels = kernels_like(first, like)
            norms = np.linalg.norm(kernels.reshape(len(kernels), -1), axis=1)
            kernels = kernels / np.maximum(norms, TINY)[:, None, None, None]
            split = np.einsum("na,pabs,bm->pnms", out.change_of_basis_inv, kernels, in_.change_of_basis, optimize=True)
            projected, parts = np.zeros_like(split), []
            for (o, i), span in spans.items():
                part = split[:, o.components, i.components]
                parts.append(part.reshape(len(part), -1) @ span)
                projected[:, o.components, i.components] = (parts[-1] @ span.T).reshape(part.shape)
            back = np.einsum("na,pabs,bm->pnms", out.change_of_basis, projected, in_.change_of_basis_inv, optimize=True)
            distances = np.linalg.norm((back - kernels).reshape(len(kernels), -1), axis=1)
            coordinates.append(np.concatenate(parts, axis=1))
            outside.append(np.where(norms == 0, 1.0, distances))
        return np.concatenate(coordinates), np.concatenate(outside)

    def __deepcopy__(self, memo):
        return self  # never changed after construction


def _numpy(tensor, first, like):
    return tensor[first:first + len(like)].double().numpy()


def combine(coefficients, rows):
    """coefficients [..., d] @ rows [d, S], added one by one: the same bits on every machine."""
    total = coefficients[..., :1] * rows[0]
    for d in range(1, len(rows)):
        total = total + coefficients[..., d:d + 1] * rows[d]
    return total


def native_paths(bases):
    """Harmonics and paths of a layer, from the irrep blocks of its bases.

    bases  list of SampledBasis

    Returns (harmonics [R, S], [(out layout, in layout, list of Paths)] for each basis), as layout.find_paths does from
    dense bases.
    """
    return _paths.get(tuple(basis.key for basis in bases), lambda: _native_paths(bases))


def _native_paths(bases):
    rows = {key: value for basis in bases for key, value in basis.rows.items()}
    rows = dict(sorted(rows.items(), key=lambda item: (len(item[1]), repr(item[0][1:]), repr(item[0][0]))))
    harmonics, combinations = _span(rows)
    found, known = [], {}
    for basis in bases:
        paths = []
        for block in basis.blocks:
            key = (block.harmonic, id(block.coefficients))
            if key not in known:
                t = block.coefficients @ combinations[block.harmonic]
                t[np.abs(t) < 1e-13 * np.abs(t).max()] = 0
                known[key] = t
            paths.append(Path(block.out_slot, block.in_slot, known[key]))
        found.append((basis.out_layout, basis.in_layout, paths))
    return harmonics, found


def _span(rows):
    """(harmonics [R, S], {key: [d, R]}) with rows = combinations @ harmonics; most rows are a harmonic themselves."""
    stacked = np.concatenate(list(rows.values()))
    norms = np.linalg.norm(stacked, axis=1)
    unit = stacked / np.where(norms > 0, norms, 1)[:, None]
    for tolerance in (1e-3, 1e-6, 1e-9, 0.0):
        harmonics = find_harmonics(stacked, tolerance) if tolerance else np.eye(stacked.shape[1])
        inverse = np.linalg.pinv(harmonics)
        coefficients = unit @ inverse
        if np.abs(coefficients @ harmonics - unit).max() < 1e-12:
            break
    coefficients[np.abs(coefficients) < 1e-13] = 0
    coefficients *= norms[:, None]
    ends = np.cumsum([len(value) for value in rows.values()])
    return harmonics, dict(zip(rows, np.split(coefficients, ends[:-1])))
