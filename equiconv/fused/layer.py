"""A layer that the fused kernels compute: its kernels and tables, and their calls for tensors."""
from dataclasses import dataclass
from functools import cache, partial, reduce
from math import ceil
from weakref import WeakKeyDictionary

import torch

from ..formats import dense, is_channels_last
from . import compiler, launch, packing
from .irreps import IrrepLayer, Unsupported, sides_of
from .structure import Harmonics, Structure, check_kernel, forward_structures, forward_warps, gradient_structures

NUMBERS = {torch.bfloat16: "Bfloat16", torch.float16: "Float16"}  # in csrc/cuda/steerable_conv/device.cuh
MAP_THREADS, PIXELS_OF_MAP, MAP_PITCH = 256, 32, 34               # of maps.cuh
BLOCKS_PER_PROCESSOR = 2                                          # that the gradient's grid is made for


def maps_source(number):
    """C++ of the kernels around the fused ones: see maps.cuh."""
    kernels = {"change_channels": ("ChangeChannelsParams", f"ChangeChannels<{number}>::run"),
               "pack_weights": ("MapParams", f"map_numbers<{number}>"),
               "unpack_gradient": ("MapParams", "map_numbers<Float32>"), "reduce": ("ReduceParams", "reduce")}
    text = "".join(f'extern "C" __global__ void __launch_bounds__({MAP_THREADS}) equiconv_{name}(const {params} p) '
                   f"{{ {function}(p); }}\n" for name, (params, function) in kernels.items())
    return f'#include "maps.cuh"\nnamespace equiconv {{\n{text}}}  // namespace equiconv\n'


@dataclass(frozen=True)
class _Terms:
    """A packing.SparseMap on a device."""
    tensors: tuple
    shape: tuple

    @classmethod
    def of(cls, sparse, device):
        arrays = (sparse.start, sparse.index, sparse.coefficients)
        return cls(tuple(torch.from_numpy(array).to(device) for array in arrays), sparse.shape)

    @property
    def struct(self):
        return launch.Terms(*(tensor.data_ptr() for tensor in self.tensors), *self.shape)


@dataclass(frozen=True)
class _Kernel:
    """A Structure, its C++ for a number of warps, and the map between its operands or tiles and the layer's weights."""
    structure: Structure
    source: object
    terms: _Terms


class _Direction:
    """From the input to the output, or the adjoint."""

    def __init__(self, plan, kernel, sides, adjoint, device, dtype):
        self._irreps, self._number = IrrepLayer(plan, kernel, sides, adjoint, dtype), NUMBERS[dtype]
        self._harmonics, self._device, self._weights = Harmonics(self._irreps), device, plan.weights
        self.toeplitz = torch.from_numpy(packing.toeplitz(self._harmonics)).to(device, dtype)

        shared_bytes = launch.device_of(device).shared_bytes
        self.forward = [self._kernel(s, partial(s.forward_source, self._number), packing.weight_map)
                        for s in forward_structures(self._irreps, self._harmonics, shared_bytes)]
        self.gradient = [] if adjoint else [
            self._kernel(s, partial(s.gradient_source, self._number), packing.gradient_map)
            for s in gradient_structures(self._irreps, self._harmonics, shared_bytes)]

    def _kernel(self, structure, source, terms):
        return _Kernel(structure, cache(source), _Terms.of(terms(structure, self._weights), self._device))


