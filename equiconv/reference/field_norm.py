"""field_norm by its definition, field by field."""
import torch

from ..formats import compute_dtype, like

FIELD = ("channel", "size", "basis")  # of a row of `fields`


def field_norm(x, scale, shift, fields, bases):
    z = [_apply(q_inv, part) for _, q_inv, part in _parts(x, fields, bases)]
    normed = _spread(scale, x) * torch.cat(z, 1) + _spread(shift, x)
    return like(torch.cat([_apply(q, part) for q, _, part in _parts(normed, fields, bases)], 1).to(x.dtype), x)


def field_norm_moments(x, fields, bases):
    z = torch.cat([_apply(q_inv, part) for _, q_inv, part in _parts(x, fields, bases)], 1)
    axes = [0, *range(2, x.dim())]
    mean = z.mean(axes)
    return mean, (z - _spread(mean, x)).square().mean(axes)


def _parts(x, fields, bases):
    """(Q, Q^-1, the field) of each field; the matrices are None where they are the identity."""
    x = x.to(compute_dtype(x.dtype))
    for channel, size, basis in fields.tolist():
        q = q_inv = None
        if basis >= 0:
            q, q_inv = bases[basis:][:2 * size * size].view(2, size, size)
        yield q, q_inv, x[:, channel:channel + size]


def _apply(matrix, field):
    return field if matrix is None else torch.einsum("ij,bj...->bi...", matrix, field)


def _spread(per_channel, x):
    return per_channel[(...,) + (None,) * (x.dim() - 2)]
