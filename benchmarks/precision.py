"""What "float32", "tf32" and "bfloat16" mean for a layer: its dtypes, autocast, and torch's switches."""
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """
    activations  dtype of the layer's input (under autocast: what the layer before would hand on)
    parameters   dtype of weights
    autocast     dtype that autocast asks for, or None
    tolerance    relative L2 difference at which two implementations no longer compute the same
    """
    activations: torch.dtype
    parameters: torch.dtype
    autocast: object
    tolerance: float
    tf32: bool = False


PRECISIONS = {
    "float64": Precision(torch.float64, torch.float64, None, 1e-6),  # escnn's basis is sampled in float32
    "float32": Precision(torch.float32, torch.float32, None, 5e-5),
    "tf32": Precision(torch.float32, torch.float32, None, 3e-3, tf32=True),
    "bfloat16": Precision(torch.bfloat16, torch.float32, torch.bfloat16, 3e-2),
    "float16": Precision(torch.float16, torch.float32, torch.float16, 5e-3),
}


def lookup(name, device):
    """The Precision of that name. Raises ValueError where there is none, or not on that device."""
    if name not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name == "tf32" and torch.device(device).type != "cuda":
        raise ValueError("dtype tf32 needs a CUDA device")
    return PRECISIONS[name]


@contextmanager
def torch_switches(precision):
    """TF32 as the precision says, for matrix products and convolutions; and cuDNN may search its fastest algorithm."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = precision.tf32, precision.tf32, True
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def autocast(precision, device):
    if precision.autocast is None:
        return nullcontext()
    return torch.autocast(torch.device(device).type, precision.autocast)