class FusedLayer:
    """A FilterPlan on a device, in bfloat16 or float16. Raises Unsupported for what the kernels cannot compute."""

    def __init__(self, plan, kernel, device, dtype):
        check_kernel(kernel)
        self.weights, self.device, self.dtype = plan.weights, device, dtype
        self._launch = launch.device_of(device).launch
        self._maps = maps_source(NUMBERS[dtype])
        sides = sides_of(plan)
        self._channels = [side.channels for side in sides]
        self._to_packed = [_Terms.of(packing.SparseMap.of_matrix(side.to_packed), device) for side in sides]
        self._from_packed = [_Terms.of(packing.SparseMap.of_matrix(side.to_packed.T), device) for side in sides]
        if max(map(_map_bytes, self._to_packed)) > launch.device_of(device).shared_bytes:
            raise Unsupported("its channels need more shared memory than there is")
        self._directions = [_Direction(plan, kernel, sides, adjoint, device, dtype) for adjoint in (False, True)]

    def pack(self, tensor, of_output):
        """The irreps [B, height, width, packed channels] of an input or output [B, channels, height, width]."""
        tensor, terms = dense(tensor), self._to_packed[of_output]
        packed = tensor.new_empty((len(tensor), *tensor.shape[2:], terms.shape[0]))
        self._change_channels(tensor, _strides(tensor), packed, _packed_strides(packed), terms, None)
        return packed

    def convolve(self, source, weights, bias, adjoint, padding, target_size, memory_format):
        """The convolution, or its adjoint: grad_output -> grad_input. padding: of the direction that is computed.

        source   packed
        weights  float32 [plan.weights]
        bias     float32 [target channels] or None
        Returns [B, *target_size].
        """
        direction, side = self._directions[adjoint], int(not adjoint)
        target = torch.empty((len(source), *target_size), dtype=self.dtype, device=self.device,
                             memory_format=memory_format)
        if target.numel() == 0:
            return target
        result = source.new_empty((len(source), *target_size[1:], self._channels[side]))
        warps = forward_warps(target_size[1])
        image = self._image(source.shape[1:3], target_size[1:], padding, 2 * warps)
        blocks = len(source) * image.tiles_y * image.tiles_x
        for kernel in direction.forward:
            operands = self._map("pack_weights", kernel.terms, weights, self.dtype)
            params = launch.ForwardParams(source.data_ptr(), operands.data_ptr(), direction.toeplitz.data_ptr(),
                                          result.data_ptr(), self._channels[side], image)
            self._launch(kernel.source(warps=warps), "equiconv_forward", (blocks, 1), warps * 32,
                         kernel.structure.forward_bytes(warps), params)
        self._change_channels(result, _packed_strides(result), target, _strides(target), self._from_packed[side], bias)
        return target

    def weight_gradient(self, x, gradient, padding):
        """d <convolution of x, gradient> / d weights: float32 [plan.weights]. x and gradient are packed.

        padding  of the convolution
        """
        if gradient.numel() == 0:
            return torch.zeros(self.weights, dtype=torch.float32, device=self.device)
        direction = self._directions[False]
        return reduce(torch.add, (self._gradient_of(kernel, direction.toeplitz, x, gradient, padding)
                                  for kernel in direction.gradient))

    def _gradient_of(self, kernel, toeplitz, x, gradient, padding):
        structure, numbers = kernel.structure, kernel.terms.shape[1]
        image = self._image(x.shape[1:3], gradient.shape[1:3], padding, 2 * structure.row_warps)
        tiles = len(x) * image.tiles_y * image.tiles_x
        splits = min(tiles, ceil(BLOCKS_PER_PROCESSOR * launch.device_of(self.device).processors / structure.jobs))
        partials = torch.empty((splits * structure.row_warps, numbers), dtype=torch.float32, device=self.device)
        params = launch.GradWeightParams(x.data_ptr(), gradient.data_ptr(), toeplitz.data_ptr(), partials.data_ptr(),
                                         self._channels[1], tiles, image)
        self._launch(kernel.source(), "equiconv_grad_weight", (splits, structure.jobs), structure.gradient_threads,
                     structure.gradient_bytes, params)
        total = torch.empty(numbers, dtype=torch.float32, device=self.device)
        params = launch.ReduceParams(partials.data_ptr(), total.data_ptr(), len(partials), numbers // 4)
        self._launch(self._maps, "equiconv_reduce", (ceil(numbers / 4 / MAP_THREADS), 1), MAP_THREADS, 0, params)
        return self._map("unpack_gradient", kernel.terms, total, torch.float32)

    def _change_channels(self, source, source_strides, target, target_strides, terms, bias):
        if target.numel() == 0:
            return
        pixels = target.numel() // (len(target) * terms.shape[0])
        params = launch.ChangeChannelsParams(source.data_ptr(), target.data_ptr(), terms.struct,
                                             None if bias is None else bias.data_ptr(), source_strides, target_strides,
                                             pixels)
        self._launch(self._maps, "equiconv_change_channels", (len(source) * ceil(pixels / PIXELS_OF_MAP), 1),
                     MAP_THREADS, _map_bytes(terms), params)

    def _map(self, name, terms, numbers, dtype):
        result = torch.empty(terms.shape[0], dtype=dtype, device=self.device)
        params = launch.MapParams(numbers.data_ptr(), result.data_ptr(), terms.struct)
        self._launch(self._maps, f"equiconv_{name}", (ceil(terms.shape[0] / MAP_THREADS), 1), MAP_THREADS, 0, params)
        return result

    @staticmethod
    def _image(size, target_size, padding, tile_rows):
        tiles = ceil(target_size[0] / tile_rows), ceil(target_size[1] / 8)
        return launch.Image(*size, *target_size, *padding, *tiles)


def _map_bytes(terms):
    """Of shared memory, for changing channels."""
    return 2 * MAP_PITCH * sum(terms.shape)


def _strides(tensor):
    """Channels of a dense tensor [B, channels, height, width]."""
    channels, pixels = tensor.shape[1], tensor.shape[2] * tensor.shape[3]
    each = (channels, 1) if is_channels_last(tensor) else (1, pixels)
    return launch.Channels(channels * pixels, *each)


def _packed_strides(packed):
    channels, pixels = packed.shape[3], packed.shape[1] * packed.shape[2]
    return launch.Channels(channels * pixels, channels, 1)


_LAYERS = WeakKeyDictionary()


def fused_layer(plan, kernel, device, dtype):
    """FusedLayer, made once. Raises Unsupported for what the kernels cannot compute."""
    known = _LAYERS.setdefault(plan, {})
    key = (tuple(kernel), device, dtype)
    if key not in known:
        try:
            known[key] = FusedLayer(plan, key[0], device, dtype)
        except Unsupported as problem:
            known[key] = problem
    if isinstance(known[key], Unsupported):
        raise Unsupported(*known[key].args)
    return known[key]


def fused_unavailable_reason(plan, geometry, device, dtype):
    """Why ops.fused_steerable_conv cannot compute a layer there, or None.

    plan      layout.FilterPlan
    geometry  layout.Geometry of the layer's forward pass
    """
    if dtype not in NUMBERS:
        return f"it computes in bfloat16 and float16, not in {dtype}"
    if geometry.up:
        return "transposed convolutions are not implemented"
    for name, plain in (("stride", 1), ("dilation", 1)):
        if set(getattr(geometry, name)) != {plain}:
            return f"only a {name} of {plain} is implemented, not {getattr(geometry, name)}"
    if geometry.groups != 1:
        return "groups are not implemented"
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type!r}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0"
    try:
        fused_layer(plan, geometry.kernel, device, dtype)
    except Unsupported as problem:
        return str(problem)
    return compiler.why_not(launch.device_of(device).arch)
