import math

import torch
import torch.nn.functional as F

from .. import backends, library
from ..formats import FLOATING, compute_dtype, like
from ..layout import Geometry
from ..reference import steerable_conv as reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_TABLES = {"native": "Tensor index, Tensor values, Tensor adjoint_index, Tensor adjoint_values",
           "triton": "Tensor index, Tensor values, str structure, Tensor adjoint_index, Tensor adjoint_values, "
                     "str adjoint_structure"}
_GEOMETRY = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool up, SymInt[] target_size"
_SIZES = 7  # arguments of _GEOMETRY


def _empty_target(source, target_size, format_of):
    return like(source.new_empty([source.shape[0], *target_size]), format_of)


def _fake(source, weights, bias, *rest):
    return _empty_target(source, rest[-1], source)


def _packed_fake(source, packed, bias, activation, alpha, index, values, *geometry):
    return _empty_target(source, geometry[-1], source)


def _pack_fake(weights, *rest):
    return weights.new_empty(torch.library.get_ctx().new_dynamic_size())


def _bwd_fake(source, weights, companion, *rest):
    *_, target_size, wants_target, wants_weights = rest
    target = _empty_target(source, target_size, companion) if wants_target else source.new_empty([0])
    return target, weights.new_empty(weights.shape if wants_weights else [0])


class _Saved:
    """A call's tables and geometry, and the same of its adjoint."""

    def __init__(self, source, *rest):
        tables, (*shape, up, target_size) = rest[:-_SIZES], rest[-_SIZES:]
        half = len(tables) // 2
        self.same = (*tables, *shape, up, target_size)
        self.adjoint = (*tables[half:], *tables[:half], *shape, not up, list(source.shape[1:]))


def _setup_context(ctx, inputs, output):
    source, weights, bias, *rest = inputs
    _save(ctx, source, weights, bias, rest)


def _save(ctx, source, weights, bias, rest, *output):
    ctx.save_for_backward(source, weights, *output)
    ctx.call, ctx.has_bias, ctx.rest = _Saved(source, *rest), bias is not None, len(rest)


def _backward(ctx, backend, grad):
    source, weights, *_ = ctx.saved_tensors
    needs_source, needs_weights, needs_bias = ctx.needs_input_grad[:3]
    grad_source = grad_weights = grad_bias = None
    if needs_source or needs_weights:
        grad_source, grad_weights = _bwd[backend](_readable(grad, backend), weights, source, *ctx.call.adjoint,
                                                  needs_source, needs_weights)
    if ctx.has_bias and needs_bias:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return (grad_source if needs_source else None, grad_weights if needs_weights else None, grad_bias,
            *[None] * ctx.rest)


def _activated_setup_context(ctx, inputs, output):
    source, weights, bias, ctx.activation, ctx.alpha, *rest = inputs
    _save(ctx, source, weights, bias, rest, output)


def _activated_backward(ctx, backend, grad):
    slope = reference.ACTIVATIONS[ACTIVATIONS[ctx.activation]][1](ctx.saved_tensors[2], ctx.alpha)
    of_source, of_weights, of_bias, *rest = _backward(ctx, backend, grad * slope)
    return of_source, of_weights, of_bias, None, None, *rest


def _bwd_setup_context(ctx, inputs, output):
    source, weights, companion, *rest, ctx.wants_target, ctx.wants_weights = inputs
    ctx.save_for_backward(source, weights, companion)
    ctx.call, ctx.rest = _Saved(source, *rest), len(rest)


