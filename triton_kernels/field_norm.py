"""field_norm and its statistics in Triton: tiles [pixels, channels].

Statistics read x once, forward and backward read and write each of their tensors once. Sums over pixels take two
stages: each program makes those of its own pixels, and of the programs that share some channels the last to arrive
adds them up, in order and in float64, so that the result does not depend on which it is. Variances are merged from
those of parts (Welford, Chan), which does not cancel where the mean is large. The last program of all makes what
belongs to the parts of fields: running statistics, factors, gradients of parameters (field_parts.py).

Channels that stay in their basis are treated in blocks. Where any field has a change of basis, programs take single
fields, and multiply by its matrices on tensor cores.
"""
import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import compute_dtype, empty_fields
from ..reference.field_batch_norm import FUNCTIONS, NUMBERS, STATISTICS
from ..reference.field_norm import FIELD
from .field_parts import BLOCKS, FEW, finish_gradients, finish_statistics, parameter_arguments, statistics_kernel
from .field_tensor import (
    DTYPES,
    LAYOUT_TYPES,
    blocks_of_program,
    compute_type,
    computed_type,
    layout_of,
    place,
    splits_of,
)
from .functions import slope_of, value_of
from .numbers import dot_precision, to_nearest

WIDTH = tl.constexpr(len(FIELD))
CHANNEL, SIZE, BASIS = (tl.constexpr(FIELD.index(name)) for name in FIELD)


# ---- sums over the pixels of several programs ----

@triton.jit
def welford(x, exists, count, mean, squares, n):
    """Adds x [pixels, channels] to the statistics of each place of the tile; n: how many it then has at most."""
    apart = tl.where(exists, x - mean, 0.0)
    mean += apart * (1 / n)
    return count + exists.to(count.dtype), mean, squares + apart * (x - mean)


@triton.jit
def merge(count, mean, squares):
    """The statistics of all along axis 0, in float64."""
    count, mean = count.to(tl.float64), mean.to(tl.float64)
    total = tl.sum(count, 0)
    average = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    apart = tl.where(count > 0, mean - average[None, :], 0.0)
    return total, average, tl.sum(squares.to(tl.float64) + count * apart * apart, 0)


@triton.jit
def is_last(arrivals_ptr, programs):
    """Whether all the other programs have arrived before; then what they have stored can be loaded.

    The last one leaves zero, for the next launch.
    """
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(arrivals_ptr, 1) == programs - 1
    tl.store(arrivals_ptr, 0, mask=last)
    return last


@triton.jit
def load_partial(partial_ptr, split, splits, which, channel, exists, channels):
    """Past the first-level cache, which does not see what other multiprocessors store."""
    at = (split * 3 + which) * channels + channel
    return tl.load(partial_ptr + at, mask=(split < splits) & exists, other=0.0, cache_modifier=".cg")


@triton.jit
def store_partial(partial_ptr, split, which, channel, exists, channels, values):
    tl.store(partial_ptr + (split * 3 + which) * channels + channel, values, mask=exists)


@triton.jit
def finish_moments(partial_ptr, mean_ptr, var_ptr, channel, exists, channels, splits, BLOCK_SPLITS: tl.constexpr):
    total = tl.zeros(channel.shape, tl.float64)
    mean, squares = total, total
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        count, average, more = merge(
            load_partial(partial_ptr, split, splits, 0, channel[None, :], exists[None, :], channels),
            load_partial(partial_ptr, split, splits, 1, channel[None, :], exists[None, :], channels),
            load_partial(partial_ptr, split, splits, 2, channel[None, :], exists[None, :], channels))
        both = tl.maximum(total + count, 1.0)
        apart = average - mean
        mean += apart * count / both
        squares += more + apart * apart * total * count / both
        total += count
    none = float("nan")
    tl.store(mean_ptr + channel, tl.where(total > 0, mean, none).to(mean_ptr.dtype.element_ty), mask=exists)
    tl.store(var_ptr + channel, tl.where(total > 0, squares / tl.maximum(total, 1.0), none).to(
        var_ptr.dtype.element_ty), mask=exists)


