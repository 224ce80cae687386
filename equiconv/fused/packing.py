"""The numbers that the fused kernels multiply by, in the order in which tensor cores take them."""
import numpy as np

from .structure import LANES_OF_OPERAND


def toeplitz(harmonics, size):
    """The operands of the fragments, one after another, for numbers of `size` bytes.

    The product of such a Toeplitz matrix with 16 columns gives 8 pixels. The order is that of Number::fetch_a of
    device.cuh or, of a single harmonic, Number::fetch.
    """
    lane, stride, taps, operands = np.arange(32), harmonics.stride, harmonics.taps, []
    for pair, plane, row, phase in harmonics.of_fragment:
        operand = np.zeros((32, 2, len(pair), 2))  # lane, half of the columns, harmonic, number
        for half, h, number in np.ndindex(operand.shape[1:]):
            taps_of_row = harmonics.values[pair[h], harmonics.depth_taps // 2 + plane, taps // 2 + row]
            tap = stride * (2 * (lane % 4) + number + 8 * half - lane // 4) + phase
            inside = (tap >= 0) & (tap < taps)
            operand[:, half, h, number] = np.where(inside, taps_of_row[np.clip(tap, 0, taps - 1)], 0)
        operands.append((operand.transpose(1, 0, 3, 2) if size == 4 and len(pair) == 2 else operand).ravel())
    return np.concatenate(operands)


class SparseMap:
    """to[i] = sum of coefficients[t] * from[index[t]] for t in start[i] .. start[i + 1]: as maps.cuh takes it."""

    def __init__(self, rows, columns, values, shape):
        """Of elements (row, column, value) of a matrix of that shape."""
        order = np.argsort(rows, kind="stable")
        self.start = np.searchsorted(rows[order], np.arange(shape[0] + 1)).astype(np.int32)
        self.index, self.coefficients = columns[order].astype(np.int32), values[order].astype(np.float32)
        self.shape = shape

    @classmethod
    def of_matrix(cls, matrix):
        matrix = np.where(np.abs(matrix) > 1e-12 * np.abs(matrix).max(initial=0), matrix, 0)  # noise of float64
        rows, columns = matrix.nonzero()
        return cls(rows, columns, matrix[rows, columns], matrix.shape)


def _of_structure(structure):
    """For each piece (rows of the layer's Mixing, the target's copies in the piece, steps, which of a step's parts)"""
    mixing, found = structure.layer.mixing, []
    for n, piece in enumerate(structure.pieces):
        mask = mixing.target == piece.block
        mask &= (piece.first <= mixing.target_copy) & (mixing.target_copy < piece.first + piece.copies)
        rows = mixing.where(mask)
        step = np.empty((len(structure.layer.source.blocks), 1 + rows.z.max(initial=0), 2), int)
        for (m, its_piece, z), place in structure.products.items():
            if its_piece == n:
                step[m, z] = place
        place = step[rows.source, rows.z]
        which = rows.part if structure.is_complex(n) else place[:, 1]
        found.append((rows, rows.target_copy - piece.first, place[:, 0], which))
    return found


def weight_map(structure, weights):
    """SparseMap from the layer's weights to the forward kernel's operands [operand, lane, 8 copies, z, number]."""
    to, index, values = [], [], []
    places = np.arange(LANES_OF_OPERAND)  # of [lane, 8 copies, z, number]
    if structure.layer.dtype.itemsize == 4:  # [8 copies, lane, z, number], as Number::fetch takes them
        places = places.reshape(2, 32, 4).swapaxes(0, 1).ravel()
    for rows, copy, step, which in _of_structure(structure):
        m, at = rows.source, rows.source_copy
        operand = structure.operand_base[m] + at // 8 * np.array(structure.operands)[m] + structure.operand[step]
        operand += copy // 16
        lane, register = copy % 8 * 4 + at % 8 // 2, copy // 8 % 2 * 2 + which
        to.append(operand * LANES_OF_OPERAND + places[(lane * 4 + register) * 2 + at % 2])
        index.append(rows.weight)
        values.append(rows.scale)
    shape = (int(structure.operand_base[-1]) * LANES_OF_OPERAND, weights)
    return SparseMap(*map(np.concatenate, (to, index, values)), shape)


def gradient_map(structure, weights):
    """SparseMap from the tiles [n_tiles, lane, 4] of the gradient kernel to the layer's weights."""
    to, index, values = [], [], []
    for rows, copy, step, which in _of_structure(structure):
        m, at = rows.source, rows.source_copy
        blocks = np.array([piece.copies // 8 for piece in structure.pieces])[np.array(structure.steps)[step, 0]]
        tile = structure.tile_base[m] + at // 16 * np.array(structure.tiles)[m] + structure.tile[step]
        tile += which * blocks + copy // 8
        lane, number = at % 8 * 4 + copy % 8 // 2, at % 16 // 8 * 2 + copy % 2
        to.append(rows.weight)
        index.append((tile * 32 + lane) * 4 + number)
        values.append(rows.scale)
    return SparseMap(*map(np.concatenate, (to, index, values)), (weights, int(structure.tile_base[-1]) * 128))
