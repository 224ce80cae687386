"""The op library `torch.ops.equiconv`: every schema is declared in Python; plugin libraries implement."""
from importlib import import_module

import torch
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
    below_autograd = torch._C._AutoDispatchBelowAutograd
    any_requires_grad = torch._C._any_requires_grad
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
    in_functorch = torch._C._are_functorch_transforms_active

    torch.library.register_autograd(qualname, backward, setup_context=setup_context, lib=LIBRARY)
    places = [i for i, argument in enumerate(op._schema.arguments) if str(argument.type) == "List[Tensor]"]
    if places:  # autograd does not look into lists
        return _on_flat_lists(op, places, setup_context, backward)

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


def _on_flat_lists(op, places, setup_context, backward):
    """The eager function of an op with lists of tensors, at these places among its arguments."""
    below_autograd, any_requires_grad = torch._C._AutoDispatchBelowAutograd, torch._C._any_requires_grad
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled

    others = [i for i in range(len(op._schema.arguments)) if i not in places]

    def flat(values):
        """The values, the tensors of their lists at the end."""
        return [*(values[i] for i in others), *(t for i in places for t in values[i])]

    def nested(values, lengths):
        inputs, start = list(values[:len(others)]), len(others)
        for place, length in zip(places, lengths):
            inputs.insert(place, list(values[start:start + length]))
            start += length
        return inputs

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, lengths, *values):
            inputs = nested(values, lengths)
            with below_autograd():
                output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, *flat(backward(ctx, *grads))

    class Functorch(torch.autograd.Function):
        generate_vmap_rule = True
        backward = Eager.backward

        @staticmethod
        def forward(lengths, *values):
            return op(*nested(values, lengths))

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup_context(ctx, nested(inputs[1:], inputs[0]), output)

    def function(*inputs):
        if is_compiling():
            return op(*inputs)
        values, lengths = flat(inputs), [len(inputs[i]) for i in places]
        if torch._C._are_functorch_transforms_active():
            return Functorch.apply(lengths, *values)
        if is_grad_enabled() and any_requires_grad(*values):
            return Eager.apply(lengths, *values)
        with below_autograd():
            return op(*inputs)

    return function


def _detached(op):
    """The op on tensors without gradients; below autograd where it is called at once."""
    below_autograd, is_compiling = torch._C._AutoDispatchBelowAutograd, torch.compiler.is_compiling

    def function(*inputs):
        if is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*tree_map_only(torch.Tensor, torch.Tensor.detach, inputs))
        with below_autograd():
            return op(*inputs)

    return function


@torch.compiler.assume_constant_result
def is_exporting():
    """Whether a graph is made for export: also where torch < 2.13 takes its own function for true in every graph."""
    return torch.compiler.is_exporting()


def autocast_dtype(device_type):
    """The dtype that autocast asks for on that type of device, or None where autocast is off."""
    if device_type not in backends.PREFERENCE or not torch.is_autocast_enabled(device_type):  # it raises on "meta"
        return None
    return torch.get_autocast_dtype(device_type)