def _bwd_backward(ctx, backend, grad_target, grad_grad_weights):
    """target = W source is linear in W and in source; grad_weights is the derivative of <W source, companion> by W."""
    source, weights, companion = ctx.saved_tensors
    grad_source = grad_weights = grad_companion = None
    if ctx.wants_target:
        grad_target = _readable(grad_target, backend)
        grad_source = _fwd[backend](grad_target, weights, None, *ctx.call.adjoint)
        grad_weights = _bwd[backend](source, weights, grad_target, *ctx.call.same, False, True)[1]
    if ctx.wants_weights:
        grad_grad_weights = grad_grad_weights.contiguous()
        more = _fwd[backend](companion, grad_grad_weights, None, *ctx.call.adjoint)
        grad_source = more if grad_source is None else grad_source + more
        grad_companion = _fwd[backend](source, grad_grad_weights, None, *ctx.call.same)
    return grad_source, grad_weights, grad_companion, *[None] * (ctx.rest + 2)


def _readable(x, backend):
    """x as the kernels take it: those of one backend read contiguous tensors, those of the other any format."""
    return x.contiguous() if backend == "native" else x


_fwd, _bwd = {}, {}
# One op for each form of the tables: what the kernels of `_cpu` walk through, and what Triton's are compiled for.
for _backend, _name, *_implementations in (
        ("native", "steerable_conv", None, None),
        ("triton", "steerable_conv_two_pass", library.triton_kernel("steerable_conv", "steerable_conv"),
         library.triton_kernel("steerable_conv", "steerable_conv_bwd"))):
    _arguments = f"{_TABLES[_backend]}, {_GEOMETRY}"
    _fwd.update(library.define(
        _name, f"(Tensor source, Tensor weights, Tensor? bias, {_arguments}) -> Tensor",
        {_backend: _implementations[0]}, fake=_fake, setup_context=_setup_context, backward=_backward))
    _bwd.update(library.define(
        f"{_name}_bwd",
        f"(Tensor source, Tensor weights, Tensor companion, {_arguments}, bool wants_target, bool wants_weights) "
        "-> (Tensor, Tensor)", {_backend: _implementations[1]}, fake=_bwd_fake, setup_context=_bwd_setup_context,
        backward=_bwd_backward))
_activated = library.define(
    "steerable_conv_activated", "(Tensor source, Tensor weights, Tensor? bias, int activation, float alpha, "
    f"{_TABLES['native']}, {_GEOMETRY}) -> Tensor", {"native": None}, fake=_fake,
    setup_context=_activated_setup_context, backward=_activated_backward)
_pack = library.define_without_derivative(
    "steerable_conv_pack", "(Tensor weights, Tensor index, Tensor values, int groups) -> Tensor", {"native": None},
    fake=_pack_fake)
_packed = library.define_without_derivative(
    "steerable_conv_packed", "(Tensor source, Tensor packed, Tensor? bias, int activation, float alpha, Tensor index, "
    f"Tensor values, {_GEOMETRY}) -> Tensor", {"native": None}, fake=_packed_fake)
_available = tuple(_fwd)
_defaults = backends.defaults(_available, native=("cpu",))
# of x; those of low precision are computed in float32, with weights in float32
DTYPES = {"native": (torch.float32, torch.float64), "triton": FLOATING, "reference": (torch.float32, torch.float64)}