@triton.jit
def finish_sums(partial_ptr, first_ptr, second_ptr, channel, exists, channels, splits, BLOCK_SPLITS: tl.constexpr):
    one, two = tl.zeros(channel.shape, tl.float64), tl.zeros(channel.shape, tl.float64)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        one += tl.sum(load_partial(partial_ptr, split, splits, 0, channel[None, :], exists[None, :], channels), 0)
        two += tl.sum(load_partial(partial_ptr, split, splits, 1, channel[None, :], exists[None, :], channels), 0)
    tl.store(first_ptr + channel, one.to(first_ptr.dtype.element_ty), mask=exists)
    tl.store(second_ptr + channel, two.to(second_ptr.dtype.element_ty), mask=exists)


# ---- channels in their own basis ----

@triton.jit
def load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST: tl.constexpr):
    at = place(channel[None, :], pixel[:, None], channels, pixels, CHANNELS_LAST)
    return tl.load(x_ptr + at, mask=exists, other=0.0).to(compute_type(x_ptr))


@triton.jit
def store_tile(y_ptr, y, channel, pixel, exists, channels, pixels, CHANNELS_LAST: tl.constexpr):
    at = place(channel[None, :], pixel[:, None], channels, pixels, CHANNELS_LAST)
    tl.store(y_ptr + at, to_nearest(y, y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def moments_kernel(x_ptr, mean_ptr, var_ptr, partial_ptr, arrivals_ptr, numbers_ptr, parts_ptr, matrices_ptr,
                   addresses_ptr, weight_ptr, bias_ptr, running_ptr, counter_ptr, num_parts, lists, counters, channels,
                   total, pixels, splits, EPS: tl.constexpr, MOMENTUM: tl.constexpr, BY: tl.constexpr,
                   CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
                   BLOCK_SPLITS: tl.constexpr, BLOCK_PARTS: tl.constexpr, PART_SIZE: tl.constexpr):
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    split, has = tl.program_id(0) // blocks, channel < channels
    count = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), compute_type(x_ptr))
    mean, squares, n = count, count, tl.full((), 0.0, compute_type(x_ptr))
    for _ in range(split * BLOCK_PIXELS, total, splits * BLOCK_PIXELS):
        exists = (pixel < total)[:, None] & has[None, :]
        x = load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        n += 1
        count, mean, squares = welford(x, exists, count, mean, squares, n)
        pixel += splits * BLOCK_PIXELS
    of_all, average, deviations = merge(count, mean, squares)
    store_partial(partial_ptr, split, 0, channel, has, channels, of_all)
    store_partial(partial_ptr, split, 1, channel, has, channels, average)
    store_partial(partial_ptr, split, 2, channel, has, channels, deviations)
    if is_last(arrivals_ptr + tl.program_id(0) % blocks, splits):
        finish_moments(partial_ptr, mean_ptr, var_ptr, channel, has, channels, splits, BLOCK_SPLITS)
        if parts_ptr is not None:
            if is_last(arrivals_ptr + blocks, blocks):
                finish_statistics(mean_ptr, var_ptr, numbers_ptr, parts_ptr, matrices_ptr, addresses_ptr, weight_ptr,
                                  bias_ptr, running_ptr, counter_ptr, num_parts, channels, lists, counters,
                                  total.to(tl.float64), EPS, MOMENTUM, True, BY, BLOCK_PARTS, PART_SIZE)


