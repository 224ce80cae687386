import torch

from .. import library
from ..formats import dense, empty_fields, memory_format
from ..reference import field_dropout as reference
from ..reference.field_dropout import FIELD
from .on_fields import check_fields, check_table, on_backends, pick


def _fake(x, seed, fields, p):
    return empty_fields(x, x.shape[1])


def _setup_context(ctx, inputs, output):
    x, seed, fields, ctx.p = inputs
    ctx.save_for_backward(seed, fields)
    ctx.memory_format = memory_format(x)


def _backward(ctx, backend, grad):
    """The same numbers again: it is linear, and each channel depends on itself alone."""
    seed, fields = ctx.saved_tensors
    return _fwd[backend](grad.contiguous(memory_format=ctx.memory_format), seed, fields, ctx.p), None, None, None


_fwd = library.define(
    "field_dropout", "(Tensor x, Tensor seed, Tensor fields, float p) -> Tensor",
    on_backends("field_dropout", "field_dropout"), fake=_fake, setup_context=_setup_context, backward=_backward)


def field_dropout(x, fields, p, *, seed=None, backend=None):
    """Each field at each pixel is zero with probability p, else divided by 1 - p: all of its channels alike.

    The random numbers are made where they are used, and made again for the gradient: nothing is kept but the seed. They
    depend on seed, batch index, pixel and field alone, not on backend, dtype, memory format or number of threads.

    x        [B, C, *spatial], float32, float64, float16 or bfloat16
    fields   int64 [F, 2], on x's device: the first channel of each field in turn, and its size
    p        between 0 and 1
    seed     int64 [1], on x's device; None: drawn from torch's generator there
    backend  "native", "triton" or "reference"; None: the best that can run

    Returns [B, C, *spatial] in x's dtype and memory format. Raises ValueError for what does not fit together.
    """
    check_fields("field_dropout", x)
    check_table("field_dropout", "fields", fields, FIELD)
    if not 0 <= p <= 1:
        raise ValueError(f"field_dropout: p must be between 0 and 1, got {p}")
    if seed is None:
        seed = torch.randint(1 << 62, (1,), device=x.device)
    elif seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"field_dropout: seed must be one int64 number, got {seed.dtype} {tuple(seed.shape)}")
    chosen = pick(x, backend)
    if chosen == "reference":
        return reference.field_dropout(x, seed, fields, p)
    return _fwd[chosen](dense(x), seed, fields, p)
