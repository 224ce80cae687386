from .. import library
from ..formats import compute_dtype, dense, empty_fields, like
from ..reference import fourier_act as reference
from .on_fields import check_fields, on_backends, pick

FUNCTIONS = tuple(reference.FUNCTIONS)


def _fake(x, a, a_inv, function):
    return empty_fields(x, x.shape[1] // a.shape[1] * a_inv.shape[0])


def _setup_context(ctx, inputs, output):
    *saved, ctx.function = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx, backend, grad):
    x, a, a_inv = ctx.saved_tensors
    return _bwd[backend](like(grad, x), x, a, a_inv, ctx.function), None, None, None


def _bwd_fake(grad, x, a, a_inv, function):
    return empty_fields(x, x.shape[1])


def _bwd_backward(ctx, backend, grad_grad_x):
    """grad_x = A^T (f'(s) * u) with s = A x and u = Ainv^T grad."""
    grad, x, a, a_inv = ctx.saved_tensors
    _, slope, curvature = reference.FUNCTIONS[FUNCTIONS[ctx.function]]
    samples, v, u = reference.sample(x, a), reference.sample(grad_grad_x, a), reference.sample(grad, a_inv.mT)
    grad_grad = reference.project(slope(samples) * v, a_inv, x)
    return grad_grad, reference.project(curvature(samples) * u * v, a.mT, x), None, None, None


_fwd = library.define(
    "fourier_act", "(Tensor x, Tensor a, Tensor a_inv, int function) -> Tensor",
    on_backends("fourier_act", "fourier_act"), fake=_fake, setup_context=_setup_context, backward=_backward)
_bwd = library.define(
    "fourier_act_bwd", "(Tensor grad, Tensor x, Tensor a, Tensor a_inv, int function) -> Tensor",
    on_backends("fourier_act", "fourier_act_bwd"), fake=_bwd_fake, setup_context=_setup_context, backward=_bwd_backward)


def fourier_act(x, a, a_inv, function, *, backend=None):
    """A pointwise function of band-limited functions on a group or a quotient of it: y = Ainv f(A x), field by field.

    A samples a field on a grid, Ainv projects back. The samples are never in memory, and computed again for the
    gradient.

    x         [B, fields * in_size, *spatial], float32, float64, float16 or bfloat16 (the last two computed in float32)
    a         [samples, in_size], in the dtype that is computed in; a constant, to which no gradient flows
    a_inv     [out_size, samples], the same
    function  one of FUNCTIONS
    backend   "native", "triton" or "reference"; None: the best that can run

    Returns [B, fields * out_size, *spatial] in x's dtype and memory format. Raises ValueError for what does not fit
    together.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"fourier_act: function must be one of {FUNCTIONS}, got {function!r}")
    check_fields("fourier_act", x)
    for name, matrix in (("a", a), ("a_inv", a_inv)):
        if matrix.dim() != 2 or matrix.dtype != compute_dtype(x.dtype):
            raise ValueError(f"fourier_act: {name} must be a matrix of dtype {compute_dtype(x.dtype)}, got "
                             f"{tuple(matrix.shape)} and {matrix.dtype}")
    if a_inv.shape[1] != a.shape[0] or x.shape[1] % a.shape[1]:
        raise ValueError(f"fourier_act: a must be [samples, in_size] and a_inv [out_size, samples] for x of fields of "
                         f"in_size channels, got {tuple(a.shape)} and {tuple(a_inv.shape)} for {x.shape[1]} channels")
    chosen = pick(x, backend)
    if chosen == "reference":
        return reference.fourier_act(x, a, a_inv, function)
    return _fwd[chosen](dense(x), a.contiguous(), a_inv.contiguous(), FUNCTIONS.index(function))
