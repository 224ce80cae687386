import torch

from .. import library
from ..formats import compute_dtype, dense, empty_fields, like
from ..reference import field_pool as reference
from ..reference.field_pool import ELEMENT, FIELD
from .on_fields import check_fields, check_table, on_backends, pick


def _fake(x, fields, elements, norms, directions):
    return empty_fields(x, fields.shape[0] * _numbers(directions))


def _numbers(directions):
    """Of each field in the output."""
    return 1 if directions is None else directions.shape[1]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.norms, directions = inputs
    ctx.save_for_backward(*tensors, directions)


def _backward(ctx, backend, grad):
    x, fields, elements, directions = ctx.saved_tensors
    return _bwd[backend](like(grad, x), x, fields, elements, ctx.norms, directions), *[None] * 4


def _bwd_fake(grad, x, fields, elements, norms, directions):
    return empty_fields(x, x.shape[1])


def _bwd_backward(ctx, backend, grad_grad_x):
    """grad_x = grad J, and J = dy / dx is 1, or a direction, where x is the largest; x / |x| where its norm is."""
    grad, x, fields, elements, directions = ctx.saved_tensors
    of_field, of_part = elements.unbind(1)
    dtype = compute_dtype(x.dtype)
    v, grad = grad_grad_x.to(dtype), grad.to(dtype)
    if directions is not None:
        grad_grad = _along_directions(v, grad, x, fields, elements, ctx.norms, directions, backend)
        return like(grad_grad.to(x.dtype), x), torch.zeros_like(x), *[None] * 4
    y = _fwd[backend](x, fields, elements, ctx.norms, None).to(dtype)
    j = _bwd[backend](like(torch.ones_like(y, dtype=x.dtype), x), x, fields, elements, ctx.norms, None).to(dtype)
    sums = torch.zeros_like(y).index_add(1, of_field, j * v)  # of each field
    if not ctx.norms:
        return like(sums.to(x.dtype), x), torch.zeros_like(x), *[None] * 4
    chosen = torch.zeros_like(x, dtype=dtype).index_add(1, of_part, j.square()) > 0.5  # parts: at most one per channel
    spread = (torch.where(y > 0, grad / y, 0)).index_select(1, of_field)
    grad_x = spread * (torch.where(chosen.index_select(1, of_part), v, 0) - j * sums.index_select(1, of_field))
    return like(sums.to(x.dtype), x), like(grad_x.to(x.dtype), x), *[None] * 4


def _along_directions(v, grad, x, fields, elements, norms, directions, backend):
    """v J^T where each field has several numbers in the output, one number after the other."""
    sums = []
    for i in range(_numbers(directions)):
        unit = torch.zeros_like(grad, dtype=x.dtype)
        unit[:, i::_numbers(directions)] = 1
        j = _bwd[backend](like(unit, x), x, fields, elements, norms, directions).to(v.dtype)
        sums.append(v.new_zeros(len(x), len(fields), *x.shape[2:]).index_add(1, elements[:, 0], j * v))
    return torch.stack(sums, 2).flatten(1, 2)


_fwd = library.define(
    "field_pool", "(Tensor x, Tensor fields, Tensor elements, bool norms, Tensor? directions) -> Tensor",
    on_backends("field_pool", "field_pool"), fake=_fake, setup_context=_setup_context, backward=_backward)
_bwd = library.define(
    "field_pool_bwd",
    "(Tensor grad, Tensor x, Tensor fields, Tensor elements, bool norms, Tensor? directions) -> Tensor",
    on_backends("field_pool", "field_pool_bwd"), fake=_bwd_fake, setup_context=_setup_context, backward=_bwd_backward)


def field_pool(x, fields, elements, norms, *, directions=None, backend=None):
    """One invariant number of each field and pixel: its largest channel, or the largest norm of its subfields.

    With directions a vector: that of the largest channel, times its number, or zero where that is negative.

    The gradient goes to the first of equal maxima; that of a norm of zero is zero.

    x           [B, C, *spatial], float32, float64, float16 or bfloat16 (the last two are computed in float32)
    fields      int64 [F, 3], on x's device: the first channel of each field in turn, its size, and that of its
                subfields, which divides it (1 where `norms` is False)
    elements    int64 [C, 2]: of each channel its row of `fields`, and the number of its subfield among all
    norms       whether norms are compared, or the channels themselves
    directions  [channels of a field, D] in the dtype that is computed in, for all fields; a constant, to which no
                gradient flows. Not where `norms`
    backend     "native", "triton" or "reference"; None: the best that can run

    Returns [B, F, *spatial], or [B, F * D, *spatial], in x's dtype and memory format. Raises ValueError for what does
    not fit together.
    """
    check_fields("field_pool", x)
    for name, table, columns in (("fields", fields, FIELD), ("elements", elements, ELEMENT)):
        check_table("field_pool", name, table, columns)
    if directions is not None:
        if norms or directions.dim() != 2 or directions.dtype != compute_dtype(x.dtype):
            raise ValueError(f"field_pool: directions must be a matrix of dtype {compute_dtype(x.dtype)}, and norms "
                             f"False, got {tuple(directions.shape)}, {directions.dtype} and {norms}")
        directions = directions.contiguous()
    chosen = pick(x, backend)
    if chosen == "reference":
        return reference.field_pool(x, fields, elements, norms, directions)
    return _fwd[chosen](dense(x), fields, elements, norms, directions)
