"""What the CPU kernels run on."""
import platform
from pathlib import Path

import torch

from . import backends


def processor():
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def instruction_set():
    """That the native CPU kernels use, or why there is none."""
    reason = backends.why_not("native", "cpu")
    return f"none: {reason}" if reason else torch.ops.equiconv.limit_isa("")
