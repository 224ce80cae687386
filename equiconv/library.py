"""The op library `torch.ops.equiconv`: every schema is declared in Python; plugin libraries implement."""
from importlib import import_module

import torch

from . import backends

NAMESPACE = "equiconv"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
LIBRARY.define("limit_isa(str widest) -> str")
DEVICE_KEYS = {  # of backends in Python
    "triton": ("CUDA", "CPU") if backends.TRITON_INTERPRET else ("CUDA",),
    "fused": ("CUDA", "CPU"),  # on a CPU: what emulates a GPU
}


def load():
    """Loads the plugin libraries that were built. `_cuda` loads on any torch; on one without CUDA it does not run."""
    if backends.HAS_NATIVE["cpu"]:
        torch.ops.load_library(backends.HERE / "_cpu.so")
    if backends.HAS_NATIVE["cuda"] and torch.version.cuda:
        torch.ops.load_library(backends.HERE / "_cuda.so")


def triton_kernel(module, function):
    """A function of equiconv.triton_kernels, which is imported when it is first called."""
    def call(*arguments):
        return getattr(import_module(f"equiconv.triton_kernels.{module}"), function)(*arguments)
    return call


def define(name, signature, implementations, *, fake, setup_context, backward):
    """Declares the op, one overload per backend, and returns {backend: function}.

    "native" is the default overload: `_cpu` implements it for CPU tensors and `_cuda` for CUDA tensors, so a graph that
    was exported on one runs on the other. Other backends are the overloads of their name.

    implementations  {"native": None, backend: Python function}
    fake             fake(*args) -> outputs without data
    setup_context    setup_context(ctx, inputs, output)
    backward         backward(ctx, backend, *grads) -> gradients of the inputs, by ops on the same backend
    """
    functions = {}
    for backend, implementation in implementations.items():
        overload = name if backend == "native" else f"{name}.{backend}"
        qualname = f"{NAMESPACE}::{overload}"
        LIBRARY.define(overload + signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualname, fake, lib=LIBRARY)
        if implementation is not None:
            for key in DEVICE_KEYS[backend]:
                LIBRARY.impl(overload, implementation, key)
        op = getattr(getattr(getattr(torch.ops, NAMESPACE), name), "default" if backend == "native" else backend)
        functions[backend] = _differentiable(op, qualname, setup_context, _on_backend(backward, backend))
    return functions


def _on_backend(backward, backend):
    return lambda ctx, *grads: backward(ctx, backend, *grads)


def _differentiable(op, qualname, setup_context, backward):
    """The op with its derivative: registered, for graphs (compile, export), and as a faster eager function.

    A formula from register_autograd is Python inside the dispatcher: it costs every call, also one without gradients.
    The eager function goes round it, calling the op below autograd.
    """
    below_autograd = torch._C._AutoDispatchBelowAutograd
    any_requires_grad = torch._C._any_requires_grad
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
    in_functorch = torch._C._are_functorch_transforms_active

    torch.library.register_autograd(qualname, backward, setup_context=setup_context, lib=LIBRARY)

    def eager_forward(ctx, *inputs):
        with below_autograd():
            output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def autograd_function(**methods):
        methods = {key: staticmethod(f) for key, f in methods.items()}
        return type(qualname.replace("::", "_").replace(".", "_"), (torch.autograd.Function,), methods)

    # A setup_context of its own costs 40 us a call; only torch.func needs it (it refuses what register_autograd makes).
    eager = autograd_function(forward=eager_forward, backward=backward).apply
    functorch = autograd_function(forward=lambda *inputs: op(*inputs), setup_context=setup_context,
                                  backward=backward)
    functorch.generate_vmap_rule = True

    def function(*inputs):
        if is_compiling():
            return op(*inputs)
        if in_functorch():
            return functorch.apply(*inputs)
        if is_grad_enabled() and any_requires_grad(*inputs):
            return eager(*inputs)
        with below_autograd():
            return op(*inputs)

    return function


def autocast_dtype(device_type):
    """The dtype that autocast asks for on that type of device, or None where autocast is off."""
    if device_type not in backends.PREFERENCE or not torch.is_autocast_enabled(device_type):  # it raises on "meta"
        return None
    return torch.get_autocast_dtype(device_type)
