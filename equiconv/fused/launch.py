"""Launches the fused kernels, by CUDA's driver API; the structs of their parameters."""
import ctypes
from functools import cache

import torch

from .compiler import compiled

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong


def _struct(name, **members):
    return type(name, (ctypes.Structure,), {"_fields_": list(members.items())})


# the same members in the same order as in csrc/cuda/steerable_conv
Image = _struct("Image", **dict.fromkeys(
    "depth height width out_depth out_height out_width pad_z pad_y pad_x tiles_z tiles_y tiles_x".split(), INT))
Terms = _struct("Terms", start=POINTER, index=POINTER, coefficients=POINTER, count=INT, from_count=INT)
Channels = _struct("Channels", batch_stride=LONG, pixel_stride=LONG, channel_stride=LONG)
Output = _struct("Output", y=POINTER, bias=POINTER, channels=INT, function=INT)
ForwardParams = _struct("ForwardParams", x=POINTER, weights=POINTER, toeplitz=POINTER, output=Output, image=Image)
GradWeightParams = _struct("GradWeightParams", x=POINTER, gradient=POINTER, toeplitz=POINTER, partial=POINTER,
                           gradient_channels=INT, tiles=INT, image=Image)
ChangeChannelsParams = _struct("ChangeChannelsParams", **{"from": POINTER}, to=POINTER, terms=Terms, bias=POINTER,
                               from_channels=Channels, to_channels=Channels, pixels=INT, function=INT)
MapParams = _struct("MapParams", **{"from": POINTER}, to=POINTER, terms=Terms)
ReduceParams = _struct("ReduceParams", partial=POINTER, sum=POINTER, count=INT, size=INT)


class Device:
    """A GPU: what it can do, and its kernels."""

    def __init__(self, index):
        properties = torch.cuda.get_device_properties(index)
        self.index, self.arch = index, f"sm_{properties.major}{properties.minor}"
        self.processors = properties.multi_processor_count
        self.shared_bytes = properties.shared_memory_per_block_optin
        self._kernels = {}

    def launch(self, source, name, grid, threads, shared_bytes, params):
        """Runs the kernel `name` of that source on torch's current stream. The first time, compiles and loads it.

        Neither waits for the GPU nor copies from it; after the first time it can be captured in a CUDA graph.
        """
        with torch.cuda.device(self.index):
            kernel = self._kernels.get((source, name))
            if kernel is None:
                kernel = self._kernels[source, name] = _load(compiled(source, self.arch), name, self.shared_bytes)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
            stream = ctypes.c_void_p(torch.cuda.current_stream(self.index).cuda_stream)
            _check(_driver().cuLaunchKernel(kernel, *grid, 1, threads, 1, 1, shared_bytes, stream, arguments, None))


@cache
def device_of(device):
    """Device of a torch.device. Raises ValueError if that is no GPU."""
    if device.type != "cuda":
        raise ValueError(f"the fused convolution runs on CUDA devices only, got {device.type!r}")
    return Device(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _driver():
    return ctypes.CDLL("libcuda.so.1")


def _check(status):
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()}")


def _load(cubin, name, shared_bytes):
    """The function of a cubin, loaded into the current context; never unloaded, like torch's own kernels.

    shared_bytes  the most that a launch will ask for
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin))
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    _check(_driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared_bytes))
    return function
