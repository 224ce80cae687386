import torch

from .. import library
from ..formats import compute_dtype, dense, empty_fields, like
from ..reference import field_norm as reference
from ..reference.field_norm import FIELD
from .on_fields import check_fields, check_table, on_backends, pick


def _fake(x, scale, shift, fields, bases):
    torch._check(x.shape[1] == scale.shape[0], lambda: "field_norm: scale must have one number for each channel")
    return empty_fields(x, x.shape[1])


def _setup_context(ctx, inputs, output):
    x, scale, _, fields, bases = inputs
    ctx.save_for_backward(x, scale, fields, bases)


def _backward(ctx, backend, grad):
    x, *rest = ctx.saved_tensors
    grads = _bwd[backend](like(grad, x), x, *rest)
    return *[grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)], None, None


def _bwd_fake(grad, x, scale, fields, bases):
    return empty_fields(x, x.shape[1]), torch.empty_like(scale), torch.empty_like(scale)


def _bwd_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _bwd_backward(ctx, backend, grad_grad_x, grad_grad_scale, grad_grad_shift):
    """grad_x = Q^-T (scale * u), grad_scale = sum of u * z, grad_shift = sum of u; z = Q^-1 x and u = Q^T grad."""
    grad, x, scale, fields, bases = ctx.saved_tensors
    grad_grad_x = like(grad_grad_x, x)
    grad_grad_scale, grad_grad_shift = grad_grad_scale.contiguous(), grad_grad_shift.contiguous()
    grad_grad = _fwd[backend](grad_grad_x, scale, grad_grad_shift, fields, bases)
    grad_grad = grad_grad + _fwd[backend](x, grad_grad_scale, torch.zeros_like(scale), fields, bases)
    grad_x = _bwd[backend](grad, x, grad_grad_scale, fields, bases)[0]
    grad_scale = _bwd[backend](grad, grad_grad_x, scale, fields, bases)[1]
    return grad_grad, grad_x, grad_scale, None, None


def _moments_fake(x, fields, bases):
    return tuple(x.new_empty(x.shape[1], dtype=compute_dtype(x.dtype)) for _ in range(2))


def _moments_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def _moments_backward(ctx, backend, *grads):
    return None, None, None


_TABLES = "Tensor fields, Tensor bases"
_fwd = library.define(
    "field_norm", f"(Tensor x, Tensor scale, Tensor shift, {_TABLES}) -> Tensor",
    on_backends("field_norm", "field_norm"), fake=_fake, setup_context=_setup_context, backward=_backward)
_bwd = library.define(
    "field_norm_bwd", f"(Tensor grad, Tensor x, Tensor scale, {_TABLES}) -> (Tensor, Tensor, Tensor)",
    on_backends("field_norm", "field_norm_bwd"), fake=_bwd_fake, setup_context=_bwd_setup_context,
    backward=_bwd_backward)
_moments = library.define(
    "field_norm_moments", f"(Tensor x, {_TABLES}) -> (Tensor, Tensor)",
    on_backends("field_norm", "field_norm_moments"), fake=_moments_fake, setup_context=_moments_setup_context,
    backward=_moments_backward)


def field_norm(x, scale, shift, fields, bases, *, backend=None):
    """Batch normalisation of fields by given numbers: y = Q (scale * (Q^-1 x) + shift) for each field and pixel.

    Q leads from the basis of its irreps to the field's own, so that scale and shift belong to components of irreps.

    x        [B, C, *spatial], float32, float64, float16 or bfloat16 (the last two are computed in float32)
    scale    [C], in the dtype that is computed in
    shift    [C], the same
    fields   int64 [F, 3], on x's device: the first channel of each field in turn, its size, and where its Q and then
             its Q^-1 begin in `bases`, [size, size] each; -1 where Q is the identity
    bases    [N], in the dtype that is computed in
    backend  "native", "triton" or "reference"; None: the best that can run

    Returns [B, C, *spatial] in x's dtype and memory format. Raises ValueError for what does not fit together.
    """
    chosen = _choose("field_norm", x, fields, bases, backend)
    for name, values in (("scale", scale), ("shift", shift)):
        if values.shape != (x.shape[1],) or values.dtype != compute_dtype(x.dtype):
            raise ValueError(f"field_norm: {name} must have shape ({x.shape[1]},) and dtype {compute_dtype(x.dtype)}, "
                             f"got {tuple(values.shape)} and {values.dtype}")
    if chosen == "reference":
        return reference.field_norm(x, scale, shift, fields, bases)
    return _fwd[chosen](dense(x), scale.contiguous(), shift.contiguous(), fields, bases)


def field_norm_moments(x, fields, bases, *, backend=None):
    """(mean [C], variance [C]) of the components Q^-1 x of the fields, over the batch and all pixels; constants.

    The variance is that of the values themselves: it divides by their number. Both are NaN where there are no values.
    Arguments as field_norm has them; no gradient flows through the results.
    """
    chosen = _choose("field_norm_moments", x, fields, bases, backend)
    x = x.detach()
    if chosen == "reference":
        return reference.field_norm_moments(x, fields, bases)
    return _moments[chosen](dense(x), fields, bases)


def _choose(op, x, fields, bases, backend):
    check_fields(op, x)
    check_table(op, "fields", fields, FIELD, rows="F")
    if bases.dim() != 1 or bases.dtype != compute_dtype(x.dtype):
        raise ValueError(f"{op}: bases must have one dimension and dtype {compute_dtype(x.dtype)}, got "
                         f"{tuple(bases.shape)} and {bases.dtype}")
    return pick(x, backend)
