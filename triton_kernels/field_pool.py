"""field_pool in Triton: tiles [pixels, fields, channels of a subfield].

Forward reads x once and writes a number per field; backward reads x and these, and writes x's gradient. A program of
channels_last tensors takes some pixels and all their fields in turn, so that the lines of memory which fields share are
read once; one of contiguous tensors takes one field, whose channels are rows of pixels.
"""
import itertools

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import empty_fields
from ..reference.field_pool import FIELD
from .field_tensor import (
    DTYPES,
    LAYOUT_TYPES,
    SIZES,
    blocks_of_program,
    compute_type,
    computed_type,
    field_blocks,
    layout_of,
    place,
)
from .functions import value_of
from .numbers import to_nearest

WIDTH = tl.constexpr(len(FIELD))
CHANNEL, SIZE, SUBFIELD = (tl.constexpr(FIELD.index(name)) for name in ("channel", "size", "subfield"))


@triton.jit
def load_rows(fields_ptr, field, num_fields):
    """(first channel, channels, channels of a subfield) of these fields"""
    row, exists = fields_ptr + field * WIDTH, field < num_fields
    channel = tl.load(row + CHANNEL, mask=exists, other=0).to(tl.int32)
    size = tl.load(row + SIZE, mask=exists, other=0).to(tl.int32)
    return channel, size, tl.load(row + SUBFIELD, mask=exists, other=1).to(tl.int32)


@triton.jit
def largest_of(values, exist, first):
    """(the largest along axis 2, NaN if one is; the first place where it is, counted from `first`)"""
    is_nan = (values != values) & exist
    values = tl.where(exist & (values == values), values, float("-inf"))
    values = tl.where(is_nan, float("inf"), values)
    most = tl.max(values, 2)
    has_nan = tl.max(is_nan.to(tl.int32), 2) > 0
    best = tl.where(has_nan[:, :, None], is_nan, exist & (values == most[:, :, None]))
    place_of = tl.arange(0, values.shape[2])[None, None, :]
    at = tl.min(tl.where(best, place_of, values.shape[2]), 2)
    return tl.where(has_nan, float("nan"), most), at + first


@triton.jit
def better(most, at, other, other_at):
    """Of two maxima the larger, and its place: the first if they are equal; NaN before all others."""
    takes = (most == most) & ((other > most) | (other != other))
    return tl.where(takes, other, most), tl.where(takes, other_at, at)


@triton.jit
def norm_of(x_ptr, channel, size, pixel, exists, channels, pixels, CHANNELS_LAST: tl.constexpr,
            BLOCK_SIZE: tl.constexpr):
    """Of the subfields of `size` channels from `channel` on, [fields]: [pixels, fields]."""
    dtype: tl.constexpr = compute_type(x_ptr)
    squares = tl.zeros(exists.shape, dtype)
    for first in range(0, tl.max(size), BLOCK_SIZE):
        i = first + tl.arange(0, BLOCK_SIZE)[None, None, :]
        exist = exists[:, :, None] & (i < size[None, :, None])
        offset = place(channel[None, :, None] + i, pixel[:, None, None], channels, pixels, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=exist, other=0.0).to(dtype)
        squares += tl.sum(x * x, 2)
    return tl.sqrt(squares)


