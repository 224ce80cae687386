"""field_norm and its statistics in Triton: tiles [pixels, channels].

Statistics read x once, forward and backward read and write each of their tensors once. Sums over pixels take two
stages: each program makes those of its own pixels, and of the programs that share some channels the last to arrive
adds them up, in order and in float64, so that the result does not depend on which it is. Variances are merged from
those of parts (Welford, Chan), which does not cancel where the mean is large.

Channels that stay in their basis are treated in blocks. Where any field has a change of basis, programs take single
fields, and multiply by its matrices on tensor cores.
"""
import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import compute_dtype, empty_fields
from ..reference.field_norm import FIELD, FUNCTIONS
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
    """Whether all the other programs have arrived before; then what they have stored can be loaded."""
    tl.debug_barrier()  # all threads have stored
    return tl.atomic_add(arrivals_ptr, 1) == programs - 1


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
def moments_kernel(x_ptr, mean_ptr, var_ptr, partial_ptr, arrivals_ptr, channels, total, pixels, splits,
                   CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
                   BLOCK_SPLITS: tl.constexpr):
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


@triton.jit
def affine_kernel(x_ptr, y_ptr, scale_ptr, shift_ptr, channels, total, pixels, CHANNELS_LAST: tl.constexpr,
                  BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    has = channel < channels
    exists = (pixel < total)[:, None] & has[None, :]
    x = load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
    scale = tl.load(scale_ptr + channel, mask=has, other=0.0)[None, :]
    shift = tl.load(shift_ptr + channel, mask=has, other=0.0)[None, :]
    store_tile(y_ptr, x * scale + shift, channel, pixel, exists, channels, pixels, CHANNELS_LAST)


@triton.jit
def normed(x, mean, scale, shift):
    """Of a tile [pixels, channels]."""
    return (x - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def affine_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, scale_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, of_channel_ptr,
                      grad_scale_ptr, grad_shift_ptr, partial_ptr, arrivals_ptr, channels, total, pixels, splits,
                      EPS: tl.constexpr, FUNCTION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                      BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """The sums of g * (x - mean) and of g for each channel, with the mean of its field, and g the gradient of what the
    function was applied to; or, where there are no such means, of grad * x and of grad, and grad_x = scale * grad."""
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    split, has = tl.program_id(0) // blocks, channel < channels
    products = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), compute_type(x_ptr))
    sums = products
    if mean_ptr is None:
        factor = tl.load(scale_ptr + channel, mask=has, other=0.0)[None, :]
    else:
        of = tl.load(of_channel_ptr + channel, mask=has, other=0)
        mean = tl.load(mean_ptr + of, mask=has, other=0.0)
        factor = mean[None, :]
        if FUNCTION != "identity":
            deviation = tl.sqrt(tl.load(var_ptr + of, mask=has, other=1.0) + EPS)
            scale = tl.load(weight_ptr + of, mask=has, other=0.0) / deviation
            bias = tl.load(bias_ptr + of, mask=has, other=0.0)
    for _ in range(split * BLOCK_PIXELS, total, splits * BLOCK_PIXELS):
        exists = (pixel < total)[:, None] & has[None, :]
        x = load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        grad = load_tile(grad_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        if FUNCTION != "identity":
            grad *= slope_of(normed(x, mean, scale, bias), FUNCTION)
        sums += grad
        if mean_ptr is None:
            products += grad * x
            store_tile(grad_x_ptr, grad * factor, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        else:
            products += grad * (x - factor)
        pixel += splits * BLOCK_PIXELS
    store_partial(partial_ptr, split, 0, channel, has, channels, tl.sum(products.to(tl.float64), 0))
    store_partial(partial_ptr, split, 1, channel, has, channels, tl.sum(sums.to(tl.float64), 0))
    if is_last(arrivals_ptr + tl.program_id(0) % blocks, splits):
        finish_sums(partial_ptr, grad_scale_ptr, grad_shift_ptr, channel, has, channels, splits, BLOCK_SPLITS)


# ---- fields that share one mean and variance ----

@triton.jit
def sum_over_fields(field, first_ptr, second_ptr, mean, of_channel_ptr, channels, BLOCK: tl.constexpr):
    """(channels, sum of the first numbers, sum of the second) of the channels of each field [F].

    mean  None, or [F]: then the square of what the first numbers are apart from it is added to the second.
    """
    count = tl.zeros(field.shape, first_ptr.dtype.element_ty)
    one, two = count, count
    lowest, highest = tl.min(field), tl.max(field)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        of = tl.load(of_channel_ptr + channel, mask=channel < channels, other=-2)
        if tl.max(((of >= lowest) & (of <= highest)).to(tl.int32)) > 0:  # most channels belong to other fields
            match = of[None, :] == field[:, None]
            first = tl.load(first_ptr + channel, mask=channel < channels, other=0.0)[None, :]
            second = tl.load(second_ptr + channel, mask=channel < channels, other=0.0)[None, :]
            if mean is not None:
                second = second + (first - mean[:, None]) * (first - mean[:, None])
            count += tl.sum(match.to(count.dtype), 1)
            one += tl.sum(tl.where(match, first, 0.0), 1)
            two += tl.sum(tl.where(match, second, 0.0), 1)
    return count, one, two


@triton.jit
def moments_of(field, means_ptr, vars_ptr, of_channel_ptr, channels, BLOCK: tl.constexpr):
    """(mean, variance) of fields from those of their channels."""
    count, total, _ = sum_over_fields(field, means_ptr, vars_ptr, None, of_channel_ptr, channels, BLOCK)
    mean = total / count
    _, _, squares = sum_over_fields(field, means_ptr, vars_ptr, mean, of_channel_ptr, channels, BLOCK)
    return mean, squares / count


@triton.jit
def inner_kernel(x_ptr, y_ptr, means_ptr, vars_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, of_channel_ptr, channels,
                 fields, total, pixels, splits, EPS: tl.constexpr, FUNCTION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                 BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_FIELDS: tl.constexpr):
    """y, and by the first programs mean and variance of the fields, from those of the channels, `means` and `vars`."""
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    has = channel < channels
    of = tl.load(of_channel_ptr + channel, mask=has, other=-1)
    mean, var = moments_of(of, means_ptr, vars_ptr, of_channel_ptr, channels, BLOCK_FIELDS)
    scale = tl.load(weight_ptr + of, mask=has, other=0.0) / tl.sqrt(var + EPS)
    shift = tl.load(bias_ptr + of, mask=has, other=0.0)
    for _ in range(tl.program_id(0) // tl.cdiv(channels, BLOCK_CHANNELS) * BLOCK_PIXELS, total, splits * BLOCK_PIXELS):
        exists = (pixel < total)[:, None] & has[None, :]
        x = load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        y = normed(x, mean, scale, shift)
        if FUNCTION != "identity":
            y = value_of(y, FUNCTION)
        store_tile(y_ptr, y, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        pixel += splits * BLOCK_PIXELS
    for first in range(tl.program_id(0) * BLOCK_FIELDS, fields, tl.num_programs(0) * BLOCK_FIELDS):
        field = first + tl.arange(0, BLOCK_FIELDS)
        field_mean, field_var = moments_of(field, means_ptr, vars_ptr, of_channel_ptr, channels, BLOCK_FIELDS)
        tl.store(mean_ptr + field, field_mean, mask=field < fields)
        tl.store(var_ptr + field, field_var, mask=field < fields)


@triton.jit
def inner_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, products_ptr, sums_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
                     grad_weight_ptr, grad_bias_ptr, of_channel_ptr, channels, fields, total, pixels, splits,
                     EPS: tl.constexpr, FUNCTION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                     BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_FIELDS: tl.constexpr):
    """grad_x, and by the first programs the gradients of weight and bias, from the sums of the channels."""
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    has = channel < channels
    of = tl.load(of_channel_ptr + channel, mask=has, other=-1)
    count, product, sum_ = sum_over_fields(of, products_ptr, sums_ptr, None, of_channel_ptr, channels, BLOCK_FIELDS)
    count *= total
    deviation = tl.sqrt(tl.load(var_ptr + of, mask=has, other=1.0) + EPS)
    mean = tl.load(mean_ptr + of, mask=has, other=0.0)
    scale = tl.load(weight_ptr + of, mask=has, other=0.0) / deviation
    slope, shift = -scale * product / (deviation * deviation * count), -scale * sum_ / count
    if FUNCTION != "identity":
        bias = tl.load(bias_ptr + of, mask=has, other=0.0)
    for _ in range(tl.program_id(0) // tl.cdiv(channels, BLOCK_CHANNELS) * BLOCK_PIXELS, total, splits * BLOCK_PIXELS):
        exists = (pixel < total)[:, None] & has[None, :]
        x = load_tile(x_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        grad = load_tile(grad_ptr, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        if FUNCTION != "identity":
            grad *= slope_of(normed(x, mean, scale, bias), FUNCTION)
        grad_x = grad * scale[None, :] + ((x - mean[None, :]) * slope[None, :] + shift[None, :])
        store_tile(grad_x_ptr, grad_x, channel, pixel, exists, channels, pixels, CHANNELS_LAST)
        pixel += splits * BLOCK_PIXELS
    for first in range(tl.program_id(0) * BLOCK_FIELDS, fields, tl.num_programs(0) * BLOCK_FIELDS):
        field = first + tl.arange(0, BLOCK_FIELDS)
        exist = field < fields
        found = sum_over_fields(field, products_ptr, sums_ptr, None, of_channel_ptr, channels, BLOCK_FIELDS)
        field_var = tl.load(var_ptr + field, mask=exist, other=1.0)
        tl.store(grad_weight_ptr + field, found[1] / tl.sqrt(field_var + EPS), mask=exist)
        tl.store(grad_bias_ptr + field, found[2], mask=exist)


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
def field_moments_kernel(x_ptr, mean_ptr, var_ptr, fields_ptr, bases_ptr, partial_ptr, arrivals_ptr, num_fields,
                         channels, total, pixels, splits, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                         BLOCK_PIXELS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
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
def field_norm_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, scale_ptr, grad_scale_ptr, grad_shift_ptr, fields_ptr, bases_ptr,
                          partial_ptr, arrivals_ptr, num_fields, channels, total, pixels, splits,
                          PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
                          BLOCK_SIZE: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
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


# ---- launchers ----

SPLITS = {"BLOCK_SPLITS": 16}
IN_INTERPRETER = {"BLOCK_PIXELS": 512, "BLOCK_CHANNELS": 64}  # large: fewer calls
SIZES = (16, 32)  # of fields with a change of basis, or of parts of them, which are filled up with zeros


def channel_config(channels, channels_last, numbers=2048):
    """The neighbours in memory, 128 bytes of them or more, are in one tile."""
    if TRITON_INTERPRET:
        return IN_INTERPRETER
    block = (64 if channels > 16 else 16) if channels_last else 4
    return {"BLOCK_PIXELS": numbers // block, "BLOCK_CHANNELS": block}


def field_config(bases, dtype):
    """bases: how many numbers are in the matrices; the largest field has no more channels than if they were one's."""
    size = next((s for s in SIZES if 2 * s * s >= bases), SIZES[-1])
    if TRITON_INTERPRET:
        return {"BLOCK_PIXELS": IN_INTERPRETER["BLOCK_PIXELS"], "BLOCK_SIZE": size}
    return {"BLOCK_PIXELS": 64, "BLOCK_SIZE": size, "num_warps": 4 if size == 16 else 8, "num_stages": 1,
            "maxnreg": 255}


class Call:
    """What a launch needs: the division of the work, and scratch for sums."""

    def __init__(self, op, x, *others, bases=None, fields=None):
        self.x, self.layout, self.channels = x, layout_of(op, x, *others), x.shape[1]
        self.dtype = compute_dtype(x.dtype)
        if bases is None or not bases.numel():
            self.config = channel_config(self.channels, self.layout.channels_last)
            self.rows = triton.cdiv(self.channels, self.config["BLOCK_CHANNELS"])
            self.tables = {}
        else:
            self.config = {**field_config(bases.numel(), x.dtype), "PRECISION": dot_precision(x.dtype)}
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
        arrivals = torch.zeros(self.rows, dtype=torch.int32, device=self.x.device)
        return dict(partial_ptr=partial, arrivals_ptr=arrivals, splits=self.splits, **SPLITS)

    def per_channel(self):
        return self.x.new_empty(self.channels, dtype=self.dtype)


def field_norm(x, scale, shift, fields, bases):
    y = empty_fields(x, x.shape[1])
    call = Call("field_norm", x, y, bases=bases, fields=fields)
    if y.numel():
        call.run(field_norm_kernel if call.has_bases else affine_kernel, x, y, scale, shift, programs=call.blocks)
    return y


def field_norm_bwd(grad, x, scale, fields, bases):
    grad_x, grad_scale, grad_shift = empty_fields(x, x.shape[1]), torch.empty_like(scale), torch.empty_like(scale)
    call = Call("field_norm_bwd", x, grad, bases=bases, fields=fields)
    if call.has_bases:
        call.run(field_norm_bwd_kernel, grad, x, grad_x, scale, grad_scale, grad_shift, **call.sums())
    elif call.channels:
        call.run(affine_bwd_kernel, grad, x, grad_x, scale, *[None] * 5, grad_scale, grad_shift, EPS=0.0,
                 FUNCTION="identity", **call.sums())
    return grad_x, grad_scale, grad_shift


def field_norm_moments(x, fields, bases):
    call = Call("field_norm_moments", x, bases=bases, fields=fields)
    mean, var = call.per_channel(), call.per_channel()
    if call.channels:
        call.run(field_moments_kernel if call.has_bases else moments_kernel, x, mean, var, **call.sums())
    return mean, var


def field_norm_inner(x, weight, bias, field_of_channel, eps, function=0):
    y, mean, var = empty_fields(x, x.shape[1]), torch.empty_like(weight), torch.empty_like(weight)
    call = Call("field_norm_inner", x, y)
    means, variances = call.per_channel(), call.per_channel()
    if call.channels:
        call.run(moments_kernel, x, means, variances, **call.sums())
        call.run(inner_kernel, x, y, means, variances, weight, bias, mean, var, field_of_channel.contiguous(),
                 fields=len(weight), splits=call.splits, EPS=eps, FUNCTION=NAMES[function], BLOCK_FIELDS=BLOCK_FIELDS)
    return y, mean, var


def field_norm_inner_bwd(grad, x, weight, mean, var, field_of_channel, eps, bias=None, function=0):
    grad_x, grad_weight, grad_bias = empty_fields(x, x.shape[1]), torch.empty_like(weight), torch.empty_like(weight)
    call = Call("field_norm_inner_bwd", x, grad)
    products, sums = call.per_channel(), call.per_channel()
    if call.channels:
        of_channel = field_of_channel.contiguous()
        what = dict(EPS=eps, FUNCTION=NAMES[function])
        call.run(affine_bwd_kernel, grad, x, None, None, mean, var, weight, bias, of_channel, products, sums, **what,
                 **call.sums())
        call.run(inner_bwd_kernel, grad, x, grad_x, products, sums, weight, bias, mean, var, grad_weight, grad_bias,
                 of_channel, fields=len(weight), splits=call.splits, BLOCK_FIELDS=BLOCK_FIELDS, **what)
    return grad_x, grad_weight, grad_bias


NAMES = tuple(FUNCTIONS)  # of the function, by its number
BLOCK_FIELDS = 64  # channels that are searched for those of a field at once


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    integers = {**dict.fromkeys(("num_fields", "channels", "fields", "splits"), "i32"), **LAYOUT_TYPES}
    numbers = ("scale_ptr", "shift_ptr", "grad_scale_ptr", "grad_shift_ptr", "bases_ptr", "means_ptr", "vars_ptr",
               "mean_ptr", "var_ptr", "weight_ptr", "bias_ptr", "products_ptr", "sums_ptr", "grad_weight_ptr",
               "grad_bias_ptr")
    for name, dtype in DTYPES.items():
        tensors = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*" + name)
        types = {**tensors, **dict.fromkeys(numbers, computed_type(name)), **integers, "partial_ptr": "*fp64",
                 "arrivals_ptr": "*i32", "fields_ptr": "*i64", "of_channel_ptr": "*i64"}
        of_fields = ("mean_ptr", "var_ptr", "weight_ptr", "bias_ptr", "of_channel_ptr")
        plain = {k: t for k, t in types.items() if k not in of_fields}
        centred = {k: t for k, t in types.items() if k not in ("scale_ptr", "grad_x_ptr")}
        for channels_last in (False, True):
            c = {**channel_config(64, channels_last), "CHANNELS_LAST": channels_last}
            yield moments_kernel, types, {**c, **SPLITS}
            yield affine_kernel, types, c
            yield affine_bwd_kernel, plain, {**c, **SPLITS, **dict.fromkeys(of_fields), "EPS": 0.0,
                                             "FUNCTION": "identity"}
            for function in NAMES:
                inner = {**c, "EPS": 1e-5, "FUNCTION": function}
                yield affine_bwd_kernel, centred, {**inner, **SPLITS, "scale_ptr": None, "grad_x_ptr": None}
                yield inner_kernel, types, {**inner, "BLOCK_FIELDS": BLOCK_FIELDS}
                yield inner_bwd_kernel, types, {**inner, "BLOCK_FIELDS": BLOCK_FIELDS}
            for size in SIZES if name == "fp32" else SIZES[:1]:
                c = {**field_config(2 * size * size, dtype), "CHANNELS_LAST": channels_last,
                     "PRECISION": dot_precision(dtype)}
                yield field_moments_kernel, types, {**c, **SPLITS}
                yield field_norm_kernel, types, c
                yield field_norm_bwd_kernel, types, {**c, **SPLITS}
