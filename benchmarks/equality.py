"""Nothing is timed before it computes the same: outputs and gradients against escnn's."""
import torch


class Differs(Exception):
    """The outputs of two methods differ by more than their dtype explains."""


def relative_error(actual, expected):
    """L2 norm of the difference over that of `expected`, in float64; inf for other shapes, NaN or Inf."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-300)).item()
    return error if error == error else float("inf")


def worst_error(actual, expected):
    """The largest relative error over two lists of tensors."""
    if len(actual) != len(expected):
        return float("inf")
    return max(relative_error(a, e) for a, e in zip(actual, expected))


def check(what, actual, expected, tolerance):
    """The error of some tensors, or Differs."""
    error = worst_error(actual, expected)
    if not error <= tolerance:
        raise Differs(f"{what}: relative error {error:.1e} is above {tolerance:.0e}")
    return error