def steerable_conv(x, weights, plan, kernel_size, *, bias=None, stride=1, padding=0, dilation=1, padding_mode="zeros",
                   groups=1, transposed=False, output_padding=0, activation="identity", alpha=1.0, packed=None,
                   backend=None):
    """A steerable convolution in factorised form: harmonics, Clebsch-Gordan coefficients and mixing in turn.

    Equal to torch's convolution with the filter that ops.expand_filter makes of the same weights and plan, with 4 to 30
    times fewer multiplications (see layout.factorised for the stages).

    x             [B, in_channels, *spatial], two or three spatial dimensions; float32 or float64, for the backend
                  "triton" also bfloat16 and float16
    weights       [plan.weights], of x's dtype; float32 where that has low precision
    plan          layout.FilterPlan
    kernel_size   tuple of the spatial sizes of the filter
    bias          [out_channels] or None
    stride, padding, dilation, output_padding   int, or a tuple of one for each spatial dimension
    padding_mode  one of PADDING_MODES ("zeros" if transposed)
    groups        as torch's convolutions have them
    transposed    a transposed convolution; output_padding belongs to it
    activation    one of ACTIVATIONS: a pointwise function of the result; the backend "native" applies it as it writes
    alpha         of "elu"; of "leaky_relu" the slope where it is negative; not below 0
    packed        pack_weights() of these weights, which the backend "native" takes where no gradients are needed
    backend       "native" (CPU), "triton" (CUDA: in two passes, see triton_kernels/steerable_conv.py), "reference";
                  None: the best that can run

    Returns [B, out_channels, *spatial], contiguous; with the backend "triton" in the memory format of x. Raises
    ValueError for what does not fit together. torch.compile takes it once a first call has made the plan's tables.
    """
    d = len(kernel_size)
    stride, dilation = _each("stride", stride, d, 1), _each("dilation", dilation, d, 1)
    padding, output_padding = _each("padding", padding, d, 0), _each("output_padding", output_padding, d, 0)
    if any(output_padding) and not transposed:
        raise ValueError("steerable_conv: output_padding belongs to transposed convolutions, got "
                         f"{output_padding} without transposed=True")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"steerable_conv: padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"steerable_conv: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not alpha >= 0:
        raise ValueError(f"steerable_conv: alpha must not be negative, got {alpha}")
    if padding_mode != "zeros":
        if transposed:
            raise ValueError("steerable_conv: a transposed convolution pads with zeros, got padding_mode "
                             f"{padding_mode!r}")
        x = F.pad(x, [p for axis in reversed(padding) for p in (axis, axis)], padding_mode)
        padding = (0,) * d
    geometry = _geometry(x, plan, tuple(kernel_size), stride, padding, dilation, groups, transposed, output_padding)
    chosen = backends.pick(_defaults, _available, x.device.type, backend)
    _check(x, weights, plan, bias, geometry, DTYPES[chosen])
    function = reference.ACTIVATIONS[activation][0]
    if chosen == "reference":
        return function(reference.steerable_conv(x, weights, bias, plan.factorised(geometry.kernel), geometry), alpha)
    tensors = (_readable(x, chosen), weights.contiguous(), bias)
    target_size = [geometry.target_channels, *geometry.target_size]
    tables = _tables(chosen, plan, geometry, x.device, weights.dtype)
    shape = (list(geometry.kernel), list(stride), list(padding), list(dilation), groups, transposed, target_size)
    if packed is not None and chosen in _packed and not _may_need_gradients(*tensors):
        return _packed[chosen](tensors[0], packed, bias, ACTIVATIONS.index(activation), float(alpha), *tables[:2],
                               *shape)
    call = (*tables, *shape)
    if activation != "identity" and chosen in _activated:
        return _activated[chosen](*tensors, ACTIVATIONS.index(activation), float(alpha), *call)
    return function(_fwd[chosen](*tensors, *call), alpha)


def pack_weights(weights, plan, kernel_size, *, stride=1, dilation=1, groups=1, transposed=False):
    """What steerable_conv first makes of weights on a CPU, to be passed to calls with the same weights and options.

    Takes what steerable_conv takes. Returns a tensor that only calls with these arguments can read. Raises ValueError.
    """
    if weights.device.type != "cpu" or weights.shape != (plan.weights,) or weights.dtype not in DTYPES["native"]:
        raise ValueError(f"pack_weights: weights must have shape ({plan.weights},), float32 or float64, on a CPU, got "
                         f"{tuple(weights.shape)}, {weights.dtype} on {weights.device}")
    stride, dilation = _each("stride", stride, len(kernel_size), 1), _each("dilation", dilation, len(kernel_size), 1)
    kernel = tuple(kernel_size)
    _check_plan("pack_weights", plan, kernel, groups, transposed)
    tables = plan.conv_tables(kernel, stride, dilation, groups, transposed, False, weights.device, weights.dtype)
    return _pack["native"](weights.contiguous(), *tables, groups)


