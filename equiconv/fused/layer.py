"""A layer that the fused kernels compute: its kernels and tables, and their calls for tensors."""
from dataclasses import dataclass
from functools import cache, partial, reduce
from math import ceil, prod
from weakref import WeakKeyDictionary

import torch

from ..formats import dense, is_channels_last
from . import compiler, launch, packing
from .irreps import IrrepLayer, Unsupported, round_to, sides_of
from .structure import (
    FORWARD_SUMS,
    GRADIENT_SUMS,
    Harmonics,
    Structure,
    check_kernel,
    forward_structures,
    gradient_structures,
    tile_for,
)

NUMBERS = {torch.bfloat16: "Bfloat16", torch.float16: "Float16", torch.float32: "Tf32"}  # of device.cuh
STRIDES = (1, 2)
ACTIVATIONS = ("identity", "relu", "elu")  # in the order of functions.cuh
MAP_THREADS, PIXELS_OF_MAP = 256, 32  # of maps.cuh
BLOCKS_PER_PROCESSOR = 2                                          # that the gradient's grid is made for


def maps_source(number):
    """C++ of the kernels around the fused ones: see maps.cuh."""
    kernels = {"pack_channels": ("ChangeChannelsParams", f"ChangeChannels<{number}>::run"),
               "unpack_channels": ("ChangeChannelsParams", f"ChangeChannels<{number}::Result>::run"),
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
    """A Structure, its C++, the map between its operands or tiles and the layer's weights, and its harmonics."""
    structure: Structure
    source: object  # a function of the Tile and of whether it writes fields; or of the buffers
    terms: _Terms
    toeplitz: torch.Tensor


class _Direction:
    """From the input to the output, or the adjoint."""

    def __init__(self, plan, kernel, sides, adjoint, device, dtype, stride):
        irreps, number = IrrepLayer(plan, kernel, sides, adjoint, dtype, stride), NUMBERS[dtype]
        shared_bytes = launch.device_of(device).shared_bytes
        self._device, self._dtype, self._weights = device, dtype, plan.weights

        harmonics = Harmonics(irreps, FORWARD_SUMS)
        self.tile, structures = forward_structures(irreps, harmonics, shared_bytes)
        self.writes_fields = len(structures) == 1 and structures[0].fields is not None
        self.forward = self._kernels(structures, harmonics, number, Structure.forward_source, packing.weight_map)
        if not adjoint:
            harmonics = Harmonics(irreps, GRADIENT_SUMS)
            self.buffers, structures = gradient_structures(irreps, harmonics, shared_bytes)
            self.gradient = self._kernels(structures, harmonics, number, Structure.gradient_source,
                                          packing.gradient_map)

    def _kernels(self, structures, harmonics, number, source, map_of):
        toeplitz = round_to(packing.toeplitz(harmonics, self._dtype.itemsize), self._dtype)
        toeplitz = torch.from_numpy(toeplitz).to(self._device, self._dtype)
        terms = [_Terms.of(map_of(s, self._weights), self._device) for s in structures]
        return [_Kernel(s, cache(partial(source, s, number)), t, toeplitz) for s, t in zip(structures, terms)]


class FusedLayer:
    """A FilterPlan on a device, in bfloat16, float16 or (of float32) TF32. Raises Unsupported for what is not possible.

    Sizes and paddings are of two axes or of three.
    """

    def __init__(self, plan, kernel, device, dtype, stride):
        check_kernel(kernel)
        self.weights, self.device, self.dtype = plan.weights, device, dtype
        self._launch = launch.device_of(device).launch
        self._maps = maps_source(NUMBERS[dtype])
        sides = sides_of(plan)
        self._channels = [side.channels for side in sides]
        self._to_packed = [_Terms.of(packing.SparseMap.of_matrix(side.to_packed), device) for side in sides]
        self._from_packed = [_Terms.of(packing.SparseMap.of_matrix(side.to_packed.T), device) for side in sides]
        if max(map(self._map_bytes, self._to_packed)) > launch.device_of(device).shared_bytes:
            raise Unsupported("its channels need more shared memory than there is")
        self._directions = [_Direction(plan, kernel, sides, adjoint, device, dtype, stride)
                            for adjoint in (False, True)]

    def pack(self, tensor, of_output):
        """The irreps [B, *size, packed channels] of an input or output [B, channels, *size]."""
        tensor, terms = dense(tensor), self._to_packed[of_output]
        packed = tensor.new_empty((len(tensor), *tensor.shape[2:], terms.shape[0]))
        self._change_channels("pack", tensor, _strides(tensor), packed, _packed_strides(packed), terms)
        return packed

    def convolve(self, source, weights, bias, adjoint, padding, target_size, memory_format, activation="identity"):
        """The convolution, or its adjoint: grad_output -> grad_input. padding: of the direction that is computed.

        source      packed
        weights     float32 [plan.weights]
        bias        float32 [target channels] or None
        activation  one of ACTIVATIONS
        Returns [B, *target_size].
        """
        direction, side = self._directions[adjoint], int(not adjoint)
        target = torch.empty((len(source), *target_size), dtype=self.dtype, device=self.device,
                             memory_format=memory_format)
        if target.numel() == 0:
            return target
        at_once = direction.writes_fields and memory_format is not torch.contiguous_format
        output = (target.data_ptr(), None if bias is None else bias.data_ptr(), target_size[0],
                  ACTIVATIONS.index(activation))
        if not at_once:
            result = source.new_empty((len(source), *target_size[1:], self._channels[side]))
            output = result.data_ptr(), None, self._channels[side], 0
        tile = tile_for(direction.tile, target_size[-2])
        image = _image(source.shape[1:-1], target_size[1:], padding, (tile.planes, 2 * tile.rows, 8))
        for kernel in direction.forward:
            operands = self._map("pack_weights", kernel.terms, weights, self.dtype)
            params = launch.ForwardParams(source.data_ptr(), operands.data_ptr(), kernel.toeplitz.data_ptr(),
                                          launch.Output(*output), image)
            self._launch(kernel.source(tile=tile, in_fields=at_once), "equiconv_forward", (_tiles(source, image), 1),
                         32 * tile.planes * tile.rows, kernel.structure.forward_bytes(tile), params)
        if not at_once:
            self._change_channels("unpack", result, _packed_strides(result), target, _strides(target),
                                  self._from_packed[side], bias, activation)
        return target

    def weight_gradient(self, x, gradient, padding):
        """d <convolution of x, gradient> / d weights: float32 [plan.weights]. x and gradient are packed.

        padding  of the convolution
        """
        if gradient.numel() == 0:
            return torch.zeros(self.weights, dtype=torch.float32, device=self.device)
        return reduce(torch.add, (self._gradient_of(kernel, x, gradient, padding)
                                  for kernel in self._directions[False].gradient))

    def _gradient_of(self, kernel, x, gradient, padding):
        structure, numbers = kernel.structure, kernel.terms.shape[1]
        image = _image(x.shape[1:-1], gradient.shape[1:-1], padding, (1, 2 * structure.row_warps, 8))
        tiles = _tiles(x, image)
        splits = min(tiles, ceil(BLOCKS_PER_PROCESSOR * launch.device_of(self.device).processors / structure.jobs))
        partials = torch.empty((splits * structure.row_warps, numbers), dtype=torch.float32, device=self.device)
        params = launch.GradWeightParams(x.data_ptr(), gradient.data_ptr(), kernel.toeplitz.data_ptr(),
                                         partials.data_ptr(), self._channels[1], tiles, image)
        buffers = self._directions[False].buffers
        self._launch(kernel.source(buffers=buffers), "equiconv_grad_weight", (splits, structure.jobs),
                     structure.gradient_threads, structure.gradient_bytes(buffers), params)
        total = torch.empty(numbers, dtype=torch.float32, device=self.device)
        params = launch.ReduceParams(partials.data_ptr(), total.data_ptr(), len(partials), numbers // 4)
        self._launch(self._maps, "equiconv_reduce", (ceil(numbers / 4 / MAP_THREADS), 1), MAP_THREADS, 0, params)
        return self._map("unpack_gradient", kernel.terms, total, torch.float32)

    def _change_channels(self, name, source, source_strides, target, target_strides, terms, bias=None,
                         activation="identity"):
        if target.numel() == 0:
            return
        pixels = target.numel() // (len(target) * terms.shape[0])
        params = launch.ChangeChannelsParams(source.data_ptr(), target.data_ptr(), terms.struct,
                                             None if bias is None else bias.data_ptr(), source_strides, target_strides,
                                             pixels, ACTIVATIONS.index(activation))
        self._launch(self._maps, f"equiconv_{name}_channels", (len(source) * ceil(pixels / PIXELS_OF_MAP), 1),
                     MAP_THREADS, self._map_bytes(terms), params)

    def _map_bytes(self, terms):
        """Of shared memory, for changing channels."""
        return (PIXELS_OF_MAP * self.dtype.itemsize + 4) * sum(terms.shape)

    def _map(self, name, terms, numbers, dtype):
        result = torch.empty(terms.shape[0], dtype=dtype, device=self.device)
        params = launch.MapParams(numbers.data_ptr(), result.data_ptr(), terms.struct)
        self._launch(self._maps, f"equiconv_{name}", (ceil(terms.shape[0] / MAP_THREADS), 1), MAP_THREADS, 0, params)
        return result


def _image(size, target_size, padding, tile):
    """launch.Image; in the plane, of one plane. tile: pixels of a tile along the three axes"""
    size, target_size, padding = ((*[default] * (3 - len(given)), *given)
                                  for given, default in ((size, 1), (target_size, 1), (padding, 0)))
    return launch.Image(*size, *target_size, *padding, *(ceil(n / t) for n, t in zip(target_size, tile)))


def _tiles(source, image):
    return len(source) * image.tiles_z * image.tiles_y * image.tiles_x


def _strides(tensor):
    """Channels of a dense tensor [B, channels, *size]."""
    channels, pixels = tensor.shape[1], prod(tensor.shape[2:])
    each = (channels, 1) if is_channels_last(tensor) else (1, pixels)
    return launch.Channels(channels * pixels, *each)


def _packed_strides(packed):
    channels, pixels = packed.shape[-1], prod(packed.shape[1:-1])
    return launch.Channels(channels * pixels, channels, 1)


_LAYERS = WeakKeyDictionary()


def fused_layer(plan, kernel, device, dtype, stride=1):
    """FusedLayer, made once. Raises Unsupported for what the kernels cannot compute."""
    known = _LAYERS.setdefault(plan, {})
    key = (tuple(kernel), device, dtype, stride)
    if key not in known:
        try:
            known[key] = FusedLayer(plan, *key)
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
        return f"it computes in bfloat16, float16 and TF32, not in {dtype}"
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "it computes in TF32, which torch.backends.cudnn.allow_tf32 does not allow"
    if geometry.up:
        return "transposed convolutions are not implemented"
    if geometry.stride[0] not in STRIDES or len(set(geometry.stride)) != 1:
        return f"only strides of 1 and 2 are implemented, the same along every axis, not {geometry.stride}"
    if set(geometry.dilation) != {1}:
        return f"only a dilation of 1 is implemented, not {geometry.dilation}"
    if geometry.groups != 1:
        return "groups are not implemented"
    try:
        check_kernel(geometry.kernel)
    except Unsupported as problem:
        return str(problem)
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type!r}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0"
    try:
        fused_layer(plan, geometry.kernel, device, dtype, geometry.stride[0])
    except Unsupported as problem:
        return str(problem)
    return compiler.why_not(launch.device_of(device).arch)
