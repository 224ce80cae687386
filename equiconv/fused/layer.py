"""A layer that the fused kernels compute: its kernels and tables, and their calls for tensors."""
from dataclasses import dataclass
from functools import reduce
from math import ceil, prod
from weakref import WeakKeyDictionary

import torch

from ..formats import dense, is_channels_last
from . import compiler, launch, packing
from .irreps import Unsupported, round_to
from .kernels import MAP_THREADS, NUMBERS, Kernel, Kernels, map_bytes
from .structure import check_kernel, tile_for

STRIDES = (1, 2)
ACTIVATIONS = ("identity", "relu", "elu")  # in the order of functions.cuh
BLOCKS_PER_PROCESSOR = 2  # that the gradient's grid is made for


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
class _Placed:
    """A Kernel, the map between its operands or tiles and the layer's weights, and its harmonics, on a device."""
    kernel: Kernel
    terms: _Terms
    toeplitz: torch.Tensor


class FusedLayer:
    """A layer on a device, in bfloat16, float16 or (of float32) TF32. Sizes and paddings are of two axes or three."""

    def __init__(self, kernels, device):
        """kernels: Kernels"""
        self.weights, self.device, self.dtype, self._maps = kernels.weights, device, kernels.dtype, kernels.maps
        self._map_pixels, self._launch = kernels.map_pixels, launch.device_of(device).launch
        self._channels = [side.channels for side in kernels.sides]
        self._to_packed, self._from_packed = (
            [_Terms.of(packing.SparseMap.of_matrix(matrix), device) for matrix in matrices]
            for matrices in zip(*((side.to_packed, side.to_packed.T) for side in kernels.sides)))
        self._directions = kernels.directions
        self._forward = [self._place(direction.forward, packing.weight_map) for direction in kernels.directions]
        self._gradient = self._place(kernels.directions[False].gradient, packing.gradient_map)

    def _place(self, kernels, map_of):
        toeplitz = packing.toeplitz(kernels[0].structure.harmonics, self.dtype.itemsize)  # the same for all of them
        toeplitz = torch.from_numpy(round_to(toeplitz, self.dtype)).to(self.device, self.dtype)
        return [_Placed(k, _Terms.of(map_of(k.structure, self.weights), self.device), toeplitz) for k in kernels]

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
        for placed in self._forward[adjoint]:
            operands = self._map("pack_weights", placed.terms, weights, self.dtype)
            params = launch.ForwardParams(source.data_ptr(), operands.data_ptr(), placed.toeplitz.data_ptr(),
                                          launch.Output(*output), image)
            kernel = placed.kernel
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
        return reduce(torch.add, (self._gradient_of(placed, x, gradient, padding) for placed in self._gradient))

    def _gradient_of(self, placed, x, gradient, padding):
        structure, numbers = placed.kernel.structure, placed.terms.shape[1]
        image = _image(x.shape[1:-1], gradient.shape[1:-1], padding, (1, 2 * structure.row_warps, 8))
        tiles = _tiles(x, image)
        splits = min(tiles, ceil(BLOCKS_PER_PROCESSOR * launch.device_of(self.device).processors / structure.jobs))
        partials = torch.empty((splits * structure.row_warps, numbers), dtype=torch.float32, device=self.device)
        params = launch.GradWeightParams(x.data_ptr(), gradient.data_ptr(), placed.toeplitz.data_ptr(),
                                         partials.data_ptr(), self._channels[1], tiles, image)
        buffers = self._directions[False].buffers
        self._launch(placed.kernel.source(buffers=buffers), "equiconv_grad_weight", (splits, structure.jobs),
                     structure.gradient_threads, structure.gradient_bytes(buffers), params)
        total = torch.empty(numbers, dtype=torch.float32, device=self.device)
        params = launch.ReduceParams(partials.data_ptr(), total.data_ptr(), len(partials), numbers // 4)
        self._launch(self._maps, "equiconv_reduce", (ceil(numbers / 4 / MAP_THREADS), 1), MAP_THREADS, 0, params)
        return self._map("unpack_gradient", placed.terms, total, torch.float32)

    def _change_channels(self, name, source, source_strides, target, target_strides, terms, bias=None,
                         activation="identity"):
        if target.numel() == 0:
            return
        pixels = target.numel() // (len(target) * terms.shape[0])
        params = launch.ChangeChannelsParams(source.data_ptr(), target.data_ptr(), terms.struct,
                                             None if bias is None else bias.data_ptr(), source_strides, target_strides,
                                             pixels, ACTIVATIONS.index(activation))
        self._launch(self._maps, f"equiconv_{name}_channels", (len(source) * ceil(pixels / self._map_pixels), 1),
                     MAP_THREADS, map_bytes(terms.shape, self._map_pixels, self.dtype), params)

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


_KERNELS, _LAYERS = WeakKeyDictionary(), WeakKeyDictionary()  # of plans


def kernels_of(plan, kernel, dtype, stride, shared_bytes):
    """Kernels, made once. Raises Unsupported for what they cannot compute."""
    known, key = _KERNELS.setdefault(plan, {}), (tuple(kernel), dtype, stride, shared_bytes)
    if key not in known:
        try:
            known[key] = Kernels(plan, *key)
        except Unsupported as problem:
            known[key] = problem
    if isinstance(known[key], Unsupported):
        raise Unsupported(*known[key].args)
    return known[key]


def fused_layer(plan, kernel, device, dtype, stride=1):
    """FusedLayer, made once. Raises Unsupported for what the kernels cannot compute."""
    known, key = _LAYERS.setdefault(plan, {}), (tuple(kernel), device, dtype, stride)
    if key not in known:
        kernels = kernels_of(plan, kernel, dtype, stride, launch.device_of(device).shared_bytes)
        known[key] = FusedLayer(kernels, device)
    return known[key]


def unsupported_reason(geometry, dtype):
    """Why there are no kernels for such a layer on any GPU, as far as its geometry and torch.dtype tell; or None."""
    if dtype not in NUMBERS:
        return f"it computes in bfloat16, float16 and TF32, not in {dtype}"
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
    return None


def fused_unavailable_reason(plan, geometry, device, dtype):
    """Why ops.fused_steerable_conv cannot compute a layer there, or None.

    plan      layout.FilterPlan
    geometry  layout.Geometry of the layer's forward pass
    """
    reason = unsupported_reason(geometry, dtype)
    if reason is not None:
        return reason
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "it computes in TF32, which torch.backends.cudnn.allow_tf32 does not allow"
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type!r}"
    gpu = launch.device_of(device)
    if gpu.capability < (8, 0):
        return "it needs a GPU of compute capability 8.0"
    try:
        kernels = kernels_of(plan, geometry.kernel, dtype, geometry.stride[0], gpu.shared_bytes)
    except Unsupported as problem:
        return str(problem)
    return gpu.why_not(kernels)


def origin_of_kernels(plan, geometry, device, dtype):
    """Where the kernels of a layer on a GPU come from, in words. For layers without a fused_unavailable_reason."""
    gpu = launch.device_of(device)
    kernels = kernels_of(plan, geometry.kernel, dtype, geometry.stride[0], gpu.shared_bytes)
    return compiler.origin(kernels.sources, gpu.arch)