@triton.jit
def find_largest(x_ptr, channel, size, subfield, pixel, exists, channels, pixels, NORMS: tl.constexpr,
                 CHANNELS_LAST: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(largest [pixels, fields], the channel, or subfield, of the field that has it first)"""
    dtype: tl.constexpr = compute_type(x_ptr)
    most = tl.full(exists.shape, float("-inf"), dtype)
    at = tl.zeros(exists.shape, tl.int32)
    if NORMS:
        parts = size // subfield
        for part in range(0, tl.max(parts)):
            has = exists & (part < parts)[None, :]
            norm = norm_of(x_ptr, channel + part * subfield, subfield, pixel, has, channels, pixels, CHANNELS_LAST,
                           BLOCK_SIZE)
            most, at = better(most, at, tl.where(has, norm, float("-inf")), at * 0 + part)
    else:
        for first in range(0, tl.max(size), BLOCK_SIZE):
            i = first + tl.arange(0, BLOCK_SIZE)[None, None, :]
            exist = exists[:, :, None] & (i < size[None, :, None])
            offset = place(channel[None, :, None] + i, pixel[:, None, None], channels, pixels, CHANNELS_LAST)
            x = tl.load(x_ptr + offset, mask=exist, other=0.0).to(dtype)
            found, found_at = largest_of(x, exist, first)
            most, at = better(most, at, found, found_at)
    return most, at


@triton.jit
def field_pool_kernel(x_ptr, y_ptr, directions_ptr, fields_ptr, num_fields, channels, total, pixels,
                      NUMBERS: tl.constexpr, NORMS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                      BLOCK_PIXELS: tl.constexpr, BLOCK_FIELDS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """NUMBERS: of a field in the output, along its direction; 0 where the largest itself is the output."""
    field, pixel = blocks_of_program(num_fields, total, BLOCK_FIELDS, BLOCK_PIXELS)
    channel, size, subfield = load_rows(fields_ptr, field, num_fields)
    exists = (pixel < total)[:, None] & (field < num_fields)[None, :]
    most, at = find_largest(x_ptr, channel, size, subfield, pixel, exists, channels, pixels, NORMS, CHANNELS_LAST,
                            BLOCK_SIZE)
    if NUMBERS == 0:
        offset = place(field[None, :], pixel[:, None], num_fields, pixels, CHANNELS_LAST)
        tl.store(y_ptr + offset, to_nearest(most, y_ptr.dtype.element_ty), mask=exists)
    else:
        length = value_of(most, "relu")
        for n in tl.static_range(NUMBERS):
            y = length * tl.load(directions_ptr + at * NUMBERS + n, mask=exists, other=0.0)
            offset = place(field[None, :] * NUMBERS + n, pixel[:, None], num_fields * NUMBERS, pixels, CHANNELS_LAST)
            tl.store(y_ptr + offset, to_nearest(y, y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def field_pool_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, directions_ptr, fields_ptr, num_fields, channels, total, pixels,
                          NUMBERS: tl.constexpr, NORMS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                          BLOCK_PIXELS: tl.constexpr, BLOCK_FIELDS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    field, pixel = blocks_of_program(num_fields, total, BLOCK_FIELDS, BLOCK_PIXELS)
    channel, size, subfield = load_rows(fields_ptr, field, num_fields)
    exists = (pixel < total)[:, None] & (field < num_fields)[None, :]
    most, at = find_largest(x_ptr, channel, size, subfield, pixel, exists, channels, pixels, NORMS, CHANNELS_LAST,
                            BLOCK_SIZE)
    if NUMBERS == 0:
        offset = place(field[None, :], pixel[:, None], num_fields, pixels, CHANNELS_LAST)
        grad = tl.load(grad_ptr + offset, mask=exists, other=0.0).to(most.dtype)
    else:
        grad = tl.zeros(most.shape, most.dtype)
        for n in tl.static_range(NUMBERS):
            offset = place(field[None, :] * NUMBERS + n, pixel[:, None], num_fields * NUMBERS, pixels, CHANNELS_LAST)
            g = tl.load(grad_ptr + offset, mask=exists, other=0.0).to(most.dtype)
            grad += g * tl.load(directions_ptr + at * NUMBERS + n, mask=exists, other=0.0)
        grad = tl.where(most <= 0, 0.0, grad)
    if NORMS:
        grad = tl.where(most == 0, 0.0, grad / most)
    for first in range(0, tl.max(size), BLOCK_SIZE):
        i = first + tl.arange(0, BLOCK_SIZE)[None, None, :]
        exist = exists[:, :, None] & (i < size[None, :, None])
        at_x = place(channel[None, :, None] + i, pixel[:, None, None], channels, pixels, CHANNELS_LAST)
        chosen = i // subfield[None, :, None] == at[:, :, None]
        if NORMS:
            x = tl.load(x_ptr + at_x, mask=exist, other=0.0).to(most.dtype)
            grad_x = grad[:, :, None] * x
        else:
            grad_x = tl.broadcast_to(grad[:, :, None], at_x.shape)
        grad_x = tl.where(chosen, grad_x, 0.0)
        tl.store(grad_x_ptr + at_x, to_nearest(grad_x, grad_x_ptr.dtype.element_ty), mask=exist)


IN_INTERPRETER = {"BLOCK_PIXELS": 256, "BLOCK_FIELDS": 8, "BLOCK_SIZE": 8}  # large: fewer calls


def config(size, channels_last, dtype):
    return IN_INTERPRETER if TRITON_INTERPRET else field_blocks(size, channels_last, dtype)


def _launch(kernel, op, x, others, fields, norms, directions):
    *grads, result = others
    channels, num_fields = x.shape[1], len(fields)
    layout = layout_of(op, x, *others)
    c = config(triton.cdiv(channels, num_fields), layout.channels_last, x.dtype)
    programs = triton.cdiv(num_fields, c["BLOCK_FIELDS"]) * triton.cdiv(layout.total, c["BLOCK_PIXELS"])
    with torch.cuda.device_of(x):
        kernel[(programs,)](*grads, x, result, directions, fields.contiguous(), num_fields, channels,
                            **layout.arguments(), NUMBERS=0 if directions is None else directions.shape[1],
                            NORMS=norms, **c)
    return result


def field_pool(x, fields, elements, norms, directions):
    y = empty_fields(x, len(fields) * (1 if directions is None else directions.shape[1]))
    if y.numel():
        _launch(field_pool_kernel, "field_pool", x, (y,), fields, norms, directions)
    return y


def field_pool_bwd(grad, x, fields, elements, norms, directions):
    grad_x = empty_fields(x, x.shape[1])
    if grad_x.numel():
        _launch(field_pool_bwd_kernel, "field_pool_bwd", x, (grad, grad_x), fields, norms, directions)
    return grad_x


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    integers = {**dict.fromkeys(("num_fields", "channels"), "i32"), **LAYOUT_TYPES, "fields_ptr": "*i64"}
    kinds = ((0, False), (0, True), (2, False))  # numbers along a direction, and whether norms are compared
    for dtype, (numbers, norms), channels_last, size in itertools.product(DTYPES, kinds, (False, True), SIZES):
        if size > SIZES[0] and dtype != "fp32":
            continue
        c = {"NUMBERS": numbers, "NORMS": norms, "CHANNELS_LAST": channels_last,
             **field_blocks(size, channels_last, DTYPES[dtype])}
        tensors = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*" + dtype)
        tensors["directions_ptr"] = computed_type(dtype)
        for kernel in (field_pool_kernel, field_pool_bwd_kernel):
            yield kernel, {**tensors, **integers}, c
