"""What the kernels on fields share: where elements lie in memory, and how many programs share the work.

Tiles are [pixels, channels], or [pixels, fields, channels of a field]; whatever is next to each other in memory, pixels
or channels, is next to each other in a tile. Pixels are counted through the batch. Tables are int64, as FIELD and
ELEMENT of the references name their columns.
"""
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import is_channels_last

PROGRAMS = 1056  # eight for each multiprocessor of a Hopper: the loads of all of them hide each other's latency
SIZES = (2, 4, 8, 16)  # channels of a field that are treated together
MAX_SPLITS = 256  # programs whose sums are added by one
# what ahead_of_time() of the modules needs
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUT_TYPES = {"pixels": "i32:16", "total": "i32:16"}  # of the arguments of a Layout


def computed_type(name):
    """The type of a pointer to numbers that a tensor of this dtype is computed with."""
    return "*fp64" if name == "fp64" else "*fp32"


class Layout(NamedTuple):
    total: int           # pixels of the batch
    pixels: int          # of an image
    channels_last: bool  # the channels of a pixel are adjacent

    def arguments(self):
        """What the kernels are told of it."""
        return dict(total=self.total, pixels=self.pixels, CHANNELS_LAST=self.channels_last)


def layout_of(op, x, *others):
    """The Layout of tensors that share batch, spatial sizes, dtype and memory format."""
    pixels = math.prod(x.shape[2:])
    layout = Layout(x.shape[0] * pixels, pixels, pixels == 1 or is_channels_last(x))
    if layout.total >= 1 << 31:
        raise ValueError(f"{op}: x must have less than 2^31 pixels, got {layout.total}")
    for t in (x, *others):
        if t.dtype != x.dtype or t.shape[0] != x.shape[0] or t.shape[2:] != x.shape[2:]:
            raise ValueError(f"{op}: tensors must have one dtype, batch and spatial size, got {t.dtype} "
                             f"{tuple(t.shape)} for {x.dtype} {tuple(x.shape)}")
        by_channel = layout.channels_last and pixels > 1 and t.shape[1] > 1
        if not (is_channels_last(t) if by_channel else t.is_contiguous()):
            raise ValueError(f"{op}: tensors must be contiguous or channels_last, all in one of the two")
    return layout


@triton.constexpr_function
def compute_type(pointer):
    """The dtype in which numbers of a pointer's are computed with."""
    return tl.float64 if pointer.dtype.element_ty == tl.float64 else tl.float32


@triton.jit
def place(channel, pixel, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Of elements of a tensor of so many channels and pixels of an image."""
    if CHANNELS_LAST:
        return pixel.to(tl.int64) * channels + channel
    else:
        image = (pixel // pixels).to(tl.int64)
        return image * channels * pixels + pixel % pixels + channel.to(tl.int64) * pixels


@triton.jit
def blocks_of_program(rows, total, BLOCK_ROWS: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """(rows [BLOCK_ROWS], pixels [BLOCK_PIXELS]) of this program: one block of each, those of the same pixels in turn.

    Which lie in the same lines of memory where the channels come last.
    """
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    row = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return row, tl.program_id(0) // row_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)


def field_blocks(size, channels_last, dtype, numbers=2048):
    """{BLOCK_PIXELS, BLOCK_FIELDS, BLOCK_SIZE} of tiles of so many numbers, for fields of about `size` channels.

    The neighbours in memory, 128 bytes of them or more, are in one tile. Tiles of float64 have half as many numbers.
    """
    numbers //= 2 if dtype == torch.float64 else 1
    block_size = min(SIZES[-1], max(SIZES[0], triton.next_power_of_2(size)))
    block_fields = (128 if channels_last else 16) // block_size
    return dict(BLOCK_PIXELS=numbers // (block_fields * block_size), BLOCK_FIELDS=block_fields, BLOCK_SIZE=block_size,
                maxnreg=255)


def splits_of(layout, row_blocks, block_pixels):
    """How many programs share the pixels of a block of rows whose sums they make."""
    return max(1, min(triton.cdiv(layout.total, block_pixels), PROGRAMS // row_blocks, MAX_SPLITS))
