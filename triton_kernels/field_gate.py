"""field_gate in Triton: tiles [pixels, fields, channels of a field].

Forward reads x (and gates) once and writes the output; backward reads x and the output's gradient, and writes x's. The
biases' gradients are sums over pixels: each of some programs adds up its own, a second kernel adds these, in order and
in float64.
"""
import itertools

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import empty_fields
from ..reference.field_gate import FIELD, FUNCTIONS
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
    splits_of,
)
from .functions import sigmoid, slope_of, value_of
from .numbers import to_nearest

WIDTH = tl.constexpr(len(FIELD))
CHANNEL, OUT_CHANNEL, SIZE, GATE, GATE_OUT, BIAS = (tl.constexpr(FIELD.index(name)) for name in FIELD)


@triton.jit
def load_column(fields_ptr, field, exists, column: tl.constexpr):
    """A number of each field; -1 where there is no field."""
    return tl.load(fields_ptr + field * WIDTH + column, mask=exists, other=-1).to(tl.int32)


@triton.jit
def load_chunk(x_ptr, channel, size, first, pixel, exists, channels, pixels, CHANNELS_LAST: tl.constexpr,
               BLOCK_SIZE: tl.constexpr):
    """Channels [first, first + BLOCK_SIZE) of fields: [pixels, fields, channels]."""
    i = first + tl.arange(0, BLOCK_SIZE)[None, None, :]
    offset = place(channel[None, :, None] + i, pixel[:, None, None], channels, pixels, CHANNELS_LAST)
    exist = exists[:, :, None] & (i < size[None, :, None])
    return tl.load(x_ptr + offset, mask=exist, other=0.0).to(compute_type(x_ptr))


@triton.jit
def store_chunk(y_ptr, y, channel, size, first, pixel, exists, channels, pixels, CHANNELS_LAST: tl.constexpr,
                BLOCK_SIZE: tl.constexpr):
    i = first + tl.arange(0, BLOCK_SIZE)[None, None, :]
    offset = place(channel[None, :, None] + i, pixel[:, None, None], channels, pixels, CHANNELS_LAST)
    exist = exists[:, :, None] & (i < size[None, :, None])
    tl.store(y_ptr + offset, to_nearest(y, y_ptr.dtype.element_ty), mask=exist)


@triton.jit
def bias_of(bias_ptr, fields_ptr, field, exists, like):
    """[1, fields]; zeros without biases."""
    if bias_ptr is None:
        return like * 0
    else:
        return tl.load(bias_ptr + load_column(fields_ptr, field, exists, BIAS), mask=exists, other=0.0)[None, :]


