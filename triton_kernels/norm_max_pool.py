"""norm_max_pool in Triton: a field of a pixel of the output (forward) or of x (backward) to each lane.

Forward reads x and writes the output; backward reads x and the output's gradient and writes x's. What neighbours read
twice comes from the caches. The gradient is gathered from the windows that a pixel is in, whose largest norms are found
again: no atomic additions, and the same sum each time.
"""
import itertools

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import empty_fields, is_channels_last, like
from ..ops.norm_max_pool import empty_output
from .field_pool import load_rows
from .field_tensor import DTYPES, compute_type
from .numbers import to_nearest
from .window_pool import load_at, places, solid


@triton.jit
def offset_of(batch, channel, i, j, k, channels, size, CHANNELS_LAST: tl.constexpr):
    """Of numbers in a tensor of that size."""
    if CHANNELS_LAST:
        return (((batch * size[0] + i) * size[1] + j) * size[2] + k) * channels + channel
    return (((batch * channels + channel) * size[0] + i) * size[1] + j) * size[2] + k


@triton.jit
def place_of(tap, i, j, k, WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """Where a tap of the windows i, j, k is."""
    a, b, c = tap // (WINDOW[1] * WINDOW[2]), tap // WINDOW[2] % WINDOW[1], tap % WINDOW[2]
    return (i * STRIDE[0] - PADDING[0] + a * DILATION[0], j * STRIDE[1] - PADDING[1] + b * DILATION[1],
            k * STRIDE[2] - PADDING[2] + c * DILATION[2])


@triton.jit
def largest_tap(x_ptr, batch, channel, length, longest, i, j, k, exists, channels, size, WINDOW: tl.constexpr,
                STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Of the windows i, j, k: the first of equal norms of fields of that length, the last that is no number."""
    most = tl.full(exists.shape, -1.0, compute_type(x_ptr))  # less than a norm
    at = tl.zeros(exists.shape, tl.int32)
    for tap in range(WINDOW[0] * WINDOW[1] * WINDOW[2]):
        first, second, third = place_of(tap, i, j, k, WINDOW, STRIDE, PADDING, DILATION)
        inside = exists & (first >= 0) & (second >= 0) & (third >= 0)
        inside &= (first < size[0]) & (second < size[1]) & (third < size[2])
        squares = tl.zeros(exists.shape, compute_type(x_ptr))
        for c in range(0, longest):
            x = load_at(x_ptr, batch, channel + c, first, second, third, inside & (c < length), channels, size,
                        CHANNELS_LAST, 0.0)
            squares += x * x
        norm = tl.sqrt(squares) if squares.dtype == tl.float64 else tl.sqrt_rn(squares)  # both exact
        takes = inside & ((norm > most) | (norm != norm))
        most, at = tl.where(takes, norm, most), tl.where(takes, tap, at)
    return at


@triton.jit
def norm_max_pool_kernel(x_ptr, y_ptr, fields_ptr, num_fields, channels, total, size, out, WINDOW: tl.constexpr,
                         STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
                         CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    _, exists, batch, field, (i, j, k) = places(total, num_fields, out, CHANNELS_LAST, BLOCK)
    channel, length, _ = load_rows(fields_ptr, field, tl.where(exists, num_fields, 0))
    longest = tl.max(length)
    at = largest_tap(x_ptr, batch, channel, length, longest, i, j, k, exists, channels, size, WINDOW, STRIDE, PADDING,
                     DILATION, CHANNELS_LAST)
    first, second, third = place_of(at, i, j, k, WINDOW, STRIDE, PADDING, DILATION)
    for c in range(0, longest):
        has = exists & (c < length)
        x = load_at(x_ptr, batch, channel + c, first, second, third, has, channels, size, CHANNELS_LAST, 0.0)
        offset = offset_of(batch, channel + c, i, j, k, channels, out, CHANNELS_LAST)
        tl.store(y_ptr + offset, to_nearest(x, y_ptr.dtype.element_ty), mask=has)


@triton.jit
def norm_max_pool_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, fields_ptr, num_fields, channels, total, size, out,
                             WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
                             OWNERS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
                             BLOCK_SIZE: tl.constexpr):
    """OWNERS: how many windows a pixel may be in, in each dimension."""
    _, exists, batch, field, (i, j, k) = places(total, num_fields, size, CHANNELS_LAST, BLOCK)
    channel, length, _ = load_rows(fields_ptr, field, tl.where(exists, num_fields, 0))
    longest = tl.max(length)
    for start in range(0, longest, BLOCK_SIZE):
        c = start + tl.arange(0, BLOCK_SIZE)[None, :]
        has = exists[:, None] & (c < length[:, None])
        result = tl.zeros(has.shape, compute_type(x_ptr))
        for owner in range(OWNERS[0] * OWNERS[1] * OWNERS[2]):
            first = (i + PADDING[0]) // STRIDE[0] - owner // (OWNERS[1] * OWNERS[2])
            second = (j + PADDING[1]) // STRIDE[1] - owner // OWNERS[2] % OWNERS[1]
            third = (k + PADDING[2]) // STRIDE[2] - owner % OWNERS[2]
            within = exists & (first >= 0) & (second >= 0) & (third >= 0)
            within &= (first < out[0]) & (second < out[1]) & (third < out[2])
            at = largest_tap(x_ptr, batch, channel, length, longest, first, second, third, within, channels, size,
                             WINDOW, STRIDE, PADDING, DILATION, CHANNELS_LAST)
            at_i, at_j, at_k = place_of(at, first, second, third, WINDOW, STRIDE, PADDING, DILATION)
            within &= (at_i == i) & (at_j == j) & (at_k == k)
            result += load_at(grad_ptr, batch[:, None], channel[:, None] + c, first[:, None], second[:, None],
                              third[:, None], has & within[:, None], channels, out, CHANNELS_LAST, 0.0)
        offset = offset_of(batch[:, None], channel[:, None] + c, i[:, None], j[:, None], k[:, None], channels, size,
                           CHANNELS_LAST)
        tl.store(grad_x_ptr + offset, to_nearest(result, grad_x_ptr.dtype.element_ty), mask=has)


IN_INTERPRETER = {"BLOCK": 2048}  # large: fewer calls
CONFIG = {"BLOCK": 128, "maxnreg": 255, "enable_fp_fusion": False}  # x * x + y * y is y * y + x * x without fusion
BLOCK_SIZE = 4


def constants(window, stride, padding, dilation):
    """What the kernels are compiled for."""
    return {"WINDOW": solid(window, 1), "STRIDE": solid(stride, 1), "PADDING": solid(padding, 0),
            "DILATION": solid(dilation, 1)}


def of_gradient(given):
    """What the kernel of the gradient is compiled for, besides."""
    reach = [d * (w - 1) + 1 for w, d in zip(given["WINDOW"], given["DILATION"])]
    return {"OWNERS": tuple(triton.cdiv(r, s) for r, s in zip(reach, given["STRIDE"])), "BLOCK_SIZE": BLOCK_SIZE}


def _launch(kernel, x, y, tensors, fields, result, constants):
    """result: whose pixels the lanes are of."""
    if max(x.numel(), y.numel()) >= 1 << 31:
        raise ValueError(f"norm_max_pool: x must have less than 2^31 elements, got {tuple(x.shape)}")
    total = result.numel() // max(x.shape[1], 1) * len(fields)
    c = constants | (IN_INTERPRETER if TRITON_INTERPRET else CONFIG)
    if total:
        with torch.cuda.device_of(x):
            kernel[(triton.cdiv(total, c["BLOCK"]),)](
                *tensors, fields, len(fields), x.shape[1], total, solid(x.shape[2:], 1), solid(y.shape[2:], 1),
                CHANNELS_LAST=is_channels_last(x), **c)
    return result


def norm_max_pool(x, fields, elements, *geometry):
    y = empty_output(x, *geometry)
    return _launch(norm_max_pool_kernel, x, y, (x, y), fields, y, constants(*geometry[:-1]))


def norm_max_pool_bwd(grad, x, fields, elements, *geometry):
    grad, grad_x, given = like(grad, x), empty_fields(x, x.shape[1]), constants(*geometry[:-1])
    return _launch(norm_max_pool_bwd_kernel, x, grad, (grad, x, grad_x), fields, grad_x, given | of_gradient(given))


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    sizes = [((2, 2), (2, 2), (0, 0), (1, 1)), ((3, 3), (1, 1), (1, 1), (1, 1))]
    for dtype, geometry, channels_last in itertools.product(DTYPES, sizes, (False, True)):
        types = {**dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*" + dtype), "fields_ptr": "*i64",
                 **dict.fromkeys(("num_fields", "channels", "total"), "i32"),
                 **dict.fromkeys(("size", "out"), ("i32", "i32", "i32"))}
        c = {**constants(*geometry), "CHANNELS_LAST": channels_last, **CONFIG}
        yield norm_max_pool_kernel, types, c
        yield norm_max_pool_bwd_kernel, types, c | of_gradient(c)
