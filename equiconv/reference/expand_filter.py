"""expand_filter by its definition: every basis kernel is built in full, then summed with its weight."""
import math

import torch

from ..layout.plan import PAIR


def expand_filter(weights, pairs, index, values, size, dtype, channels_last, transposed):
    out_channels, in_channels, *kernel = size
    taps = math.prod(kernel)
    filter = weights.new_zeros(out_channels, in_channels, taps)
    for row in pairs.tolist():
        pair = dict(zip(PAIR, row))
        if pair["paths"] == 0:
            continue
        basis = pair_basis(pair, index, values, taps)  # [D, out_size, in_size, S]
        w = weights[pair["weights_start"]:][:pair["out_fields"] * pair["in_fields"] * pair["paths"]]
        block = torch.einsum("ocp,pijs->oicjs", w.view(pair["out_fields"], pair["in_fields"], -1), basis)
        rows = field_channels(index, pair["out_channels_start"], pair["out_fields"], pair["out_size"])
        columns = field_channels(index, pair["in_channels_start"], pair["in_fields"], pair["in_size"])
        filter = filter.index_put((rows[:, None], columns[None, :]), block.reshape(len(rows), len(columns), taps))
    filter = filter.view(*size).to(dtype)
    if transposed:
        filter = filter.transpose(0, 1)
    return filter.contiguous(memory_format=memory_format(len(kernel), channels_last))


def pair_basis(pair, index, values, taps):
    """B[p] = Q_out (T[p] H) Q_in^-1: [D, out_size, in_size, S]."""
    n, m, r, d = (pair[k] for k in ("out_size", "in_size", "harmonics", "paths"))
    row_start = index[pair["row_start"]:][:n * m * r + 1].long()
    rows = torch.repeat_interleave(torch.arange(n * m * r, device=index.device), row_start.diff())
    terms = len(rows)
    paths = index[pair["terms_start"]:][:terms].long()
    coefficients = values.new_zeros(d, n * m * r)
    coefficients[paths, rows] = values[pair["coefficients_start"]:][:terms]
    harmonics = values[pair["harmonics_start"]:][:r * taps].view(r, taps)
    basis = coefficients.view(d, n, m, r) @ harmonics
    if pair["out_basis_start"] >= 0:
        q_out = values[pair["out_basis_start"]:][:n * n].view(n, n)
        basis = torch.einsum("in,pnms->pims", q_out, basis)
    if pair["in_basis_start"] >= 0:
        q_in_inv = values[pair["in_basis_start"]:][:m * m].view(m, m).T
        basis = torch.einsum("pims,mj->pijs", basis, q_in_inv)
    return basis


def field_channels(index, start, fields, size):
    """All channels of some fields, [fields * size]."""
    first = index[start:][:fields].long()
    return (first[:, None] + torch.arange(size, device=index.device)).flatten()


def memory_format(dimensions, channels_last):
    """torch's memory format of a filter with that many spatial dimensions."""
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    return formats.get(dimensions, torch.contiguous_format) if channels_last else torch.contiguous_format
