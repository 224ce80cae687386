"""The kernels of a layer, as C++: what is compiled when it is first needed, or before (equiconv.precompilation)."""
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch

from .irreps import IrrepLayer, Unsupported, sides_of
from .structure import (
    Structure,
    check_kernel,
    forward_structures,
    gradient_structures,
    tile_for,
)

NUMBERS = {torch.bfloat16: "Bfloat16", torch.float16: "Float16", torch.float32: "Tf32"}  # of device.cuh
MAP_THREADS, MAP_PIXELS = 256, (32, 8)  # of maps.cuh: few for many channels
# Bytes of shared memory that a block can have, of the architectures that kernels can be compiled for without a GPU.
SHARED_BYTES = {f"sm_{arch}": kilobytes * 1024 for kilobytes, archs in (
    (163, (80, 87)), (99, (86, 89, 120)), (227, (90, 100, 103))) for arch in archs}


def maps_source(number, pixels):
    """C++ of the kernels around the fused ones: see maps.cuh."""
    kernels = {"pack_channels": ("ChangeChannelsParams", f"ChangeChannels<{number}, {pixels}>::run"),
               "unpack_channels": ("ChangeChannelsParams", f"ChangeChannels<{number}::Result, {pixels}>::run"),
               "pack_weights": ("MapParams", f"map_numbers<{number}>"),
               "unpack_gradient": ("MapParams", "map_numbers<Float32>"), "reduce": ("ReduceParams", "reduce")}
    text = "".join(f'extern "C" __global__ void __launch_bounds__({MAP_THREADS}) equiconv_{name}(const {params} p) '
                   f"{{ {function}(p); }}\n" for name, (params, function) in kernels.items())
    return f'#include "maps.cuh"\nnamespace equiconv {{\n{text}}}  // namespace equiconv\n'


def map_bytes(shape, pixels, dtype):
    """Of shared memory, for changing channels by a matrix of that shape."""
    return (pixels * dtype.itemsize + 4) * sum(shape)


@dataclass(frozen=True)
class Kernel:
    """A Structure and its C++: a function of the Tile and of whether it writes fields; or of the buffers."""
    structure: Structure
    source: object


class Direction:
    """From the input to the output of a layer or, the adjoint, from that to the input.

    tile, forward      Tile, list of Kernel
    writes_fields      whether they can write fields: see store.cuh
    buffers, gradient  the same of the gradient of the weights; None and empty of the adjoint
    """

    def __init__(self, layer, shared_bytes, with_gradient):
        number = NUMBERS[layer.dtype]
        self.tile, structures = forward_structures(layer, shared_bytes)
        self.writes_fields = len(structures) == 1 and structures[0].fields is not None
        self.forward = [Kernel(s, cache(partial(s.forward_source, number))) for s in structures]
        self.buffers, self.gradient = None, []
        if with_gradient:
            self.buffers, structures = gradient_structures(layer, shared_bytes)
            self.gradient = [Kernel(s, cache(partial(s.gradient_source, number))) for s in structures]

    def sources(self):
        """List of the C++ of all of them, for images of every height in both memory formats."""
        tiles = dict.fromkeys(tile_for(self.tile, height) for height in (self.tile.rows + 1, self.tile.rows))
        stores = (False, True) if self.writes_fields else (False,)
        return [*(kernel.source(tile=tile, in_fields=store)
                  for kernel in self.forward for tile in tiles for store in stores),
                *(kernel.source(buffers=self.buffers) for kernel in self.gradient)]


class Kernels:
    """All kernels of a layer, for blocks with that much shared memory. Raises Unsupported for what is not possible.

    sides       (Side of the input, of the output)
    directions  (Direction from the one to the other, the adjoint)
    maps        C++ of the kernels around those
    map_pixels  that each of their blocks takes
    """

    def __init__(self, plan, kernel, dtype, stride, shared_bytes):
        """plan: layout.FilterPlan; kernel: its spatial sizes; dtype: a torch.dtype of NUMBERS"""
        check_kernel(kernel)
        self.weights, self.dtype, self.sides = plan.weights, dtype, sides_of(plan)
        self.map_pixels = next((pixels for pixels in MAP_PIXELS if all(
            map_bytes(side.to_packed.shape, pixels, dtype) <= shared_bytes for side in self.sides)), None)
        if self.map_pixels is None:
            raise Unsupported("its channels need more shared memory than there is")
        self.maps = maps_source(NUMBERS[dtype], self.map_pixels)
        self.directions = [Direction(IrrepLayer(plan, kernel, self.sides, adjoint, dtype, stride), shared_bytes,
                                     with_gradient=not adjoint) for adjoint in (False, True)]

    @cached_property
    def sources(self):
        """List of the C++ of everything that a training step may launch, whatever the images."""
        return list(dict.fromkeys([self.maps, *(s for direction in self.directions for s in direction.sources())]))
