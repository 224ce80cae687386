"""What the ops on fields, [B, channels, *spatial], share: the choice of their backend and checks of their arguments."""
import torch

from .. import backends, library
from ..formats import FLOATING

_AVAILABLE = ("native", "triton")
_DEFAULTS = {**backends.defaults(_AVAILABLE, ("cpu",)), "meta": "native"}  # whose fakes serve it


def on_backends(module, op):
    """The implementations of an op for library.define."""
    return {"native": None, "triton": library.triton_kernel(module, op)}


def pick(x, backend):
    """The backend that computes on x: `backend` if it can, by default the best."""
    return backends.pick(_DEFAULTS, _AVAILABLE, x.device.type, backend)


def has_kernel(device_type):
    """Whether these ops are more than their definitions there, which must know the structure on the host."""
    return _DEFAULTS.get(device_type, "reference") != "reference"


def check_fields(op, x):
    if x.dim() < 2 or x.dtype not in FLOATING:
        raise ValueError(f"{op}: x must be [B, C, *spatial] and floating point, got {tuple(x.shape)} and {x.dtype}")


def check_table(op, name, table, columns, rows="n"):
    if table.dim() != 2 or table.shape[1] != len(columns) or table.dtype != torch.int64:
        raise ValueError(f"{op}: {name} must be int64 [{rows}, {len(columns)}], got {table.dtype} {tuple(table.shape)}")
