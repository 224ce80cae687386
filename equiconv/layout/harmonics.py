"""The few scalar functions on the taps that span every basis kernel of a layer."""
import numpy as np

NOISE = 1e-6  # escnn samples its basis in float32: relative differences below this mean nothing


def find_harmonics(rows, tolerance):
    """Picks rows that span all rows: natural harmonics (one ring, one angular function) where the first rows are such.

    rows       [n, S] candidates, the preferred ones first (those of the smallest irreps hold single harmonics)
    tolerance  a row whose part outside the span is below this fraction of its norm adds no harmonic

    Returns [R, S], of unit norm. Greedy Gram-Schmidt, in the order of the rows.
    """
    norms = np.linalg.norm(rows, axis=1)
    rows, norms = rows[norms > 1e-3 * norms.max()], norms[norms > 1e-3 * norms.max()]
    unit = rows / norms[:, None]
    residual, picked = unit.copy(), []
    while len(picked) < rows.shape[1]:
        outside = np.linalg.norm(residual, axis=1) > tolerance
        if not outside.any():
            break
        pick = int(outside.argmax())
        picked.append(pick)
        direction = residual[pick] / np.linalg.norm(residual[pick])
        for _ in range(2):  # twice: the second pass removes what rounding left
            residual -= np.outer(residual @ direction, direction)
    return unit[picked]


def decompose(blocks, rows):
    """Harmonics H and sparse coefficients T of kernels in the irrep basis: blocks[k] = T[k] @ H.

    blocks  list of [..., S] arrays: every kernel of the layer
    rows    [n, S] candidates for the harmonics (see find_harmonics)

    Returns (H [R, S], list of T [..., R]); the relative error of each T @ H is below NOISE / 2.
    """
    scales = [np.abs(block).max() for block in blocks]  # one each: changes of basis may differ in scale
    samples = np.concatenate([block.reshape(-1, block.shape[-1]) / scale for block, scale in zip(blocks, scales)])
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6):
        harmonics = find_harmonics(rows, tolerance)
        inverse = np.linalg.pinv(harmonics)  # [S, R]
        coefficients = []
        for block, scale in zip(blocks, scales):
            t = block @ inverse
            t[np.abs(t) < NOISE * scale] = 0
            coefficients.append(t)
        known = np.concatenate([t.reshape(-1, t.shape[-1]) / scale for t, scale in zip(coefficients, scales)])
        harmonics = np.linalg.lstsq(known, samples, rcond=None)[0]  # averages the noise of the rows that were picked
        if all(np.abs(t @ harmonics - block).max() <= NOISE / 2 * scale
               for t, block, scale in zip(coefficients, blocks, scales)):
            return harmonics, coefficients
    return np.eye(rows.shape[1]), blocks


def snap(coefficients):
    """The list of T [..., R] with equal values where they differ by noise only, up to the scale of each T.

    Kernels of one pair of irreps, and the elements of one kernel, are often the same numbers up to sign. Exactly equal
    they are found to be the same, whether one looks at rows or, in the adjoint, at columns.
    """
    scales = [t.flat[np.argmax(np.abs(t) > (1 - 1e-5) * np.abs(t).max())] for t in coefficients]
    sizes = np.concatenate([np.abs(t / scale).ravel() for t, scale in zip(coefficients, scales)])
    order = np.argsort(sizes)
    ordered = sizes[order]
    cluster = np.concatenate([[0], np.cumsum(np.diff(ordered) > NOISE / 4)])
    means = np.bincount(cluster, ordered) / np.bincount(cluster)
    means[cluster[np.searchsorted(ordered, 1.0)]] = 1.0
    snapped = np.empty_like(sizes)
    snapped[order] = means[cluster]
    parts = np.split(snapped, np.cumsum([t.size for t in coefficients])[:-1])
    return [np.copysign(part.reshape(t.shape), t) * abs(scale) for part, t, scale in zip(parts, coefficients, scales)]
