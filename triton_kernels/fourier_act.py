"""fourier_act in Triton: y^T = f(x^T A^T) Ainv^T for tiles [pixels, channels of a field], on tensor cores.

A program takes some pixels of one field and goes through the samples in blocks, which it holds in registers: memory
sees x and y once each (backward: x, the output's gradient, and x's), and the matrices come from the caches.
"""
import itertools

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import empty_fields
from ..reference.fourier_act import FUNCTIONS
from .field_tensor import DTYPES, LAYOUT_TYPES, compute_type, computed_type, layout_of, place
from .functions import slope_of, value_of
from .numbers import dot_precision, to_nearest


@triton.jit
def load_matrix(a_ptr, row, column, rows, columns):
    return tl.load(a_ptr + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)


@triton.jit
def field_of_program(fields, total, BLOCK_PIXELS: tl.constexpr):
    """(field, pixels [BLOCK_PIXELS, 1], which of them exist): the fields of the same pixels in turn."""
    pixel = tl.program_id(0) // fields * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    return tl.program_id(0) % fields, pixel, pixel < total


@triton.jit
def load_field(x_ptr, field, size, pixel, exists, channels, pixels, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[None, :]
    at = place(field * size + i, pixel, channels, pixels, CHANNELS_LAST)
    return tl.load(x_ptr + at, mask=exists & (i < size), other=0.0).to(compute_type(x_ptr))


@triton.jit
def store_field(y_ptr, y, field, size, pixel, exists, channels, pixels, CHANNELS_LAST: tl.constexpr,
                BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[None, :]
    at = place(field * size + i, pixel, channels, pixels, CHANNELS_LAST)
    tl.store(y_ptr + at, to_nearest(y, y_ptr.dtype.element_ty), mask=exists & (i < size))


@triton.jit
def fourier_act_kernel(x_ptr, y_ptr, a_ptr, a_inv_ptr, fields, in_size, samples, out_size, total, pixels,
                       FUNCTION: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                       BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_SAMPLES: tl.constexpr,
                       BLOCK_OUT: tl.constexpr):
    field, pixel, exists = field_of_program(fields, total, BLOCK_PIXELS)
    x = load_field(x_ptr, field, in_size, pixel, exists, fields * in_size, pixels, CHANNELS_LAST, BLOCK_IN)
    i, o = tl.arange(0, BLOCK_IN)[:, None], tl.arange(0, BLOCK_OUT)[None, :]
    y = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), x.dtype)
    for first in range(0, samples, BLOCK_SAMPLES):
        g = first + tl.arange(0, BLOCK_SAMPLES)
        a = load_matrix(a_ptr, g[None, :], i, samples, in_size)
        s = tl.dot(x, a, input_precision=PRECISION, out_dtype=x.dtype)
        a_inv = load_matrix(a_inv_ptr, o, g[:, None], out_size, samples)
        y = tl.dot(value_of(s, FUNCTION), a_inv, y, input_precision=PRECISION, out_dtype=x.dtype)
    store_field(y_ptr, y, field, out_size, pixel, exists, fields * out_size, pixels, CHANNELS_LAST, BLOCK_OUT)


@triton.jit
def fourier_act_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, a_ptr, a_inv_ptr, fields, in_size, samples, out_size, total,
                           pixels, FUNCTION: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                           BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_SAMPLES: tl.constexpr,
                           BLOCK_OUT: tl.constexpr):
    field, pixel, exists = field_of_program(fields, total, BLOCK_PIXELS)
    x = load_field(x_ptr, field, in_size, pixel, exists, fields * in_size, pixels, CHANNELS_LAST, BLOCK_IN)
    grad = load_field(grad_ptr, field, out_size, pixel, exists, fields * out_size, pixels, CHANNELS_LAST, BLOCK_OUT)
    i, o = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)[:, None]
    grad_x = tl.zeros((BLOCK_PIXELS, BLOCK_IN), x.dtype)
    for first in range(0, samples, BLOCK_SAMPLES):
        g = first + tl.arange(0, BLOCK_SAMPLES)
        a = load_matrix(a_ptr, g[None, :], i[:, None], samples, in_size)
        s = tl.dot(x, a, input_precision=PRECISION, out_dtype=x.dtype)
        a_inv = load_matrix(a_inv_ptr, o, g[None, :], out_size, samples)
        u = tl.dot(grad, a_inv, input_precision=PRECISION, out_dtype=x.dtype)
        a = load_matrix(a_ptr, g[:, None], i[None, :], samples, in_size)
        grad_x = tl.dot(slope_of(s, FUNCTION) * u, a, grad_x, input_precision=PRECISION, out_dtype=x.dtype)
    store_field(grad_x_ptr, grad_x, field, in_size, pixel, exists, fields * in_size, pixels, CHANNELS_LAST, BLOCK_IN)


