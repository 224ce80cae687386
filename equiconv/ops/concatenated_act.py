import torch

from .. import library
from ..formats import compute_dtype, dense, empty_fields, like
from ..reference import concatenated_act as reference
from .fourier_act import FUNCTIONS
from .on_fields import check_fields, on_backends, pick


def _fake(x, function):
    return empty_fields(x, 2 * x.shape[1])


def _setup_context(ctx, inputs, output):
    *saved, ctx.function = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx, backend, grad):
    x, = ctx.saved_tensors
    return _bwd[backend](like(grad, x), x, ctx.function), None


def _bwd_fake(grad, x, function):
    return empty_fields(x, x.shape[1])


def _bwd_backward(ctx, backend, grad_grad_x):
    """grad_x = f'(x) grad[2c] - f'(-x) grad[2c + 1]"""
    given = ctx.saved_tensors[1]
    grad, x, v = (t.to(compute_dtype(t.dtype)) for t in (*ctx.saved_tensors, grad_grad_x))
    _, slope, curvature = reference.FUNCTIONS[FUNCTIONS[ctx.function]]
    grad_grad = torch.stack([slope(x) * v, -slope(-x) * v], 2).flatten(1, 2)
    grad_x = (curvature(x) * grad[:, ::2] + curvature(-x) * grad[:, 1::2]) * v
    return like(grad_grad.to(given.dtype), given), like(grad_x.to(given.dtype), given), None


_fwd = library.define(
    "concatenated_act", "(Tensor x, int function) -> Tensor", on_backends("concatenated_act", "concatenated_act"),
    fake=_fake, setup_context=_setup_context, backward=_backward)
_bwd = library.define(
    "concatenated_act_bwd", "(Tensor grad, Tensor x, int function) -> Tensor",
    on_backends("concatenated_act", "concatenated_act_bwd"), fake=_bwd_fake, setup_context=_setup_context,
    backward=_bwd_backward)


def concatenated_act(x, function, *, backend=None):
    """A function of each channel and of its negative, side by side: y[2c] = f(x[c]), y[2c + 1] = f(-x[c]).

    x         [B, C, *spatial], float32, float64, float16 or bfloat16 (the last two are computed in float32)
    function  one of ops.fourier_act.FUNCTIONS
    backend   "native", "triton" or "reference"; None: the best that can run

    Returns [B, 2C, *spatial] in x's dtype and memory format. Raises ValueError for what does not fit together.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"concatenated_act: function must be one of {FUNCTIONS}, got {function!r}")
    check_fields("concatenated_act", x)
    chosen = pick(x, backend)
    if chosen == "reference":
        return reference.concatenated_act(x, function)
    return _fwd[chosen](dense(x), FUNCTIONS.index(function))
