"""field_dropout in Triton: tiles [pixels, groups of four fields], which share a block of random bits.

One kernel reads x once and writes the output; it is its own derivative.
"""
import itertools

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import empty_fields
from ..reference.field_dropout import FIELD, WORDS, threshold_and_scale
from .field_gate import load_chunk, store_chunk
from .field_tensor import DTYPES, LAYOUT_TYPES, SIZES, blocks_of_program, field_blocks, layout_of

WIDTH, NUM_WORDS = tl.constexpr(len(FIELD)), tl.constexpr(WORDS)
CHANNEL, SIZE = (tl.constexpr(FIELD.index(name)) for name in FIELD)


@triton.jit
def field_dropout_kernel(x_ptr, y_ptr, seed_ptr, fields_ptr, num_fields, channels, total, pixels, threshold, scale,
                         CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_FIELDS: tl.constexpr,
                         BLOCK_SIZE: tl.constexpr):
    group, pixel = blocks_of_program(tl.cdiv(num_fields, NUM_WORDS), total, BLOCK_FIELDS, BLOCK_PIXELS)
    zero = pixel[:, None] * 0 + group[None, :] * 0
    words = tl.philox(tl.load(seed_ptr), zero + pixel[:, None], zero, zero + group[None, :], zero)
    for word in tl.static_range(NUM_WORDS):
        field = group * NUM_WORDS + word
        has = field < num_fields
        channel = tl.load(fields_ptr + field * WIDTH + CHANNEL, mask=has, other=0).to(tl.int32)
        size = tl.load(fields_ptr + field * WIDTH + SIZE, mask=has, other=0).to(tl.int32)
        exists = (pixel < total)[:, None] & has[None, :]
        bits = words[word].to(tl.uint32, bitcast=True).to(tl.int64)
        factor = tl.where(bits >= threshold, scale, 0.0)
        for first in range(0, tl.max(size), BLOCK_SIZE):
            x = load_chunk(x_ptr, channel, size, first, pixel, exists, channels, pixels, CHANNELS_LAST, BLOCK_SIZE)
            store_chunk(y_ptr, factor[:, :, None].to(x.dtype) * x, channel, size, first, pixel, exists, channels,
                        pixels, CHANNELS_LAST, BLOCK_SIZE)


IN_INTERPRETER = {"BLOCK_PIXELS": 256, "BLOCK_FIELDS": 2, "BLOCK_SIZE": 8}  # large: fewer calls


def config(size, channels_last, dtype):
    return IN_INTERPRETER if TRITON_INTERPRET else field_blocks(size, channels_last, dtype, numbers=1024)


def field_dropout(x, seed, fields, p):
    y = empty_fields(x, x.shape[1])
    if not y.numel():
        return y
    num_fields, layout = len(fields), layout_of("field_dropout", x)
    threshold, scale = threshold_and_scale(p)
    c = config(triton.cdiv(x.shape[1], num_fields), layout.channels_last, x.dtype)
    groups = triton.cdiv(triton.cdiv(num_fields, WORDS), c["BLOCK_FIELDS"])
    with torch.cuda.device_of(x):
        field_dropout_kernel[(groups * triton.cdiv(layout.total, c["BLOCK_PIXELS"]),)](
            x, y, seed, fields.contiguous(), num_fields, x.shape[1], **layout.arguments(), threshold=threshold,
            scale=scale, **c)
    return y


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    types = {**dict.fromkeys(("num_fields", "channels"), "i32"), **LAYOUT_TYPES, "seed_ptr": "*i64",
             "fields_ptr": "*i64", "threshold": "i64", "scale": "fp32"}
    for dtype, channels_last, size in itertools.product(DTYPES, (False, True), SIZES):
        if size == SIZES[0] or dtype == "fp32":
            c = {"CHANNELS_LAST": channels_last, **field_blocks(size, channels_last, DTYPES[dtype], numbers=1024)}
            yield field_dropout_kernel, {**types, "x_ptr": "*" + dtype, "y_ptr": "*" + dtype}, c