def _may_need_gradients(*tensors):
    """Whether the derivative of a call may be asked for; in transforms and forward mode the tensors do not tell."""
    if torch._C._are_functorch_transforms_active() or library.in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _tables(backend, plan, geometry, device, dtype):
    """The plan's tables for a call and its adjoint."""
    found = []
    for adjoint in (False, True):
        up = geometry.up != adjoint
        if backend == "native":
            shape = (geometry.kernel, geometry.stride, geometry.dilation, geometry.groups)
            found += plan.conv_tables(*shape, up, adjoint, device, dtype)
        else:
            found += plan.two_pass_tables(geometry.kernel, geometry.groups, up, adjoint, device, dtype)
    return found


def make_tables(backend, plan, geometry, device, dtype):
    """Makes the plan's tables for calls with weights of that dtype: a trace of torch.compile finds them then."""
    _tables(backend, plan, geometry, device, dtype)


def _each(name, value, d, least):
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * d
    if len(values) != d or min(values) < least:
        raise ValueError(f"steerable_conv: {name} must be {d} integers of at least {least}, or one, got {value}")
    return values


def _geometry(x, plan, kernel, stride, padding, dilation, groups, transposed, output_padding):
    if x.dim() != len(kernel) + 2:
        raise ValueError(f"steerable_conv: x must have {len(kernel) + 2} dimensions, got shape {tuple(x.shape)}")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if transposed:
        size = [(n - 1) * s - 2 * p + r + o + 1
                for n, s, p, r, o in zip(x.shape[2:], stride, padding, reach, output_padding)]
    else:
        size = [(n + 2 * p - r - 1) // s + 1 for n, s, p, r in zip(x.shape[2:], stride, padding, reach)]
    if not torch.compiler.is_compiling() and min(size) < 1:
        raise ValueError(f"steerable_conv: x is too small for the kernel: its spatial sizes {tuple(x.shape[2:])} give "
                         f"{size}")
    # the channels of p are those of all groups, see layout.Geometry
    source = plan.in_channels * (1 if transposed else groups)
    target = plan.out_channels * (groups if transposed else 1)
    return Geometry(kernel, stride, padding, dilation, groups, transposed, source, target, tuple(x.shape[2:]),
                    tuple(size))


def _check(x, weights, plan, bias, geometry, dtypes):
    if x.shape[1] != geometry.source_channels:
        raise ValueError(f"steerable_conv: x must have {geometry.source_channels} channels, got {x.shape[1]}")
    if weights.shape != (plan.weights,):
        raise ValueError(f"steerable_conv: weights must have shape ({plan.weights},), got {tuple(weights.shape)}")
    _check_plan("steerable_conv", plan, geometry.kernel, geometry.groups, geometry.up)
    if x.dtype not in dtypes or weights.dtype != compute_dtype(x.dtype):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"steerable_conv: x must be {names}, and weights the same (float32 for low precision), got "
                         f"{x.dtype} and {weights.dtype}")
    if bias is not None and (bias.shape != (geometry.target_channels,) or bias.dtype != x.dtype):
        raise ValueError(f"steerable_conv: bias must have shape ({geometry.target_channels},) and dtype {x.dtype}, got "
                         f"{tuple(bias.shape)} and {bias.dtype}")


def _check_plan(name, plan, kernel, groups, up):
    if math.prod(kernel) != plan.taps:
        raise ValueError(f"{name}: kernel_size {kernel} has {math.prod(kernel)} taps, the plan {plan.taps}")
    divided = [pair.in_fields if up else pair.out_fields for pair in plan.pairs]
    if groups < 1 or any(len(fields) % groups for fields in divided):
        raise ValueError(f"{name}: groups must divide the fields of one side of the plan (of each representation of "
                         f"the {'in' if up else 'out'}put), got {groups}")