@triton.jit
def affine_kernel(x_ptr, y_ptr, scale_ptr, shift_ptr, channels, total, pixels, FUNCTION: tl.constexpr,
                  CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    has = channel < channels
    exists = (pixel < total)[:, None] & has[None, :]
    x = load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
    scale = tl.load(scale_ptr + channel, mask=has, other=0.0)[None, :]
    shift = tl.load(shift_ptr + channel, mask=has, other=0.0)[None, :]
    y = x * scale + shift
    if FUNCTION != "identity":
        y = value_of(y, FUNCTION)
    store_tile(y_ptr, y, channel, pixel, exists, channels, pixels, CHANNELS_LAST)


@triton.jit
def affine_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, scale_ptr, shift_ptr, mean_ptr, grad_scale_ptr, grad_shift_ptr,
                      partial_ptr, arrivals_ptr, numbers_ptr, through_ptr, parts_ptr, matrices_ptr, grad_weights_ptr,
                      grad_biases_ptr, num_parts, channels, total, pixels, splits, FUNCTION: tl.constexpr,
                      CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
                      BLOCK_SPLITS: tl.constexpr, BLOCK_PARTS: tl.constexpr, PART_SIZE: tl.constexpr):
    """The sums of g * (x - mean) and of g for each channel, and grad_x = scale * g, where g is the gradient of what the
    function was applied to. mean_ptr None: zero; grad_x_ptr None: another kernel makes it."""
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    split, has = tl.program_id(0) // blocks, channel < channels
    products = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), compute_type(x_ptr))
    sums = products
    scale = tl.load(scale_ptr + channel, mask=has, other=0.0)[None, :]
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channel, mask=has, other=0.0)[None, :]
    if FUNCTION != "identity":
        shift = tl.load(shift_ptr + channel, mask=has, other=0.0)[None, :]
    for _ in range(split * BLOCK_PIXELS, total, splits * BLOCK_PIXELS):
        exists = (pixel < total)[:, None] & has[None, :]
        x = load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        grad = load_tile(grad_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        if FUNCTION != "identity":
            grad *= slope_of(x * scale + shift, FUNCTION)
        sums += grad
        if mean_ptr is None:
            products += grad * x
        else:
            products += grad * (x - mean)
        if grad_x_ptr is not None:
            store_tile(grad_x_ptr, grad * scale, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        pixel += splits * BLOCK_PIXELS
    store_partial(partial_ptr, split, 0, channel, has, channels, tl.sum(products.to(tl.float64), 0))
    store_partial(partial_ptr, split, 1, channel, has, channels, tl.sum(sums.to(tl.float64), 0))
    if is_last(arrivals_ptr + tl.program_id(0) % blocks, splits):
        finish_sums(partial_ptr, grad_scale_ptr, grad_shift_ptr, channel, has, channels, splits, BLOCK_SPLITS)
        if parts_ptr is not None:
            if is_last(arrivals_ptr + blocks, blocks):
                finish_gradients(grad_scale_ptr, grad_shift_ptr, numbers_ptr, through_ptr, parts_ptr, matrices_ptr,
                                 grad_weights_ptr, grad_biases_ptr, num_parts, channels, total.to(tl.float64),
                                 BLOCK_PARTS, PART_SIZE)


@triton.jit
def through_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, scale_ptr, shift_ptr, mean_ptr, through_ptr, channels, total,
                       pixels, FUNCTION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
                       BLOCK_CHANNELS: tl.constexpr):
    """grad_x = scale * g + slope * (x - mean) + offset, with slope and offset [2, channels] of finish_gradients."""
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    has = channel < channels
    exists = (pixel < total)[:, None] & has[None, :]
    x = load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
    grad = load_tile(grad_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
    scale = tl.load(scale_ptr + channel, mask=has, other=0.0)[None, :]
    mean = tl.load(mean_ptr + channel, mask=has, other=0.0)[None, :]
    slope = tl.load(through_ptr + channel, mask=has, other=0.0)[None, :]
    offset = tl.load(through_ptr + channels + channel, mask=has, other=0.0)[None, :]
    if FUNCTION != "identity":
        shift = tl.load(shift_ptr + channel, mask=has, other=0.0)[None, :]
        grad *= slope_of(x * scale + shift, FUNCTION)
    grad_x = grad * scale + ((x - mean) * slope + offset)
    store_tile(grad_x_ptr, grad_x, channel, pixel, exists, channels, pixels, CHANNELS_LAST)


# ---- fields with a change of basis ----

@triton.jit
def load_matrix(bases_ptr, start, row, column, size):
    """[rows, columns] of a matrix; zeros outside."""
    return tl.load(bases_ptr + start + row * size + column, mask=(row < size) & (column < size), other=0.0)


@triton.jit
def field_of_program(fields_ptr, num_fields):
    """(first channel, size, where Q begins or -1, place among the programs of this field)"""
    row = fields_ptr + tl.program_id(0) % num_fields * WIDTH
    size = tl.load(row + SIZE).to(tl.int32)
    return tl.load(row + CHANNEL), size, tl.load(row + BASIS), tl.program_id(0) // num_fields


@triton.jit
def change_basis(x_ptr, bases_ptr, basis, to_irreps: tl.constexpr, channel, size, first, pixel, total, channels, pixels,
                 PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Components [first, first + BLOCK_SIZE) of Q^-1 x if to_irreps, else of Q^T x."""
    i = first + tl.arange(0, BLOCK_SIZE)
    has = (pixel < total)[:, None]
    if basis < 0:
        z = load_tile(x_ptr, channel + i, pixel, has & (i < size)[None, :], channels, pixels, CHANNELS_LAST)
    else:
        z = tl.zeros((pixel.shape[0], BLOCK_SIZE), compute_type(x_ptr))
        for at in range(0, size, BLOCK_SIZE):
            j = at + tl.arange(0, BLOCK_SIZE)
            x = load_tile(x_ptr, channel + j, pixel, has & (j < size)[None, :], channels, pixels, CHANNELS_LAST)
            if to_irreps:
                matrix = load_matrix(bases_ptr, basis + size * size, i[None, :], j[:, None], size)
            else:
                matrix = load_matrix(bases_ptr, basis, j[:, None], i[None, :], size)
            z = tl.dot(x, matrix, z, input_precision=PRECISION, out_dtype=z.dtype)
    return z


@triton.jit
def scaled(x_ptr, scale_ptr, bases_ptr, basis, transposed: tl.constexpr, channel, size, first, pixel, total, channels,
           pixels, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Channels [first, first + BLOCK_SIZE) of M x, or of M^T x, with M = Q diag(scale) Q^-1, made tile by tile."""
    k = first + tl.arange(0, BLOCK_SIZE)
    has = (pixel < total)[:, None]
    if basis < 0:
        x = load_tile(x_ptr, channel + k, pixel, has & (k < size)[None, :], channels, pixels, CHANNELS_LAST)
        y = x * tl.load(scale_ptr + channel + k, mask=k < size, other=0.0)[None, :]
    else:
        y = tl.zeros((pixel.shape[0], BLOCK_SIZE), compute_type(x_ptr))
        for at in range(0, size, BLOCK_SIZE):
            j = at + tl.arange(0, BLOCK_SIZE)
            matrix = tl.zeros((BLOCK_SIZE, BLOCK_SIZE), y.dtype)  # [j, k]
            for of in range(0, size, BLOCK_SIZE):
                i = of + tl.arange(0, BLOCK_SIZE)
                scale = tl.load(scale_ptr + channel + i, mask=i < size, other=0.0)[None, :]
                if transposed:
                    left = load_matrix(bases_ptr, basis, j[:, None], i[None, :], size)
                    right = load_matrix(bases_ptr, basis + size * size, i[:, None], k[None, :], size)
                else:
                    left = load_matrix(bases_ptr, basis + size * size, i[None, :], j[:, None], size)
                    right = load_matrix(bases_ptr, basis, k[None, :], i[:, None], size)
                matrix = tl.dot(left * scale, right, matrix, input_precision=PRECISION, out_dtype=y.dtype)
            x = load_tile(x_ptr, channel + j, pixel, has & (j < size)[None, :], channels, pixels, CHANNELS_LAST)
            y = tl.dot(x, matrix, y, input_precision=PRECISION, out_dtype=y.dtype)
    return y


@triton.jit
def field_moments_kernel(x_ptr, mean_ptr, var_ptr, fields_ptr, bases_ptr, partial_ptr, arrivals_ptr, numbers_ptr,
                         parts_ptr, matrices_ptr, addresses_ptr, weight_ptr, bias_ptr, running_ptr, counter_ptr,
                         num_parts, lists, counters, num_fields, channels, total, pixels, splits, EPS: tl.constexpr,
                         MOMENTUM: tl.constexpr, BY: tl.constexpr, PRECISION: tl.constexpr,
                         CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                         BLOCK_SPLITS: tl.constexpr, BLOCK_PARTS: tl.constexpr, PART_SIZE: tl.constexpr):
    channel, size, basis, split = field_of_program(fields_ptr, num_fields)
    for first in range(0, size, BLOCK_SIZE):
        i = first + tl.arange(0, BLOCK_SIZE)
        count = tl.zeros((BLOCK_PIXELS, BLOCK_SIZE), compute_type(x_ptr))
        mean, squares, n = count, count, tl.full((), 0.0, compute_type(x_ptr))
        for start in range(split * BLOCK_PIXELS, total, splits * BLOCK_PIXELS):
            pixel = start + tl.arange(0, BLOCK_PIXELS)
            z = change_basis(x_ptr, bases_ptr, basis, True, channel, size, first, pixel, total, channels, pixels,
                             PRECISION, CHANNELS_LAST, BLOCK_SIZE)
            n += 1
            count, mean, squares = welford(z, (pixel < total)[:, None] & (i < size)[None, :], count, mean, squares, n)
        of_all, average, deviations = merge(count, mean, squares)
        store_partial(partial_ptr, split, 0, channel + i, i < size, channels, of_all)
        store_partial(partial_ptr, split, 1, channel + i, i < size, channels, average)
        store_partial(partial_ptr, split, 2, channel + i, i < size, channels, deviations)
    if is_last(arrivals_ptr + tl.program_id(0) % num_fields, splits):
        for first in range(0, size, BLOCK_SIZE):
            i = first + tl.arange(0, BLOCK_SIZE)
            finish_moments(partial_ptr, mean_ptr, var_ptr, channel + i, i < size, channels, splits, BLOCK_SPLITS)
        if parts_ptr is not None:
            if is_last(arrivals_ptr + num_fields, num_fields):
                finish_statistics(mean_ptr, var_ptr, numbers_ptr, parts_ptr, matrices_ptr, addresses_ptr, weight_ptr,
                                  bias_ptr, running_ptr, counter_ptr, num_parts, channels, lists, counters,
                                  total.to(tl.float64), EPS, MOMENTUM, True, BY, BLOCK_PARTS, PART_SIZE)


@triton.jit
def field_norm_kernel(x_ptr, y_ptr, scale_ptr, shift_ptr, fields_ptr, bases_ptr, num_fields, channels, total, pixels,
                      PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
                      BLOCK_SIZE: tl.constexpr):
    channel, size, basis, block = field_of_program(fields_ptr, num_fields)
    pixel = block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    for first in range(0, size, BLOCK_SIZE):
        k = first + tl.arange(0, BLOCK_SIZE)
        if basis < 0:
            shift = tl.load(shift_ptr + channel + k, mask=k < size, other=0.0)
        else:
            shift = tl.zeros((BLOCK_SIZE,), compute_type(x_ptr))
            for at in range(0, size, BLOCK_SIZE):
                i = at + tl.arange(0, BLOCK_SIZE)
                of_irreps = tl.load(shift_ptr + channel + i, mask=i < size, other=0.0)[:, None]
                shift += tl.sum(load_matrix(bases_ptr, basis, k[None, :], i[:, None], size) * of_irreps, 0)
        y = scaled(x_ptr, scale_ptr, bases_ptr, basis, False, channel, size, first, pixel, total, channels, pixels,
                   PRECISION, CHANNELS_LAST, BLOCK_SIZE) + shift[None, :]
        exists = (pixel < total)[:, None] & (k < size)[None, :]
        store_tile(y_ptr, y, channel + k, pixel, exists, channels, pixels, CHANNELS_LAST)


@triton.jit
def field_norm_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, scale_ptr, mean_ptr, grad_scale_ptr, grad_shift_ptr, fields_ptr,
                          bases_ptr, partial_ptr, arrivals_ptr, numbers_ptr, parts_ptr, matrices_ptr, grad_weights_ptr,
                          grad_biases_ptr, num_parts, num_fields, channels, total, pixels, splits,
                          PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
                          BLOCK_SIZE: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
                          PART_SIZE: tl.constexpr):
    channel, size, basis, split = field_of_program(fields_ptr, num_fields)
    for first in range(0, size, BLOCK_SIZE):
        i = first + tl.arange(0, BLOCK_SIZE)
        products = tl.zeros((BLOCK_PIXELS, BLOCK_SIZE), compute_type(x_ptr))
        sums = products
        for start in range(split * BLOCK_PIXELS, total, splits * BLOCK_PIXELS):
            pixel = start + tl.arange(0, BLOCK_PIXELS)
            z = change_basis(x_ptr, bases_ptr, basis, True, channel, size, first, pixel, total, channels, pixels,
                             PRECISION, CHANNELS_LAST, BLOCK_SIZE)
            u = change_basis(grad_ptr, bases_ptr, basis, False, channel, size, first, pixel, total, channels, pixels,
                             PRECISION, CHANNELS_LAST, BLOCK_SIZE)
            if mean_ptr is not None:
                z -= tl.load(mean_ptr + channel + i, mask=i < size, other=0.0)[None, :]
            products += u * z
            sums += u
            grad_x = scaled(grad_ptr, scale_ptr, bases_ptr, basis, True, channel, size, first, pixel, total, channels,
                            pixels, PRECISION, CHANNELS_LAST, BLOCK_SIZE)
            exists = (pixel < total)[:, None] & (i < size)[None, :]
            store_tile(grad_x_ptr, grad_x, channel + i, pixel, exists, channels, pixels, CHANNELS_LAST)
        store_partial(partial_ptr, split, 0, channel + i, i < size, channels, tl.sum(products.to(tl.float64), 0))
        store_partial(partial_ptr, split, 1, channel + i, i < size, channels, tl.sum(sums.to(tl.float64), 0))
    if is_last(arrivals_ptr + tl.program_id(0) % num_fields, splits):
        for first in range(0, size, BLOCK_SIZE):
            i = first + tl.arange(0, BLOCK_SIZE)
            finish_sums(partial_ptr, grad_scale_ptr, grad_shift_ptr, channel + i, i < size, channels, splits,
                        BLOCK_SPLITS)
        if parts_ptr is not None:
            if is_last(arrivals_ptr + num_fields, num_fields):
                finish_gradients(grad_scale_ptr, grad_shift_ptr, numbers_ptr, None, parts_ptr, matrices_ptr,
                                 grad_weights_ptr, grad_biases_ptr, num_parts, channels, total.to(tl.float64),
                                 BLOCK_PARTS, PART_SIZE)


# ---- launchers ----

SPLITS = {"BLOCK_SPLITS": 16}
IN_INTERPRETER = {"BLOCK_PIXELS": 512, "BLOCK_CHANNELS": 64}  # large: fewer calls
SIZES = (16, 32)  # of fields with a change of basis, or of parts of them, which are filled up with zeros


def channel_config(channels, channels_last, dtype):
    """The neighbours in memory, 128 bytes of them or more, are in one tile; of float64, half as many numbers."""
    if TRITON_INTERPRET:
        return IN_INTERPRETER
    block, numbers = (64 if channels > 16 else 16) if channels_last else 4, 1024 if dtype == torch.float64 else 2048
    return {"BLOCK_PIXELS": numbers // block, "BLOCK_CHANNELS": block, "maxnreg": 255}


def field_config(bases, backward):
    """bases: how many numbers are in the matrices; the largest field has no more channels than if they were one's."""
    size = next((s for s in SIZES if 2 * s * s >= bases), SIZES[-1])
    if TRITON_INTERPRET:
        return {"BLOCK_PIXELS": IN_INTERPRETER["BLOCK_PIXELS"], "BLOCK_SIZE": size}
    pixels = 16 if backward and size == SIZES[-1] else 64  # or it spills
    return {"BLOCK_PIXELS": pixels, "BLOCK_SIZE": size, "num_warps": 4 if size == SIZES[0] else 8, "num_stages": 1,
            "maxnreg": 255}


class Call:
    """What a launch needs: the division of the work, and scratch for sums."""

    def __init__(self, op, x, *others, bases=None, fields=None):
        self.x, self.layout, self.channels = x, layout_of(op, x, *others), x.shape[1]
        self.dtype = compute_dtype(x.dtype)
        if bases is None or not bases.numel():
            self.config = channel_config(self.channels, self.layout.channels_last, x.dtype)
            self.rows = triton.cdiv(self.channels, self.config["BLOCK_CHANNELS"])
            self.tables = {}
        else:
            self.config = {**field_config(bases.numel(), op.endswith("_bwd")), "PRECISION": dot_precision(x.dtype)}
            self.rows = len(fields)
            self.tables = dict(fields_ptr=fields.contiguous(), bases_ptr=bases.contiguous(), num_fields=len(fields))
        self.has_bases = bool(self.tables)
        self.blocks = triton.cdiv(self.layout.total, self.config["BLOCK_PIXELS"])
        self.splits = splits_of(self.layout, self.rows, self.config["BLOCK_PIXELS"])

    def run(self, kernel, *arguments, programs=None, **options):
        with torch.cuda.device_of(self.x):
            kernel[(self.rows * (self.splits if programs is None else programs),)](
                *arguments, channels=self.channels, **self.layout.arguments(), **self.tables, **self.config, **options)

    def sums(self):
        """Arguments of the kernels that sum over pixels."""
        partial = self.x.new_empty(self.splits, 3, self.channels, dtype=torch.float64)
        return dict(partial_ptr=partial, arrivals_ptr=arrivals(self.rows + 1, self.x.device), splits=self.splits,
                    **SPLITS, **BLOCKS)

    def per_channel(self, *rows):
        return self.x.new_empty(*rows, self.channels, dtype=self.dtype)


_arrivals = {}  # of each device and stream


def arrivals(count, device):
    """Zeros, of which a kernel leaves zeros: those of the last call on this stream, which is over by then."""
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():  # a graph has its own
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_gpu else None)
    if key not in _arrivals or len(_arrivals[key]) < count:
        _arrivals[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return _arrivals[key]


def field_norm(x, scale, shift, fields, bases, function="identity"):
    y = empty_fields(x, x.shape[1])
    call = Call("field_norm", x, y, bases=bases, fields=fields)
    if y.numel() and call.has_bases:
        call.run(field_norm_kernel, x, y, scale, shift, programs=call.blocks)
    elif y.numel():
        call.run(affine_kernel, x, y, scale, shift, programs=call.blocks, FUNCTION=function)
    return y


def field_norm_bwd(grad, x, scale, fields, bases):
    grad_x, grad_scale, grad_shift = empty_fields(x, x.shape[1]), torch.empty_like(scale), torch.empty_like(scale)
    call = Call("field_norm_bwd", x, grad, bases=bases, fields=fields)
    if call.has_bases:
        call.run(field_norm_bwd_kernel, grad, x, grad_x, scale, None, grad_scale, grad_shift, **call.sums(),
                 **NO_GRADIENTS)
    elif call.channels:
        call.run(affine_bwd_kernel, grad, x, grad_x, scale, None, None, grad_scale, grad_shift, FUNCTION="identity",
                 through_ptr=None, **call.sums(), **NO_GRADIENTS)
    return grad_x, grad_scale, grad_shift


def field_norm_moments(x, fields, bases):
    call = Call("field_norm_moments", x, bases=bases, fields=fields)
    mean, var = call.per_channel(), call.per_channel()
    if call.channels:
        call.run(field_moments_kernel if call.has_bases else moments_kernel, x, mean, var, **call.sums(),
                 **NO_STATISTICS)
    return mean, var


def field_norm_statistics(x, moments, fields, bases, parts, matrices, weights, biases, running_means, running_vars,
                          counters, eps, momentum, batch, statistics):
    call = Call("field_norm_statistics", x, bases=bases, fields=fields)
    numbers = call.per_channel(len(NUMBERS))
    lists = (weights, biases, running_means, running_vars, counters)
    arguments = dict(numbers_ptr=numbers, EPS=eps, MOMENTUM=momentum, BY=STATISTICS[statistics],
                     **parameter_arguments(parts, matrices, lists, x.device))
    if batch and moments is None and call.channels:
        mean, var = call.per_channel(), call.per_channel()
        call.run(field_moments_kernel if call.has_bases else moments_kernel, x, mean, var, **call.sums(), **arguments)
    elif call.channels:
        mean, var, count = moments.split([call.channels, call.channels, 1]) if batch else (None, None, None)
        with torch.cuda.device_of(x):
            statistics_kernel[(1,)](mean, var, count, channels=call.channels, BATCH=batch, **FEW, **arguments)
    return numbers


def field_batch_norm(x, numbers, fields, bases, parts, matrices, weights, biases, eps, through, function):
    return field_norm(x, numbers[0], numbers[1], fields, bases, _function(bases, through, function))


def field_batch_norm_bwd(grad, x, numbers, fields, bases, parts, matrices, weights, biases, eps, through, function):
    grad_x, what = empty_fields(x, x.shape[1]), dict(FUNCTION=_function(bases, through, function))
    call = Call("field_batch_norm_bwd", x, grad, bases=bases, fields=fields)
    scale, shift, mean, _ = numbers
    products, sums = call.per_channel(2)
    grad_weights, grad_biases = (numbers.new_empty(sum(t.numel() for t in of)) for of in (weights, biases))
    arguments = dict(numbers_ptr=numbers, parts_ptr=parts.contiguous(), matrices_ptr=matrices.contiguous(),
                     num_parts=len(parts), grad_weights_ptr=grad_weights if weights else None,
                     grad_biases_ptr=grad_biases if biases else None)
    if call.has_bases:
        call.run(field_norm_bwd_kernel, grad, x, grad_x, scale, mean, products, sums, **call.sums(), **arguments)
    elif call.channels:
        slopes = call.per_channel(2) if through else None
        call.run(affine_bwd_kernel, grad, x, None if through else grad_x, scale, shift, mean, products, sums,
                 through_ptr=slopes, **what, **call.sums(), **arguments)
        if through and x.numel():
            call.run(through_bwd_kernel, grad, x, grad_x, scale, shift, mean, slopes, programs=call.blocks, **what)
    return grad_x, grad_weights, grad_biases


def _function(bases, through, function):
    """Its name. Raises ValueError where the kernels have none."""
    if through and bases.numel():
        raise ValueError("field_batch_norm: statistics through which gradients flow are of fields without a change of "
                         "basis")
    if function and not through:
        raise ValueError("field_batch_norm: a function needs statistics through which gradients flow")
    return NAMES[function]


NAMES = tuple(FUNCTIONS)  # of the function, by its number
PARTS_TABLES = ("numbers_ptr", "parts_ptr", "matrices_ptr")
NO_STATISTICS = dict.fromkeys((*PARTS_TABLES, "addresses_ptr", "weight_ptr", "bias_ptr", "running_ptr", "counter_ptr",
                               "MOMENTUM")) | dict(num_parts=0, lists=0, counters=0, EPS=0.0, BY="values")
NO_GRADIENTS = dict.fromkeys((*PARTS_TABLES, "grad_weights_ptr", "grad_biases_ptr")) | dict(num_parts=0)


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    integers = {**dict.fromkeys(("num_fields", "channels", "splits", "num_parts", "lists", "counters"), "i32"),
                **LAYOUT_TYPES}
    numbers = ("scale_ptr", "shift_ptr", "grad_scale_ptr", "grad_shift_ptr", "bases_ptr", "mean_ptr", "var_ptr",
               "numbers_ptr", "matrices_ptr", "through_ptr", "grad_weights_ptr", "grad_biases_ptr")
    for name, dtype in DTYPES.items():
        tensors = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*" + name)
        types = {**tensors, **dict.fromkeys(numbers, computed_type(name)), **integers, "partial_ptr": "*fp64",
                 "count_ptr": "*fp64", "arrivals_ptr": "*i32", "fields_ptr": "*i64", "parts_ptr": "*i64",
                 "addresses_ptr": "*i64", "counter_ptr": "*i64",
                 **dict.fromkeys(("weight_ptr", "bias_ptr", "running_ptr"), "*" + name)}
        known = {**types, "mean_ptr": "*fp64", "var_ptr": "*fp64"}
        for by in STATISTICS:
            rest = {**FEW, "EPS": 1e-5, "MOMENTUM": 0.1, "BY": by}
            yield statistics_kernel, known, {**rest, "BATCH": True}
        yield statistics_kernel, types, {**rest, "BATCH": False, "MOMENTUM": None, "mean_ptr": None, "var_ptr": None,
                                         "count_ptr": None}
        for channels_last in (False, True):
            c = {**channel_config(64, channels_last, dtype), "CHANNELS_LAST": channels_last}
            yield from _summing(moments_kernel, types, {**c, **SPLITS, **BLOCKS})
            for function in NAMES:
                yield affine_kernel, types, {**c, "FUNCTION": function}
                yield through_bwd_kernel, types, {**c, "FUNCTION": function}
                yield affine_bwd_kernel, _without(types, "grad_x_ptr"), {
                    **c, **SPLITS, **BLOCKS, "FUNCTION": function, "grad_x_ptr": None}
            c = {**c, **SPLITS, **BLOCKS, "FUNCTION": "identity", "through_ptr": None}
            yield affine_bwd_kernel, _without(types, "through_ptr"), c
            yield affine_bwd_kernel, _without(types, "through_ptr", "shift_ptr", "mean_ptr", *NO_GRADIENTS), {
                **c, "shift_ptr": None, "mean_ptr": None, **NO_GRADIENTS}
            for size in SIZES:
                c = {"CHANNELS_LAST": channels_last, "PRECISION": dot_precision(dtype)}
                forward, backward = ({**field_config(2 * size * size, b), **c} for b in (False, True))
                yield field_norm_kernel, types, forward
                yield from _summing(field_moments_kernel, types, {**forward, **SPLITS, **BLOCKS})
                c = {**backward, **SPLITS, **BLOCKS}
                yield field_norm_bwd_kernel, types, c
                yield field_norm_bwd_kernel, _without(types, "mean_ptr", *NO_GRADIENTS), {
                    **c, "mean_ptr": None, **NO_GRADIENTS}


def _summing(kernel, types, config):
    """A kernel of moments, alone and with statistics of each kind."""
    yield kernel, _without(types, *NO_STATISTICS), {**config, **NO_STATISTICS}
    for by in STATISTICS:
        yield kernel, types, {**config, "EPS": 1e-5, "MOMENTUM": 0.1, "BY": by}


def _without(types, *names):
    return {name: t for name, t in types.items() if name not in names}
