"""The fused steerable convolution on NVIDIA GPUs: CUDA C++ that is specialised for a layer when it is first needed.

irreps     a layer between the irreps of its input and output
structure  the tables that specialise the kernels, and how a wide layer is divided among several of them
kernels    which kernels a layer has
packing    weights and filters in the order in which tensor cores take them
compiler   from text to machine code
launch     from machine code to a running kernel
layer      all of it, for tensors
"""
from .irreps import Unsupported
from .launch import Unavailable
from .layer import ACTIVATIONS, FusedLayer, fused_layer, fused_unavailable_reason, origin_of_kernels

__all__ = ["ACTIVATIONS", "FusedLayer", "Unavailable", "Unsupported", "fused_layer", "fused_unavailable_reason",
           "origin_of_kernels"]
