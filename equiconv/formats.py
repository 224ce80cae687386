"""Memory formats of tensors [B, C, *spatial]."""
import torch

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LOW_PRECISION = (torch.float16, torch.bfloat16)
FLOATING = (torch.float32, torch.float64, *LOW_PRECISION)


def compute_dtype(dtype):
    """The dtype in which tensors of `dtype` are computed with."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def is_channels_last(x):
    """Whether a tensor [B, C, *spatial] lies in memory with its channels last (and not also in the ordinary order)."""
    return x.dim() in CHANNELS_LAST and not x.is_contiguous() and x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])


def memory_format(x):
    """That of a tensor [B, C, *spatial]."""
    return CHANNELS_LAST[x.dim()] if is_channels_last(x) else torch.contiguous_format


def like(y, x):
    """y [B, C', *spatial'] in the memory format of x [B, C, *spatial]."""
    return y.contiguous(memory_format=memory_format(x))


def dense(x):
    """x in channels_last where it has that format, else contiguous."""
    return like(x, x)


def empty_fields(x, channels, dtype=None):
    """An empty tensor [B, channels, *spatial] in the memory format of x [B, C, *spatial]."""
    return like(x.new_empty([x.shape[0], channels, *x.shape[2:]], dtype=dtype), x)
