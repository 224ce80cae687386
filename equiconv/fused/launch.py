"""Launches the fused kernels, by CUDA's driver API; the structs of their parameters."""
import ctypes
from functools import cache
from weakref import WeakKeyDictionary

import torch

from . import compiler
from .compiler import Unavailable

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
        self.index, self.capability = index, (properties.major, properties.minor)
        self.arch = "sm_{}{}".format(*self.capability)
        self.processors = properties.multi_processor_count
        self.shared_bytes = properties.shared_memory_per_block_optin
        self._modules, self._functions, self._reasons = {}, {}, WeakKeyDictionary()

    def launch(self, source, name, grid, threads, shared_bytes, params):
        """Runs the kernel `name` of that source on torch's current stream. The first time, compiles and loads it.

        Neither waits for the GPU nor copies from it; after the first time it can be captured in a CUDA graph. Raises
        Unavailable for what cannot be compiled or loaded.
        """
        with torch.cuda.device(self.index):
            _ensure_context(self.index)
            function = self._functions.get((source, name))
            if function is None:
                function = self._functions[source, name] = _function(self._module(source), name, self.shared_bytes)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
            stream = ctypes.c_void_p(torch.cuda.current_stream(self.index).cuda_stream)
            _check(_driver().cuLaunchKernel(function, *grid, 1, threads, 1, 1, shared_bytes, stream, arguments, None))

    def why_not(self, kernels):
        """None if Kernels can run here, as far as is known without compiling them all; else the reason."""
        if kernels not in self._reasons:
            self._reasons[kernels] = compiler.why_not(kernels.sources, self.arch)
        if self._reasons[kernels] is not None:
            return self._reasons[kernels]
        try:  # the smallest of them: does the driver take what the compiler makes?
            with torch.cuda.device(self.index):
                self._module(kernels.maps)
        except Unavailable as problem:
            return str(problem)
        failed = (self._modules.get(source) for source in kernels.sources)
        return next((str(module) for module in failed if isinstance(module, Unavailable)), None)

    def _module(self, source):
        """The machine code of that source, loaded. Raises Unavailable, also the next time."""
        if source not in self._modules:
            try:
                self._modules[source] = _load(source, self.index, self.arch)
            except Unavailable as problem:
                self._modules[source] = problem
        if isinstance(self._modules[source], Unavailable):
            raise Unavailable(*self._modules[source].args)
        return self._modules[source]


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


def _load(source, index, arch):
    """The module of that source, loaded on a GPU; never unloaded, like torch's own kernels."""
    problems = []
    try:
        for cubin in compiler.cubins(source, arch):
            module = ctypes.c_void_p()
            try:
                _ensure_context(index)
                _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin))
                return module
            except (OSError, RuntimeError) as error:  # there is no driver, or one that is older than the compiler
                problems.append(f"the driver does not load it: {error}")
    except Unavailable as error:
        problems.append(str(error))
    raise Unavailable("; ".join(problems))


def _ensure_context(index):
    """Makes torch's context of a GPU that of this thread, if it has none: a thread of autograd's may be new."""
    context, device = ctypes.c_void_p(), ctypes.c_int()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        _check(_driver().cuDeviceGet(ctypes.byref(device), index))
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(_driver().cuCtxSetCurrent(context))


def _function(module, name, shared_bytes):
    """A kernel of a module. shared_bytes: the most that a launch will ask for"""
    function = ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    _check(_driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared_bytes))
    return function
