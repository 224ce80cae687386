"""The fused steerable convolution as an op: torch.ops.equiconv.steerable_conv.fused."""
from math import prod

import torch
import torch.nn.functional as F

from .. import library
from ..formats import CHANNELS_LAST, is_channels_last
from ..fused import fused_layer
from ..fused.kernels import NUMBERS
from ..fused.layer import ACTIVATIONS, STRIDES
from ..layout import plan_of_key

# Of the activations, by their results.
DERIVATIVES = {"relu": lambda y: (y > 0).to(y.dtype), "elu": lambda y: torch.where(y > 0, 1, y + 1)}


def _layer(tensor, plan, kernel, stride):
    return fused_layer(plan_of_key(plan), tuple(kernel), tensor.device, tensor.dtype, stride)


def _convolve(source, weights, bias, plan, kernel, stride, adjoint, padding, target_size, activation):
    layer, bias = _layer(source, plan, kernel, stride), None if bias is None else bias.float().contiguous()
    return layer.convolve(layer.pack(source, adjoint), weights.float().contiguous(), bias, adjoint, padding,
                          target_size, _memory_format(source), activation)


def _convolve_bwd(source, weights, companion, plan, kernel, stride, adjoint, padding, target_size, wants_target,
                  wants_weights):
    layer = _layer(source, plan, kernel, stride)
    packed, target, grad_weights = layer.pack(source, adjoint), source.new_empty(0), weights.new_empty(0)
    if wants_target:
        target = layer.convolve(packed, weights.float().contiguous(), None, adjoint, padding, target_size,
                                _memory_format(source))
    if wants_weights:
        other = layer.pack(companion, not adjoint)
        found = (layer.weight_gradient(other, packed, _other_padding(kernel, padding)) if adjoint else
                 layer.weight_gradient(packed, other, padding))
        grad_weights = found.to(weights.dtype)
    return target, grad_weights


def _memory_format(tensor):
    return CHANNELS_LAST[tensor.dim()] if is_channels_last(tensor) else torch.contiguous_format


def _other_padding(kernel, padding):
    """Of the adjoint of a convolution: around its source, with zeros between the numbers where the stride is not 1."""
    return [k - 1 - p for k, p in zip(kernel, padding)]


def _fake(source, weights, bias, plan, kernel, stride, adjoint, padding, target_size, activation):
    return _like(source, target_size)


def _bwd_fake(source, weights, companion, plan, kernel, stride, adjoint, padding, target_size, wants_target,
              wants_weights):
    target = _like(source, target_size) if wants_target else source.new_empty(0)
    return target, weights.new_empty(weights.shape if wants_weights else [0])


def _like(source, target_size):
    """An empty tensor [B, *target_size] in the memory format of the source."""
    return source.new_empty([source.shape[0], *target_size]).contiguous(memory_format=_memory_format(source))


class _Saved:
    """What a call has beside its tensors, and the same of its adjoint. Keeps the plan alive."""

    def __init__(self, source, plan, kernel, stride, adjoint, padding, target_size):
        self.plan = plan_of_key(plan)
        self.same = (plan, kernel, stride, adjoint, padding, target_size)
        self.adjoint = (plan, kernel, stride, not adjoint, _other_padding(kernel, padding), list(source.shape[1:]))


def _setup_context(ctx, inputs, output):
    source, weights, bias, *rest, ctx.activation = inputs
    ctx.save_for_backward(source, weights, *[output] * (ctx.activation in DERIVATIVES))
    ctx.call, ctx.bias_dtype = _Saved(source, *rest), None if bias is None else bias.dtype


def _backward(ctx, backend, grad):
    source, weights, *output = ctx.saved_tensors
    if ctx.activation in DERIVATIVES:
        grad = grad * DERIVATIVES[ctx.activation](*output)
    needs_source, needs_weights, needs_bias = ctx.needs_input_grad[:3]
    grad_source = grad_weights = grad_bias = None
    if needs_source or needs_weights:
        grad_source, grad_weights = _bwd[backend](grad, weights, source, *ctx.call.adjoint, needs_source, needs_weights)
    if ctx.bias_dtype is not None and needs_bias:
        grad_bias = grad.sum([0, *range(2, grad.dim())], dtype=torch.float32).to(ctx.bias_dtype)
    return grad_source if needs_source else None, grad_weights if needs_weights else None, grad_bias, *[None] * 7


def _bwd_setup_context(ctx, inputs, output):
    source, weights, companion, *rest, ctx.wants_target, ctx.wants_weights = inputs
    ctx.save_for_backward(source, weights, companion)
    ctx.call = _Saved(source, *rest)


