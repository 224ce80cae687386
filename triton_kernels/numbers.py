"""Numbers as the kernels store and multiply them."""
import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import LOW_PRECISION

INTERPRETED = tl.constexpr(TRITON_INTERPRET)


@triton.jit
def to_nearest(x, dtype: tl.constexpr):
    """x.to(dtype). The interpreter truncates to bfloat16, so there the bits are rounded first, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 << 16
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


def dot_precision(dtype):
    """How tl.dot multiplies float32 for tensors of `dtype`: on tensor cores in parts that add up to what they need.

    Three products of TF32 are as exact as float32; three of bfloat16 have 16 bits, twice those of half precision.
    """
    if dtype == torch.float64 or TRITON_INTERPRET:  # the interpreter multiplies exactly, and knows not all of these
        return "ieee"
    if dtype in LOW_PRECISION:
        return "bf16x3"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
