"""concatenated_act in Triton: tiles [pixels, channels]; one kernel each way."""
import itertools

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import empty_fields
from ..reference.fourier_act import FUNCTIONS
from .field_tensor import DTYPES, LAYOUT_TYPES, blocks_of_program, compute_type, layout_of, place
from .functions import slope_of, value_of
from .numbers import to_nearest


@triton.jit
def concatenated_act_kernel(x_ptr, y_ptr, channels, total, pixels, FUNCTION: tl.constexpr,
                            CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    exists = (pixel < total)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + place(channel[None, :], pixel[:, None], channels, pixels, CHANNELS_LAST), mask=exists,
                other=0.0).to(compute_type(x_ptr))
    for side in tl.static_range(2):
        to = y_ptr + place(2 * channel[None, :] + side, pixel[:, None], 2 * channels, pixels, CHANNELS_LAST)
        tl.store(to, to_nearest(value_of(x if side == 0 else -x, FUNCTION), y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def concatenated_act_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, channels, total, pixels, FUNCTION: tl.constexpr,
                                CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    channel, pixel = blocks_of_program(channels, total, BLOCK_CHANNELS, BLOCK_PIXELS)
    exists = (pixel < total)[:, None] & (channel < channels)[None, :]
    at = place(channel[None, :], pixel[:, None], channels, pixels, CHANNELS_LAST)
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(compute_type(x_ptr))
    grad_x = tl.zeros(x.shape, x.dtype)
    for side in tl.static_range(2):
        of = grad_ptr + place(2 * channel[None, :] + side, pixel[:, None], 2 * channels, pixels, CHANNELS_LAST)
        along = slope_of(x if side == 0 else -x, FUNCTION) * tl.load(of, mask=exists, other=0.0).to(x.dtype)
        grad_x += along if side == 0 else -along
    tl.store(grad_x_ptr + at, to_nearest(grad_x, grad_x_ptr.dtype.element_ty), mask=exists)


NAMES = tuple(FUNCTIONS)
IN_INTERPRETER = {"BLOCK_PIXELS": 256, "BLOCK_CHANNELS": 16}  # large: fewer calls


def config(channels_last, dtype):
    if TRITON_INTERPRET:
        return IN_INTERPRETER
    channels = 64 if channels_last else 4
    return {"BLOCK_PIXELS": (1024 if dtype == torch.float64 else 2048) // channels, "BLOCK_CHANNELS": channels,
            "maxnreg": 255}


def _launch(kernel, op, x, others, function):
    layout = layout_of(op, x, *others)
    c = config(layout.channels_last, x.dtype)
    *grads, result = others
    blocks = triton.cdiv(layout.total, c["BLOCK_PIXELS"]) * triton.cdiv(x.shape[1], c["BLOCK_CHANNELS"])
    with torch.cuda.device_of(x):
        kernel[(blocks,)](*grads, x, result, x.shape[1], **layout.arguments(), FUNCTION=NAMES[function], **c)
    return result


def concatenated_act(x, function):
    y = empty_fields(x, 2 * x.shape[1])
    return _launch(concatenated_act_kernel, "concatenated_act", x, (y,), function) if y.numel() else y


def concatenated_act_bwd(grad, x, function):
    grad_x = empty_fields(x, x.shape[1])
    if not grad_x.numel():
        return grad_x
    return _launch(concatenated_act_bwd_kernel, "concatenated_act_bwd", x, (grad, grad_x), function)


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    for dtype, function, channels_last in itertools.product(DTYPES, NAMES, (False, True)):
        types = {**dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*" + dtype), "channels": "i32",
                 **LAYOUT_TYPES}
        c = {"FUNCTION": function, "CHANNELS_LAST": channels_last, **config(channels_last, DTYPES[dtype])}
        for kernel in (concatenated_act_kernel, concatenated_act_bwd_kernel):
            yield kernel, types, c