def _bwd_backward(ctx, backend, grad_target, grad_grad_weights):
    """As that of ops.steerable_conv."""
    source, weights, companion = ctx.saved_tensors
    grad_source = grad_weights = grad_companion = None
    if ctx.wants_target:
        grad_source = _fwd[backend](grad_target, weights, None, *ctx.call.adjoint, "identity")
        grad_weights = _bwd[backend](source, weights, grad_target, *ctx.call.same, False, True)[1]
    if ctx.wants_weights:
        more = _fwd[backend](companion, grad_grad_weights, None, *ctx.call.adjoint, "identity")
        grad_source = more if grad_source is None else grad_source + more
        grad_companion = _fwd[backend](source, grad_grad_weights, None, *ctx.call.same, "identity")
    return grad_source, grad_weights, grad_companion, *[None] * 8


_CALL = "str plan, int[] kernel, int stride, bool adjoint, int[] padding, SymInt[] target_size"
_fwd = library.define(
    "steerable_conv", f"(Tensor source, Tensor weights, Tensor? bias, {_CALL}, str activation) -> Tensor",
    {"fused": _convolve}, fake=_fake, setup_context=_setup_context, backward=_backward)
_bwd = library.define(
    "steerable_conv_bwd",
    f"(Tensor source, Tensor weights, Tensor companion, {_CALL}, bool wants_target, bool wants_weights) "
    "-> (Tensor, Tensor)", {"fused": _convolve_bwd}, fake=_bwd_fake, setup_context=_bwd_setup_context,
    backward=_bwd_backward)


def fused_steerable_conv(x, weights, plan, kernel_size, *, bias=None, stride=1, padding=0, padding_mode="zeros",
                         activation="identity"):
    """A steerable convolution in one kernel between the irreps of the input and those of the output.

    x             [B, plan.in_channels, *size], two sizes or three, in either memory format: bfloat16, float16, or
                  float32, which is rounded to TF32
    weights       [plan.weights], float32 or x's dtype; rounded like x where they are multiplied with
    plan          layout.FilterPlan
    kernel_size   (k, k) or (k, k, k), odd
    bias          [plan.out_channels] or None
    stride        1 or 2, or the same for each axis
    padding       int, or one for each axis
    padding_mode  "zeros", "reflect", "replicate" or "circular"
    activation    one of fused.ACTIVATIONS, of each number of the output

    Returns [B, plan.out_channels, *size'] in x's memory format. Raises ValueError for what does not fit, and
    fused.Unsupported, a ValueError, for a layer that the kernels cannot compute: see fused.fused_unavailable_reason.
    """
    stride, padding = (tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(kernel_size)
                       for value in (stride, padding))
    _check(x, weights, plan, kernel_size, bias, stride, padding, activation)
    if padding_mode != "zeros":
        x = F.pad(x, [p for axis in reversed(padding) for p in (axis, axis)], padding_mode)
        padding = (0,) * len(padding)
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, kernel_size, stride)]
    if not torch.compiler.is_compiling() and min(size) < 1:
        raise ValueError(f"fused_steerable_conv: x is too small for the kernel: its sizes {tuple(x.shape[2:])} give "
                         f"{size}")
    return _fwd["fused"](x, weights, bias, plan.key(), list(kernel_size), stride[0], False, list(padding),
                         [plan.out_channels, *size], activation)


def _check(x, weights, plan, kernel_size, bias, stride, padding, activation):
    if x.dtype not in NUMBERS:
        raise ValueError(f"fused_steerable_conv: x must be bfloat16, float16 or float32, got {x.dtype}")
    if len(kernel_size) not in (2, 3) or prod(kernel_size) != plan.taps:
        raise ValueError(f"fused_steerable_conv: kernel_size must be two or three numbers whose product is "
                         f"{plan.taps}, got {tuple(kernel_size)}")
    if x.dim() != 2 + len(kernel_size) or x.shape[1] != plan.in_channels:
        raise ValueError(f"fused_steerable_conv: x must have shape [B, {plan.in_channels}, *size] with "
                         f"{len(kernel_size)} sizes, got {tuple(x.shape)}")
    if weights.shape != (plan.weights,) or not weights.is_floating_point():
        raise ValueError(f"fused_steerable_conv: weights must be ({plan.weights},) floating point numbers, got "
                         f"{weights.dtype} {tuple(weights.shape)}")
    if len(stride) != len(kernel_size) or stride[0] not in STRIDES or len(set(stride)) != 1:
        raise ValueError(f"fused_steerable_conv: stride must be 1 or 2, the same along every axis, got {stride}")
    if len(padding) != len(kernel_size) or min(padding) < 0:
        raise ValueError(f"fused_steerable_conv: padding must be one or {len(kernel_size)} numbers of at least 0, got "
                         f"{padding}")
    if bias is not None and bias.shape != (plan.out_channels,):
        raise ValueError(f"fused_steerable_conv: bias must have shape ({plan.out_channels},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"fused_steerable_conv: activation must be one of {ACTIVATIONS}, got {activation!r}")
