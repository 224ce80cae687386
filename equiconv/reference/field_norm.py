"""field_norm by its definition, field by field."""
import torch
import torch.nn.functional as F

from ..formats import compute_dtype, like

#: of the output of field_norm_inner, in the order of NormFunction in csrc/field_norm.h
FUNCTIONS = {"identity": lambda x: x, "relu": F.relu, "elu": F.elu}
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


def field_norm_inner(x, weight, bias, field_of_channel, eps, function="identity"):
    wide, axes = x.to(compute_dtype(x.dtype)), [0, *range(2, x.dim())]

    def mean_of_fields(per_channel):
        sums = torch.zeros_like(weight).index_add(0, field_of_channel, per_channel)
        return sums / torch.zeros_like(weight).index_add(0, field_of_channel, torch.ones_like(per_channel))

    def spread(per_field):
        return _spread(per_field.index_select(0, field_of_channel), x)

    mean = mean_of_fields(wide.mean(axes))
    centred = wide - spread(mean)
    var = mean_of_fields(centred.square().mean(axes))
    y = FUNCTIONS[function](centred * spread(weight * torch.rsqrt(var + eps)) + spread(bias))
    return like(y.to(x.dtype), x), mean, var


def field_norm_inner_bwd(grad, x, weight, bias, field_of_channel, eps, function="identity"):
    """(grad_x, grad_weight, grad_bias), by torch's derivatives."""
    def forward(x, weight, bias):
        return field_norm_inner(x, weight, bias, field_of_channel, eps, function)[0]

    grad_x, *rest = torch.func.vjp(forward, x, weight, bias)[1](grad)
    return like(grad_x, x), *rest


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
