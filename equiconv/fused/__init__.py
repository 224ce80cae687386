"""The fused steerable convolution on NVIDIA GPUs: CUDA C++ that is specialised for a layer when it is first needed.

irreps     a layer between the irreps of its input and output
structure  the tables that specialise the kernels, and how a wide layer is divided among several of them
packing    weights and filters in the order in which tensor cores take them
compiler   from text to machine code
launch     from machine code to a running kernel
layer      all of it, for tensors
"""
from .irreps import Unsupported
from .layer import ACTIVATIONS, FusedLayer, fused_layer, fused_unavailable_reason

__all__ = ["ACTIVATIONS", "FusedLayer", "Unsupported", "fused_layer", "fused_unavailable_reason"]
