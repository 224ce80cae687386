import torch

from .. import library
from ..formats import compute_dtype, dense, empty_fields, like
from ..reference import field_gate as reference
from ..reference.field_gate import ELEMENT, FIELD
from .on_fields import check_fields, check_table, on_backends, pick

FUNCTIONS = tuple(reference.FUNCTIONS)


def _fake(x, gates, bias, fields, elements, function, eps, out_channels):
    return empty_fields(x, out_channels)


def _setup_context(ctx, inputs, output):
    *saved, ctx.function, eps, _ = inputs
    ctx.save_for_backward(*saved, eps)


def _backward(ctx, backend, grad):
    x, gates, bias, fields, elements, eps = ctx.saved_tensors
    grads = _bwd[backend](like(grad, x), x, gates, bias, fields, elements, ctx.function, eps)
    return *[None if t is None else g for g, t in zip(grads, (x, gates, bias))], *[None] * 5


def _bwd_fake(grad, x, gates, bias, fields, elements, function, eps):
    grad_bias = x.new_empty(0, dtype=torch.float32) if bias is None else torch.empty_like(bias)
    return empty_fields(x, x.shape[1]), empty_fields(x, 0 if gates is None else gates.shape[1]), grad_bias


def _bwd_setup_context(ctx, inputs, output):
    *saved, ctx.function, eps = inputs
    ctx.save_for_backward(*saved, eps)


def _bwd_backward(ctx, backend, *grads):
    """By torch's derivatives of the definition."""
    grad, x, gates, bias, fields, elements, eps = ctx.saved_tensors
    given = [t for t in (grad, x, gates, bias) if t is not None]

    def backward(*given):
        remaining = iter(given)
        inputs = [None if t is None else next(remaining) for t in (grad, x, gates, bias)]
        return reference.field_gate_bwd(*inputs, fields, elements, FUNCTIONS[ctx.function], eps)

    found = iter(torch.func.vjp(backward, *given)[1](tuple(grads)))
    return *[None if t is None else next(found) for t in (grad, x, gates, bias)], *[None] * 4


_ARGUMENTS = "Tensor x, Tensor? gates, Tensor? bias, Tensor fields, Tensor elements, int function, Tensor? eps"
_fwd = library.define(
    "field_gate", f"({_ARGUMENTS}, SymInt out_channels) -> Tensor",
    on_backends("field_gate", "field_gate"), fake=_fake, setup_context=_setup_context, backward=_backward)
_bwd = library.define(
    "field_gate_bwd", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    on_backends("field_gate", "field_gate_bwd"), fake=_bwd_fake, setup_context=_bwd_setup_context,
    backward=_bwd_backward)


def field_gate(x, bias, fields, elements, function, out_channels, *, gates=None, eps=None, backend=None):
    """Fields times a number of their own: y = f(|x| - bias) / |x| x, or y = sigmoid(gate - bias) x, for each pixel.

    x             [B, C, *spatial], float32, float64, float16 or bfloat16 (the last two are computed in float32); all
                  its channels are those of fields and of gates
    bias          [N] in the dtype that is computed in, or None
    fields        int64 [F, 6], on x's device: of each field (or subfield that has its own norm) its first channel, its
                  first channel in the output, its size; the channel of its gate and where the sigmoid itself goes (-1:
                  nowhere); the place of its bias. No channel is in two rows
    elements      int64 [E, 3]: of each channel of each field its place in x, in the output, and the row of its field
    function      one of FUNCTIONS: "gate", or f
    out_channels  of the output: E, or E + F if the sigmoids are kept
    gates         [B, C', *spatial] of x's dtype: where the gates are; None: in x
    eps           tensor of one number, in the dtype that is computed in: y is zero up to this norm; not for "gate"
    backend       "native", "triton" or "reference"; None: the best that can run

    Returns [B, out_channels, *spatial] in x's dtype and memory format. Raises ValueError for what does not fit
    together.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"field_gate: function must be one of {FUNCTIONS}, got {function!r}")
    check_fields("field_gate", x)
    for name, table, columns in (("fields", fields, FIELD), ("elements", elements, ELEMENT)):
        check_table("field_gate", name, table, columns)
    if (eps is None) != (function == "gate"):
        raise ValueError(f"field_gate: eps belongs to functions of the norm, got {eps} for {function!r}")
    for name, values in (("bias", bias), ("eps", eps)):
        if values is not None and values.dtype != compute_dtype(x.dtype):
            raise ValueError(f"field_gate: {name} must have dtype {compute_dtype(x.dtype)}, got {values.dtype}")
    if gates is not None and (gates.dtype != x.dtype or gates.shape[0] != x.shape[0] or gates.shape[2:] != x.shape[2:]):
        raise ValueError(f"field_gate: gates must have the dtype, batch and spatial size of x, got {gates.dtype} "
                         f"{tuple(gates.shape)} for {x.dtype} {tuple(x.shape)}")
    chosen = pick(x, backend)
    if chosen == "reference":
        return reference.field_gate(x, gates, bias, fields, elements, function, eps, out_channels)
    x = dense(x)
    gates, bias = None if gates is None else like(gates, x), None if bias is None else bias.contiguous()
    return _fwd[chosen](x, gates, bias, fields, elements, FUNCTIONS.index(function), eps, out_channels)
