import math

import torch

from .. import backends, library
from ..formats import FLOATING, compute_dtype
from ..reference import expand_filter as reference
from ..reference.expand_filter import memory_format


def _empty_filter(like, size, dtype, channels_last, transposed):
    shape = [size[1], size[0], *size[2:]] if transposed else list(size)
    filter = like.new_empty(shape, dtype=dtype)
    return filter.contiguous(memory_format=memory_format(len(size) - 2, channels_last))


def _fake(weights, pairs, index, values, size, dtype, channels_last, transposed):
    torch._check(weights.dtype == values.dtype, lambda: "expand_filter: weights and values must have the same dtype")
    return _empty_filter(weights, size, dtype, channels_last, transposed)


def _setup_context(ctx, inputs, output):
    weights, *tables, size, dtype, channels_last, transposed = inputs
    ctx.tables, ctx.weights, ctx.transposed = tables, weights.numel(), transposed


def _backward(ctx, backend, grad_filter):
    grad_weights = _bwd[backend](grad_filter, *ctx.tables, ctx.weights, ctx.transposed)
    return grad_weights, *[None] * 7


def _bwd_fake(grad_filter, pairs, index, values, weights, transposed):
    return values.new_empty(weights)


def _bwd_setup_context(ctx, inputs, output):
    grad_filter, *tables, _, transposed = inputs
    shape = list(grad_filter.shape)
    ctx.size = [shape[1], shape[0], *shape[2:]] if transposed else shape
    ctx.tables, ctx.dtype, ctx.transposed = tables, grad_filter.dtype, transposed


def _bwd_backward(ctx, backend, grad_grad_weights):
    grad = _fwd[backend](grad_grad_weights.contiguous(), *ctx.tables, ctx.size, ctx.dtype, False, ctx.transposed)
    return grad, *[None] * 5


_fwd = library.define(
    "expand_filter",
    "(Tensor weights, Tensor pairs, Tensor index, Tensor values, int[] size, ScalarType dtype, bool channels_last, "
    "bool transposed) -> Tensor",
    {"native": None, "triton": library.triton_kernel("expand_filter", "expand_filter")},
    fake=_fake, setup_context=_setup_context, backward=_backward)
_bwd = library.define(
    "expand_filter_bwd",
    "(Tensor grad_filter, Tensor pairs, Tensor index, Tensor values, int weights, bool transposed) -> Tensor",
    {"native": None, "triton": library.triton_kernel("expand_filter", "expand_filter_bwd")},
    fake=_bwd_fake, setup_context=_bwd_setup_context, backward=_bwd_backward)
_available = tuple(_fwd)
_defaults = backends.defaults(_available)


def expand_filter(weights, plan, kernel_size, *, dtype=None, channels_last=False, transposed=False, backend=None):
    """The filter of a steerable convolution from its weights, for all pairs of representations at once.

    filter[o + i, c + j, s] = sum_p w[p] (Q_out B_p[s] Q_in^-1)[i, j]: escnn's basis expansion, from irrep blocks.

    weights        [plan.weights], float32 or float64 (float16 and bfloat16 are computed in float32)
    plan           layout.FilterPlan
    kernel_size    tuple of the spatial sizes; their product is plan.taps (() for a linear map)
    dtype          of the filter: by default autocast's, else that of the weights
    channels_last  memory format: channels_last (2D) or channels_last_3d, else contiguous
    transposed     as torch's transposed convolutions want it
    backend        "native", "triton", "reference"; None: the best that can run

    Returns [out_channels, in_channels, *kernel_size], or [in_channels, out_channels, *kernel_size] if transposed.
    Raises ValueError for weights or kernel sizes that do not fit the plan, and for a backend that cannot run.
    """
    device, weights_dtype = weights.device, weights.dtype
    device_type = device.type
    if dtype is None:
        wanted = library.autocast_dtype(device_type)
        dtype = weights_dtype if wanted is None or weights_dtype == torch.float64 else wanted
    _check(weights, plan, kernel_size, dtype)
    weights = weights.to(compute_dtype(weights_dtype)).contiguous()
    arguments = (weights, *plan.tables(device, weights.dtype),
                 [plan.out_channels, plan.in_channels, *kernel_size], dtype, channels_last, transposed)
    chosen = backends.pick(_defaults, _available, device_type, backend)
    if chosen == "reference":
        return reference.expand_filter(*arguments)
    return _fwd[chosen](*arguments)


def _check(weights, plan, kernel_size, dtype):
    taps = math.prod(kernel_size)
    if weights.shape != (plan.weights,):
        raise ValueError(f"expand_filter: weights must have shape ({plan.weights},), got {tuple(weights.shape)}")
    if taps != plan.taps:
        raise ValueError(f"expand_filter: kernel_size {tuple(kernel_size)} has {taps} taps, the plan {plan.taps}")
    if weights.dtype not in FLOATING or dtype not in FLOATING:
        raise ValueError(f"expand_filter: weights and filter must be floating point, got {weights.dtype} and {dtype}")
    if (weights.dtype == torch.float64) != (dtype == torch.float64):
        raise ValueError(f"expand_filter: float64 goes with float64 only, got weights {weights.dtype}, filter {dtype}")
