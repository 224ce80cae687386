"""Triton kernels of the ops, each with its launcher and its table of configurations."""
