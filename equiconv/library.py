"""The op library `torch.ops.equiconv`: every schema is declared in Python; plugin libraries implement."""
import itertools
from importlib import import_module

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

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
        op, qualname = _declare(name, signature, backend, implementation, fake)
        functions[backend] = _differentiable(op, qualname, setup_context, _on_backend(backward, backend))
    return functions


def define_without_derivative(name, signature, implementations, *, fake):
    """As define(), for an op through which no gradient flows; it may change its arguments, whose versions stay."""
    functions = {}
    for backend, implementation in implementations.items():
        op, _ = _declare(name, signature, backend, implementation, fake)
        functions[backend] = _detached(op)
    return functions


def _declare(name, signature, backend, implementation, fake):
    """Declares an overload; returns (the op, its name)."""
    overload = name if backend == "native" else f"{name}.{backend}"
    qualname = f"{NAMESPACE}::{overload}"
    LIBRARY.define(overload + signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(qualname, fake, lib=LIBRARY)
    if implementation is not None:
        for key in DEVICE_KEYS[backend]:
            LIBRARY.impl(overload, implementation, key)
    op = getattr(getattr(getattr(torch.ops, NAMESPACE), name), "default" if backend == "native" else backend)
    return op, qualname


def _on_backend(backward, backend):
    return lambda ctx, *grads: backward(ctx, backend, *grads)


def _differentiable(op, qualname, setup_context, backward):
    """The op with its derivative: registered, for graphs (compile, export), and as a faster eager function.

    A formula from register_autograd is Python inside the dispatcher: it costs every call, also one without gradients.
    The eager function goes round it, calling the op below autograd.
    """
    below_autograd, any_requires_grad = torch._C._AutoDispatchBelowAutograd, torch._C._any_requires_grad
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
    in_functorch, (flat, nested) = torch._C._are_functorch_transforms_active, _lists_of(op)
    torch.library.register_autograd(qualname, backward, setup_context=setup_context, lib=LIBRARY)

    # A setup_context of its own costs 40 us a call; only torch.func needs it (it refuses what register_autograd makes).
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values_and_lengths):
            inputs = nested(*values_and_lengths)
            with below_autograd():
                output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *flat(backward(ctx, *grads))[:-1], None

    class Functorch(torch.autograd.Function):
        generate_vmap_rule = True
        backward = Eager.backward

        @staticmethod
        def forward(*values_and_lengths):
            return op(*nested(*values_and_lengths))

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup_context(ctx, nested(*inputs), output)

    Eager.__name__ = Eager.__qualname__ = qualname.replace("::", "_").replace(".", "_")
    eager, functorch = Eager.apply, Functorch.apply

    def function(*inputs):
        if is_compiling():
            return op(*inputs)
        values = flat(inputs)
        if in_functorch():
            return functorch(*values)
        if is_grad_enabled() and any_requires_grad(*values) or in_forward_mode():
            return eager(*values)  # which refuses tangents; below autograd they would be lost
        with below_autograd():
            return op(*inputs)

    return function


def _lists_of(op):
    """(flat, nested) of the lists of tensors among the arguments of an op, into which autograd does not look.

    flat(arguments) -> the others, then what is in the lists, then the lengths of these; nested(*flat) undoes it
    """
    kinds = [str(argument.type) for argument in op._schema.arguments]
    places = [i for i, kind in enumerate(kinds) if kind == "List[Tensor]"]
    others = [i for i in range(len(kinds)) if i not in places]

    def flat(arguments):
        lists = [arguments[i] for i in places]
        return *(arguments[i] for i in others), *itertools.chain(*lists), [len(tensors) for tensors in lists]

    def nested(*values):
        arguments, start = list(values[:len(others)]), len(others)
        for place, length in zip(places, values[-1]):
            arguments.insert(place, list(values[start:start + length]))
            start += length
        return arguments

    return (flat, nested) if places else (lambda arguments: (*arguments, None), lambda *values: values[:-1])


def _detached(op):
    """The op on tensors without gradients; below autograd where it is called at once."""
    below_autograd, is_compiling = torch._C._AutoDispatchBelowAutograd, torch.compiler.is_compiling

    def function(*inputs):
        if is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*tree_map_only(torch.Tensor, torch.Tensor.detach, inputs))
        with below_autograd():
            return op(*inputs)

    return function


def in_forward_mode():
    """Whether tensors may carry tangents, of torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def is_exporting():
    """Whether a graph is made for export: also where torch < 2.13 takes its own function for true in every graph."""
    return torch.compiler.is_exporting()


def autocast_dtype(device_type):
    """The dtype that autocast asks for on that type of device, or None where autocast is off."""
    if device_type not in backends.PREFERENCE or not torch.is_autocast_enabled(device_type):  # it raises on "meta"
        return None
    return torch.get_autocast_dtype(device_type)
