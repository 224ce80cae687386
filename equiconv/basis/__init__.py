"""Bases of equivariant kernels as irrep blocks, in closed form or by averaging, without escnn's numerical solver."""
from .build import STABILIZERS, has_native_basis, icosahedral_basis, steerable_basis
from .cache import forget
from .kernels import SteerableBasis
from .sampled import SampledBasis, native_paths

__all__ = ["STABILIZERS", "SampledBasis", "SteerableBasis", "forget", "has_native_basis", "icosahedral_basis",
           "native_paths", "steerable_basis"]
