"""Grids of samples for Fourier nonlinearities."""
import torch


def numerical_grid(make, **arguments):
    """make(**arguments), a grid of escnn's: those that it optimises, the first time, must not be on the meta device."""
    with torch.device("cpu"):
        return make(**arguments)