@triton.jit
def field_gate_kernel(x_ptr, gates_ptr, y_ptr, bias_ptr, eps_ptr, fields_ptr, num_fields, channels, gate_channels,
                      out_channels, total, pixels, FUNCTION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                      BLOCK_PIXELS: tl.constexpr, BLOCK_FIELDS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    field, pixel = blocks_of_program(num_fields, total, BLOCK_FIELDS, BLOCK_PIXELS)
    has = field < num_fields
    exists = (pixel < total)[:, None] & has[None, :]
    channel, size = load_column(fields_ptr, field, has, CHANNEL), load_column(fields_ptr, field, has, SIZE)
    out_channel = load_column(fields_ptr, field, has, OUT_CHANNEL)
    x = load_chunk(x_ptr, channel, size, 0, pixel, exists, channels, pixels, CHANNELS_LAST, BLOCK_SIZE)
    if FUNCTION == "gate":
        gate = load_column(fields_ptr, field, has, GATE)
        at = place(gate[None, :], pixel[:, None], gate_channels, pixels, CHANNELS_LAST)
        opened = tl.load(gates_ptr + at, mask=exists, other=0.0).to(x.dtype)
        m = sigmoid(opened - bias_of(bias_ptr, fields_ptr, field, has, opened))
        gate_out = load_column(fields_ptr, field, has, GATE_OUT)
        at = place(gate_out[None, :], pixel[:, None], out_channels, pixels, CHANNELS_LAST)
        tl.store(y_ptr + at, to_nearest(m, y_ptr.dtype.element_ty), mask=exists & (gate_out >= 0)[None, :])
    else:
        squares = tl.sum(x * x, 2)
        for first in range(BLOCK_SIZE, tl.max(size), BLOCK_SIZE):
            more = load_chunk(x_ptr, channel, size, first, pixel, exists, channels, pixels, CHANNELS_LAST, BLOCK_SIZE)
            squares += tl.sum(more * more, 2)
        norm = tl.sqrt(squares)
        is_small = norm <= tl.load(eps_ptr)
        shifted = norm - bias_of(bias_ptr, fields_ptr, field, has, norm)
        m = tl.where(is_small, 0.0, value_of(shifted, FUNCTION) / tl.where(is_small, 1.0, norm))
    store_chunk(y_ptr, m[:, :, None] * x, out_channel, size, 0, pixel, exists, out_channels, pixels, CHANNELS_LAST,
                BLOCK_SIZE)
    for first in range(BLOCK_SIZE, tl.max(size), BLOCK_SIZE):
        more = load_chunk(x_ptr, channel, size, first, pixel, exists, channels, pixels, CHANNELS_LAST, BLOCK_SIZE)
        store_chunk(y_ptr, m[:, :, None] * more, out_channel, size, first, pixel, exists, out_channels, pixels,
                    CHANNELS_LAST, BLOCK_SIZE)


@triton.jit
def field_gate_bwd_kernel(grad_ptr, x_ptr, gates_ptr, grad_x_ptr, grad_gates_ptr, partial_ptr, bias_ptr, eps_ptr,
                          fields_ptr, num_fields, channels, gate_channels, out_channels, total, pixels, splits,
                          FUNCTION: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
                          BLOCK_FIELDS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """partial [splits, fields]: the biases' gradients over the pixels of a program, every `splits`-th block."""
    field, pixel = blocks_of_program(num_fields, total, BLOCK_FIELDS, BLOCK_PIXELS)
    has = field < num_fields
    channel, size = load_column(fields_ptr, field, has, CHANNEL), load_column(fields_ptr, field, has, SIZE)
    out_channel = load_column(fields_ptr, field, has, OUT_CHANNEL)
    dtype: tl.constexpr = compute_type(x_ptr)
    sums = tl.zeros((BLOCK_PIXELS, BLOCK_FIELDS), dtype)
    bias = bias_of(bias_ptr, fields_ptr, field, has, sums)
    for _ in range(0, total, splits * BLOCK_PIXELS):
        exists = (pixel < total)[:, None] & has[None, :]
        x = load_chunk(x_ptr, channel, size, 0, pixel, exists, channels, pixels, CHANNELS_LAST, BLOCK_SIZE)
        grad = load_chunk(grad_ptr, out_channel, size, 0, pixel, exists, out_channels, pixels, CHANNELS_LAST,
                          BLOCK_SIZE)
        product, squares = tl.sum(grad * x, 2), tl.sum(x * x, 2)
        for first in range(BLOCK_SIZE, tl.max(size), BLOCK_SIZE):
            x_more = load_chunk(x_ptr, channel, size, first, pixel, exists, channels, pixels, CHANNELS_LAST,
                                BLOCK_SIZE)
            grad_more = load_chunk(grad_ptr, out_channel, size, first, pixel, exists, out_channels, pixels,
                                   CHANNELS_LAST, BLOCK_SIZE)
            product += tl.sum(grad_more * x_more, 2)
            squares += tl.sum(x_more * x_more, 2)
        if FUNCTION == "gate":
            gate = load_column(fields_ptr, field, has, GATE)
            at = place(gate[None, :], pixel[:, None], gate_channels, pixels, CHANNELS_LAST)
            m = sigmoid(tl.load(gates_ptr + at, mask=exists, other=0.0).to(dtype) - bias)
            gate_out = load_column(fields_ptr, field, has, GATE_OUT)
            kept = place(gate_out[None, :], pixel[:, None], out_channels, pixels, CHANNELS_LAST)
            product += tl.load(grad_ptr + kept, mask=exists & (gate_out >= 0)[None, :], other=0.0).to(dtype)
            slope = product * m * (1 - m)
            tl.store(grad_gates_ptr + at, to_nearest(slope, grad_gates_ptr.dtype.element_ty), mask=exists)
            radial = slope * 0
        else:
            norm = tl.sqrt(squares)
            is_small = norm <= tl.load(eps_ptr)
            inverse = tl.where(is_small, 0.0, 1 / tl.where(is_small, 1.0, norm))
            m = value_of(norm - bias, FUNCTION) * inverse
            slope = product * slope_of(norm - bias, FUNCTION) * inverse
            radial = (slope - product * m * inverse) * inverse
        sums -= tl.where(exists, slope, 0.0)
        grad_x = m[:, :, None] * grad + radial[:, :, None] * x
        store_chunk(grad_x_ptr, grad_x, channel, size, 0, pixel, exists, channels, pixels, CHANNELS_LAST, BLOCK_SIZE)
        for first in range(BLOCK_SIZE, tl.max(size), BLOCK_SIZE):
            x_more = load_chunk(x_ptr, channel, size, first, pixel, exists, channels, pixels, CHANNELS_LAST,
                                BLOCK_SIZE)
            grad_more = load_chunk(grad_ptr, out_channel, size, first, pixel, exists, out_channels, pixels,
                                   CHANNELS_LAST, BLOCK_SIZE)
            grad_x = m[:, :, None] * grad_more + radial[:, :, None] * x_more
            store_chunk(grad_x_ptr, grad_x, channel, size, first, pixel, exists, channels, pixels, CHANNELS_LAST,
                        BLOCK_SIZE)
        pixel += splits * BLOCK_PIXELS
    if bias_ptr is not None:
        split = tl.program_id(0) // tl.cdiv(num_fields, BLOCK_FIELDS)
        tl.store(partial_ptr + split * num_fields + field, tl.sum(sums.to(tl.float64), 0), mask=has)


@triton.jit
def field_gate_bias_kernel(partial_ptr, grad_bias_ptr, fields_ptr, num_fields, biases, splits,
                           BLOCK_BIASES: tl.constexpr, BLOCK_FIELDS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """Adds the sums of every program to the bias of their field."""
    bias = tl.program_id(0) * BLOCK_BIASES + tl.arange(0, BLOCK_BIASES)
    total = tl.zeros((BLOCK_BIASES,), tl.float64)
    for first_field in range(0, num_fields, BLOCK_FIELDS):
        field = first_field + tl.arange(0, BLOCK_FIELDS)
        match = load_column(fields_ptr, field, field < num_fields, BIAS)[None, :] == bias[:, None]
        wanted = tl.max(match.to(tl.int32), 0) > 0
        sums = tl.zeros((BLOCK_FIELDS,), tl.float64)
        for first in range(0, splits, BLOCK_SPLITS):
            split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
            sums += tl.sum(tl.load(partial_ptr + split * num_fields + field[None, :],
                                   mask=(split < splits) & wanted[None, :], other=0.0), 0)
        total += tl.sum(tl.where(match, sums[None, :], 0.0), 1)
    tl.store(grad_bias_ptr + bias, total, mask=bias < biases)


NAMES = tuple(FUNCTIONS)
IN_INTERPRETER = {"BLOCK_PIXELS": 256, "BLOCK_FIELDS": 8, "BLOCK_SIZE": 8}  # large: fewer calls
FINISH = {"BLOCK_BIASES": 32, "BLOCK_FIELDS": 32, "BLOCK_SPLITS": 32}


def config(elements, fields, channels_last, dtype, numbers=2048):
    if TRITON_INTERPRET:
        return IN_INTERPRETER
    return field_blocks(triton.cdiv(elements, fields), channels_last, dtype, numbers)


def field_gate(x, gates, bias, fields, elements, function, eps, out_channels):
    y = empty_fields(x, out_channels)
    given = [t for t in (gates, y) if t is not None]
    layout = layout_of("field_gate", x, *given)
    if y.numel() and len(fields):
        gates = x if gates is None else gates
        c = config(len(elements), len(fields), layout.channels_last, x.dtype)
        blocks = triton.cdiv(layout.total, c["BLOCK_PIXELS"]) * triton.cdiv(len(fields), c["BLOCK_FIELDS"])
        with torch.cuda.device_of(x):
            field_gate_kernel[(blocks,)](
                x, gates, y, bias, eps, fields.contiguous(), len(fields), x.shape[1], gates.shape[1], out_channels,
                **layout.arguments(), FUNCTION=NAMES[function], **c)
    return y


def field_gate_bwd(grad, x, gates, bias, fields, elements, function, eps):
    grad_x = empty_fields(x, x.shape[1])
    grad_gates = empty_fields(x, 0 if gates is None else gates.shape[1])
    layout = layout_of("field_gate_bwd", x, grad, *([] if gates is None else [gates]))
    grad_bias = x.new_empty(0, dtype=torch.float32) if bias is None else torch.zeros_like(bias)
    if not layout.total or not len(fields):
        return grad_x, grad_gates, grad_bias
    gates, to_gates = (x, grad_x) if gates is None else (gates, grad_gates)
    c = config(len(elements), len(fields), layout.channels_last, x.dtype, numbers=1024)
    field_blocks = triton.cdiv(len(fields), c["BLOCK_FIELDS"])
    splits = splits_of(layout, field_blocks, c["BLOCK_PIXELS"])
    partial = x.new_empty(0 if bias is None else splits, len(fields), dtype=torch.float64)
    with torch.cuda.device_of(x):
        field_gate_bwd_kernel[(field_blocks * splits,)](
            grad, x, gates, grad_x, to_gates, partial, bias, eps, fields.contiguous(), len(fields), x.shape[1],
            gates.shape[1], grad.shape[1], **layout.arguments(), splits=splits, FUNCTION=NAMES[function], **c)
        if bias is not None:
            field_gate_bias_kernel[(triton.cdiv(len(bias), FINISH["BLOCK_BIASES"]),)](
                partial, grad_bias, fields.contiguous(), len(fields), len(bias), splits, **FINISH)
    return grad_x, grad_gates, grad_bias


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    integers = dict.fromkeys(("num_fields", "channels", "gate_channels", "out_channels", "splits", "biases"), "i32")
    tensors = ("x_ptr", "gates_ptr", "y_ptr", "grad_ptr", "grad_x_ptr", "grad_gates_ptr")
    for dtype in DTYPES:
        types = {**dict.fromkeys(tensors, "*" + dtype), **integers, **LAYOUT_TYPES, "partial_ptr": "*fp64",
                 **dict.fromkeys(("bias_ptr", "eps_ptr", "grad_bias_ptr"), computed_type(dtype)), "fields_ptr": "*i64"}
        if dtype in ("fp32", "fp64"):
            yield field_gate_bias_kernel, types, FINISH
        for function, channels_last in itertools.product(NAMES, (False, True)):
            for size in SIZES if function == "gate" and dtype == "fp32" else SIZES[:1]:
                c = {"FUNCTION": function, "CHANNELS_LAST": channels_last}
                yield field_gate_kernel, types, {**c, **config(size, 1, channels_last, DTYPES[dtype])}
                yield field_gate_bwd_kernel, types, {**c, **config(size, 1, channels_last, DTYPES[dtype], 1024)}
