"""window_pool in Triton: an element of the output (forward) or of x (backward) to each lane.

Windows overlap little, and what neighbours read twice comes from the caches: forward reads x and writes the output,
backward reads x and the output's gradient and writes x's. The gradient is gathered from the windows that an element is
in, each of whose largest is found again: no atomic additions, and the same sum each time.
"""
import itertools

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import is_channels_last, like
from ..ops.window_pool import out_size
from .field_tensor import DTYPES, compute_type, computed_type
from .numbers import to_nearest


@triton.jit
def places(total, channels, size, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """(element, batch, channel, place in three dimensions) of the lanes of a program, for a tensor of that size."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        channel, pixel = n % channels, n // channels
    else:
        pixel = n % (size[0] * size[1] * size[2])
        channel = n // (size[0] * size[1] * size[2]) % channels
    batch = n // (channels * size[0] * size[1] * size[2])
    return n, n < total, batch, channel, (pixel // (size[1] * size[2]) % size[0], pixel // size[2] % size[1],
                                          pixel % size[2])


@triton.jit
def load_at(x_ptr, batch, channel, i, j, k, exists, channels, size, CHANNELS_LAST: tl.constexpr, other):
    """Numbers of a tensor of that size, `other` beyond its edges."""
    exists = exists & (i >= 0) & (j >= 0) & (k >= 0) & (i < size[0]) & (j < size[1]) & (k < size[2])
    if CHANNELS_LAST:
        offset = (((batch * size[0] + i) * size[1] + j) * size[2] + k) * channels + channel
    else:
        offset = (((batch * channels + channel) * size[0] + i) * size[1] + j) * size[2] + k
    return tl.load(x_ptr + offset, mask=exists, other=other).to(compute_type(x_ptr))


@triton.jit
def largest_of(x_ptr, batch, channel, i, j, k, exists, channels, size, WINDOW: tl.constexpr, STRIDE: tl.constexpr,
               PADDING: tl.constexpr, DILATION: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(largest number of the window i, j, k; NaN if one is, the first tap where it is)"""
    most = tl.full(exists.shape, float("-inf"), compute_type(x_ptr))
    at = tl.zeros(exists.shape, tl.int32)
    for tap in range(WINDOW[0] * WINDOW[1] * WINDOW[2]):
        a, b, c = tap // (WINDOW[1] * WINDOW[2]), tap // WINDOW[2] % WINDOW[1], tap % WINDOW[2]
        x = load_at(x_ptr, batch, channel, i * STRIDE[0] - PADDING[0] + a * DILATION[0],
                    j * STRIDE[1] - PADDING[1] + b * DILATION[1], k * STRIDE[2] - PADDING[2] + c * DILATION[2], exists,
                    channels, size, CHANNELS_LAST, float("-inf"))
        takes = (most == most) & ((x > most) | (x != x))
        most, at = tl.where(takes, x, most), tl.where(takes, tap, at)
    return most, at


@triton.jit
def window_pool_kernel(x_ptr, y_ptr, filter_ptr, total, channels, size, between, out, WINDOW: tl.constexpr,
                       WINDOW_STRIDE: tl.constexpr, WINDOW_PADDING: tl.constexpr, DILATION: tl.constexpr,
                       KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr,
                       CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    n, exists, batch, channel, (i, j, k) = places(total, channels, out, CHANNELS_LAST, BLOCK)
    if filter_ptr is None:
        y, _ = largest_of(x_ptr, batch, channel, i, j, k, exists, channels, size, WINDOW, WINDOW_STRIDE,
                          WINDOW_PADDING, DILATION, CHANNELS_LAST)
    else:
        y = tl.zeros(n.shape, compute_type(x_ptr))
        for tap in range(KERNEL[0] * KERNEL[1] * KERNEL[2]):
            a, b, c = tap // (KERNEL[1] * KERNEL[2]), tap // KERNEL[2] % KERNEL[1], tap % KERNEL[2]
            first, second = i * STRIDE[0] - PADDING[0] + a, j * STRIDE[1] - PADDING[1] + b
            third = k * STRIDE[2] - PADDING[2] + c
            inside = (first >= 0) & (first < between[0]) & (second >= 0) & (second < between[1]) & (third >= 0)
            inside = exists & inside & (third < between[2])
            if HAS_WINDOW:
                value, _ = largest_of(x_ptr, batch, channel, first, second, third, inside, channels, size, WINDOW,
                                      WINDOW_STRIDE, WINDOW_PADDING, DILATION, CHANNELS_LAST)
            else:
                value = load_at(x_ptr, batch, channel, first, second, third, inside, channels, size, CHANNELS_LAST,
                                0.0)
            weight = tl.load(filter_ptr + tap * channels + channel, mask=inside, other=0.0)
            y += weight * tl.where(inside, value, 0.0)
    tl.store(y_ptr + n, to_nearest(y, y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def grad_between(grad_ptr, filter_ptr, batch, channel, i, j, k, exists, channels, out, KERNEL: tl.constexpr,
                 STRIDE: tl.constexpr, PADDING: tl.constexpr, OWNERS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The gradient of what the sum is taken of. OWNERS: how many sums an element may be in, in each dimension."""
    total = tl.zeros(exists.shape, compute_type(grad_ptr))
    for owner in range(OWNERS[0] * OWNERS[1] * OWNERS[2]):
        first = (i + PADDING[0]) // STRIDE[0] - owner // (OWNERS[1] * OWNERS[2])
        second = (j + PADDING[1]) // STRIDE[1] - owner // OWNERS[2] % OWNERS[1]
        third = (k + PADDING[2]) // STRIDE[2] - owner % OWNERS[2]
        a = i + PADDING[0] - first * STRIDE[0]
        b = j + PADDING[1] - second * STRIDE[1]
        c = k + PADDING[2] - third * STRIDE[2]
        has = exists & (a < KERNEL[0]) & (b < KERNEL[1]) & (c < KERNEL[2])
        grad = load_at(grad_ptr, batch, channel, first, second, third, has, channels, out, CHANNELS_LAST, 0.0)
        tap = (a * KERNEL[1] + b) * KERNEL[2] + c
        total += grad * tl.load(filter_ptr + tap * channels + channel, mask=has, other=0.0)
    return total


@triton.jit
def window_pool_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, filter_ptr, total, channels, size, between, out,
                           WINDOW: tl.constexpr, WINDOW_STRIDE: tl.constexpr, WINDOW_PADDING: tl.constexpr,
                           DILATION: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
                           HAS_WINDOW: tl.constexpr, WINDOW_OWNERS: tl.constexpr, OWNERS: tl.constexpr,
                           CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    n, exists, batch, channel, (i, j, k) = places(total, channels, size, CHANNELS_LAST, BLOCK)
    if HAS_WINDOW:
        result = tl.zeros(n.shape, compute_type(x_ptr))
        for owner in range(WINDOW_OWNERS[0] * WINDOW_OWNERS[1] * WINDOW_OWNERS[2]):
            first = (i + WINDOW_PADDING[0]) // WINDOW_STRIDE[0] - owner // (WINDOW_OWNERS[1] * WINDOW_OWNERS[2])
            second = (j + WINDOW_PADDING[1]) // WINDOW_STRIDE[1] - owner // WINDOW_OWNERS[2] % WINDOW_OWNERS[1]
            third = (k + WINDOW_PADDING[2]) // WINDOW_STRIDE[2] - owner % WINDOW_OWNERS[2]
            a = i + WINDOW_PADDING[0] - first * WINDOW_STRIDE[0]
            b = j + WINDOW_PADDING[1] - second * WINDOW_STRIDE[1]
            c = k + WINDOW_PADDING[2] - third * WINDOW_STRIDE[2]
            tap = (a // DILATION[0] * WINDOW[1] + b // DILATION[1]) * WINDOW[2] + c // DILATION[2]
            has = exists & (a % DILATION[0] == 0) & (b % DILATION[1] == 0) & (c % DILATION[2] == 0)
            has &= (a // DILATION[0] < WINDOW[0]) & (b // DILATION[1] < WINDOW[1]) & (c // DILATION[2] < WINDOW[2])
            has &= (first >= 0) & (second >= 0) & (third >= 0) & (first < between[0]) & (second < between[1])
            has &= third < between[2]
            _, at = largest_of(x_ptr, batch, channel, first, second, third, has, channels, size, WINDOW,
                               WINDOW_STRIDE, WINDOW_PADDING, DILATION, CHANNELS_LAST)
            has &= at == tap
            if filter_ptr is None:
                grad = load_at(grad_ptr, batch, channel, first, second, third, has, channels, out, CHANNELS_LAST, 0.0)
            else:
                grad = grad_between(grad_ptr, filter_ptr, batch, channel, first, second, third, has, channels, out,
                                    KERNEL, STRIDE, PADDING, OWNERS, CHANNELS_LAST)
            result += tl.where(has, grad, 0.0)
    else:
        result = grad_between(grad_ptr, filter_ptr, batch, channel, i, j, k, exists, channels, out, KERNEL, STRIDE,
                              PADDING, OWNERS, CHANNELS_LAST)
    tl.store(grad_x_ptr + n, to_nearest(result, grad_x_ptr.dtype.element_ty), mask=exists)


IN_INTERPRETER = {"BLOCK": 2048}  # large: fewer calls
CONFIG = {"BLOCK": 256, "maxnreg": 255}


def solid(sizes, neutral):
    """Of three dimensions: a plane has rows and columns, and one between them."""
    first, *middle, last = sizes or (neutral, neutral)
    return first, *(middle or [neutral]), last


def constants(has_filter, window, window_padding, dilation, kernel, stride, padding):
    """What the kernels are compiled for."""
    given = {"WINDOW": solid(window, 1), "WINDOW_PADDING": solid(window_padding, 0), "DILATION": solid(dilation, 1),
             "WINDOW_STRIDE": (1, 1, 1) if has_filter else solid(stride, 1), "KERNEL": solid(kernel, 1),
             "STRIDE": solid(stride, 1), "PADDING": solid(padding, 0), "HAS_WINDOW": bool(window)}
    reach = [d * (w - 1) + 1 for w, d in zip(given["WINDOW"], given["DILATION"])]
    given["WINDOW_OWNERS"] = tuple(triton.cdiv(r, s) for r, s in zip(reach, given["WINDOW_STRIDE"]))
    given["OWNERS"] = tuple(triton.cdiv(k, s) for k, s in zip(given["KERNEL"], given["STRIDE"]))
    return given


def _launch(kernel, x, y, result, others, filter, geometry, ceil_mode):
    """result: whose elements the lanes are; others: the tensors that are read."""
    if max(x.numel(), y.numel()) >= 1 << 31:
        raise ValueError(f"window_pool: x must have less than 2^31 elements, got {tuple(x.shape)}")
    window, window_padding, dilation, *_ = geometry
    between = list(x.shape[2:])
    if window:
        last = ([], [1] * len(between), []) if filter is not None else ([], geometry[4], [])
        between = out_size(between, window, window_padding, dilation, *last, ceil_mode and filter is None)
    c = constants(filter is not None, *geometry)
    if kernel is window_pool_kernel:
        del c["WINDOW_OWNERS"], c["OWNERS"]
    c |= IN_INTERPRETER if TRITON_INTERPRET else CONFIG
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(result.numel(), c["BLOCK"]),)](
            *others, result, filter, result.numel(), x.shape[1], solid(x.shape[2:], 1), solid(between, 1),
            solid(y.shape[2:], 1), CHANNELS_LAST=is_channels_last(x), **c)
    return result


def window_pool(x, filter, *geometry):
    *sizes, ceil_mode = geometry
    y = like(x.new_empty([*x.shape[:2], *out_size(x.shape[2:], *geometry)]), x)
    return _launch(window_pool_kernel, x, y, y, (x,), filter, sizes, ceil_mode) if y.numel() else y


def window_pool_bwd(grad, x, filter, *geometry):
    *sizes, ceil_mode = geometry
    grad_x = torch.empty_like(x)
    if not grad_x.numel():
        return grad_x
    return _launch(window_pool_bwd_kernel, x, grad, grad_x, (like(grad, x), x), filter, sizes, ceil_mode)


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    largest, blur = ((2, 2), (0, 0), (1, 1)), ((5, 5), (2, 2), (2, 2))
    kinds = [(True, *largest, *blur), (True, (), (), (), *blur), (False, *largest, (), (2, 2), ())]
    for dtype, sizes, channels_last in itertools.product(DTYPES, kinds, (False, True)):
        types = {**dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*" + dtype), "total": "i32:16",
                 "channels": "i32", **dict.fromkeys(("size", "between", "out"), ("i32", "i32", "i32"))}
        c = {**constants(*sizes), "CHANNELS_LAST": channels_last, **CONFIG}
        types |= {"filter_ptr": computed_type(dtype)} if sizes[0] else {}
        c |= {} if sizes[0] else {"filter_ptr": None}
        for kernel in (window_pool_kernel, window_pool_bwd_kernel):
            yield kernel, types, c