NAMES = tuple(FUNCTIONS)
WIDTHS = (16, 32, 64, 128)  # of a field, filled up with zeros: what tensor cores multiply
IN_INTERPRETER = {"BLOCK_PIXELS": 512, "BLOCK_SAMPLES": 64}  # large: fewer calls


def config(kernel, dtype, in_size, out_size):
    """Wide fields, float64 and the backward pass fill the registers with fewer pixels."""
    block_in, block_out = (max(WIDTHS[0], triton.next_power_of_2(size)) for size in (in_size, out_size))
    blocks = {"BLOCK_IN": block_in, "BLOCK_OUT": block_out}
    if TRITON_INTERPRET:
        return {**IN_INTERPRETER, **blocks}
    width = max(block_in, block_out) * (4 if dtype == torch.float64 else 1)
    pixels, samples, warps = next(c for limit, *c in BLOCKS if width <= limit)
    pixels = pixels // 2 if kernel is fourier_act_bwd_kernel else pixels
    return {**blocks, "BLOCK_PIXELS": pixels, "BLOCK_SAMPLES": samples, "num_warps": warps, "num_stages": 2,
            "maxnreg": 255}  # or ptxas spills to fit one more block into a multiprocessor


BLOCKS = ((32, 128, 32, 4), (64, 64, 32, 8), (1 << 30, 32, 16, 8))  # (width, pixels, samples, warps)


def _launch(kernel, op, x, others, a, a_inv, function):
    fields, layout = x.shape[1] // a.shape[1], layout_of(op, x, *others)
    c = config(kernel, x.dtype, a.shape[1], a_inv.shape[0])
    *before, result = others
    with torch.cuda.device_of(x):
        kernel[(fields * triton.cdiv(layout.total, c["BLOCK_PIXELS"]),)](
            *before, x, result, a, a_inv, fields, a.shape[1], a.shape[0], a_inv.shape[0], **layout.arguments(),
            FUNCTION=NAMES[function], PRECISION=dot_precision(x.dtype), **c)
    return result


def fourier_act(x, a, a_inv, function):
    y = empty_fields(x, x.shape[1] // a.shape[1] * a_inv.shape[0])
    return _launch(fourier_act_kernel, "fourier_act", x, (y,), a, a_inv, function) if y.numel() else y


def fourier_act_bwd(grad, x, a, a_inv, function):
    grad_x = empty_fields(x, x.shape[1])
    if not grad_x.numel():
        return grad_x
    return _launch(fourier_act_bwd_kernel, "fourier_act_bwd", x, (grad, grad_x), a, a_inv, function)


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    integers = {**dict.fromkeys(("fields", "in_size", "samples", "out_size"), "i32"), **LAYOUT_TYPES}
    # every function at one width, and every width with one of them
    cases = [(width, "elu") for width in WIDTHS] + [(WIDTHS[0], function) for function in NAMES if function != "elu"]
    for name, dtype in DTYPES.items():
        types = {**dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*" + name),
                 **dict.fromkeys(("a_ptr", "a_inv_ptr"), computed_type(name)), **integers}
        precisions = {"fp32": ("tf32x3", "tf32"), "fp64": ("ieee",)}.get(name, ("bf16x3",))
        for (width, function), precision, channels_last in itertools.product(cases, precisions, (False, True)):
            if width > WIDTHS[0] and channels_last:  # loads and stores alone differ
                continue
            for kernel in (fourier_act_kernel, fourier_act_bwd_kernel):
                yield kernel, types, {**config(kernel, dtype, width, width), "FUNCTION": function,
                                      "PRECISION": precision, "CHANNELS_LAST": channels_last}
