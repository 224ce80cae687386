import torch

from .. import library
from ..formats import compute_dtype, dense, empty_fields, like
from ..reference import field_pool as reference
from ..reference.field_pool import ELEMENT, FIELD
from .on_fields import check_fields, check_table, on_backends, pick


def _fake(x, fields, elements, norms):
    return empty_fields(x, fields.shape[0])


def _setup_context(ctx, inputs, output):
    *saved, ctx.norms = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx, backend, grad):
    x, fields, elements = ctx.saved_tensors
    return _bwd[backend](like(grad, x), x, fields, elements, ctx.norms), None, None, None


def _bwd_fake(grad, x, fields, elements, norms):
    return empty_fields(x, x.shape[1])


def _bwd_backward(ctx, backend, grad_grad_x):
    """grad_x = grad J, and J = dy / dx is 1 where x is the largest, or x / |x| in the subfield of largest norm."""
    grad, x, fields, elements = ctx.saved_tensors
    of_field, of_part = elements.unbind(1)
    dtype = compute_dtype(x.dtype)
    y = _fwd[backend](x, fields, elements, ctx.norms).to(dtype)
    j, v = _bwd[backend](like(torch.ones_like(y, dtype=x.dtype), x), x, fields, elements, ctx.norms), grad_grad_x
    j, v, grad = j.to(dtype), v.to(dtype), grad.to(dtype)
    sums = torch.zeros_like(y).index_add(1, of_field, j * v)  # of each field
    if not ctx.norms:
        return like(sums.to(x.dtype), x), torch.zeros_like(x), None, None, None
    chosen = torch.zeros_like(x, dtype=dtype).index_add(1, of_part, j.square()) > 0.5  # parts: at most one per channel
    spread = (torch.where(y > 0, grad / y, 0)).index_select(1, of_field)
    grad_x = spread * (torch.where(chosen.index_select(1, of_part), v, 0) - j * sums.index_select(1, of_field))
    return like(sums.to(x.dtype), x), like(grad_x.to(x.dtype), x), None, None, None


_fwd = library.define(
    "field_pool", "(Tensor x, Tensor fields, Tensor elements, bool norms) -> Tensor",
    on_backends("field_pool", "field_pool"), fake=_fake, setup_context=_setup_context, backward=_backward)
_bwd = library.define(
    "field_pool_bwd", "(Tensor grad, Tensor x, Tensor fields, Tensor elements, bool norms) -> Tensor",
    on_backends("field_pool", "field_pool_bwd"), fake=_bwd_fake, setup_context=_setup_context, backward=_bwd_backward)


def field_pool(x, fields, elements, norms, *, backend=None):
    """One invariant number of each field and pixel: its largest channel, or the largest norm of its subfields.

    The gradient goes to the first of equal maxima; that of a norm of zero is zero.

    x         [B, C, *spatial], float32, float64, float16 or bfloat16 (the last two are computed in float32)
    fields    int64 [F, 3], on x's device: the first channel of each field in turn, its size, and that of its subfields,
              which divides it (1 where `norms` is False)
    elements  int64 [C, 2]: of each channel its row of `fields`, and the number of its subfield among all
    norms     whether norms are compared, or the channels themselves
    backend   "native", "triton" or "reference"; None: the best that can run

    Returns [B, F, *spatial] in x's dtype and memory format. Raises ValueError for what does not fit together.
    """
    check_fields("field_pool", x)
    for name, table, columns in (("fields", fields, FIELD), ("elements", elements, ELEMENT)):
        check_table("field_pool", name, table, columns)
    chosen = pick(x, backend)
    if chosen == "reference":
        return reference.field_pool(x, fields, elements, norms)
    return _fwd[chosen](dense(x), fields, elements, norms)
