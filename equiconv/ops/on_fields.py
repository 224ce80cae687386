"""What the ops on fields, [B, channels, *spatial], share: the choice of their backend and checks of their arguments."""
import torch

from .. import backends, library
from ..formats import FLOATING, empty_fields, like

_AVAILABLE = ("native", "triton")
_DEFAULTS = {**backends.defaults(_AVAILABLE, ("cpu",)), "meta": "native"}  # whose fakes serve it


def on_backends(module, op):
    """The implementations of an op for library.define."""
    return {"native": None, "triton": library.triton_kernel(module, op)}


def define_with_linear_gradient(name, tensors, options, fake, definition):
    """Declares an op `name`(x, tensors, options) and its gradient `name`_bwd(grad, x, tensors, options).

    Returns {backend: function} of the op. Which numbers of x a result is made of is decided by comparing them, if at
    all: the gradient is linear in grad, and has no derivative by x.

    tensors, options  their arguments in the schema
    fake              of the op
    definition        in plain PyTorch: it gives the second derivative
    """
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:1 + len(tensors)])
        ctx.options = inputs[1 + len(tensors):]

    def backward(ctx, backend, grad):
        x, *others = ctx.saved_tensors
        return gradient[backend](like(grad, x), x, *others, *ctx.options), *[None] * (len(tensors) + len(options))

    def backward_setup_context(ctx, inputs, output):
        setup_context(ctx, inputs[1:], output)

    def backward_backward(ctx, backend, grad_grad_x):
        """The gradient's derivative by grad. Not in forward mode: zero tangents of constants are NaN beside a NaN."""
        x, *others = ctx.saved_tensors
        y, gradient_of = torch.func.vjp(lambda x: definition(x, *others, *ctx.options), x)
        grad_grad, = torch.func.vjp(lambda grad: gradient_of(grad)[0], torch.zeros_like(y))[1](grad_grad_x)
        return grad_grad, torch.zeros_like(x), *[None] * (len(tensors) + len(options))

    arguments = ", ".join(("Tensor x", *tensors, *options))
    gradient = library.define(
        f"{name}_bwd", f"(Tensor grad, {arguments}) -> Tensor", on_backends(name, f"{name}_bwd"),
        fake=lambda grad, x, *rest: empty_fields(x, x.shape[1]), setup_context=backward_setup_context,
        backward=backward_backward)
    return library.define(name, f"({arguments}) -> Tensor", on_backends(name, name), fake=fake,
                          setup_context=setup_context, backward=backward)


def pick(x, backend):
    """The backend that computes on x: `backend` if it can, by default the best."""
    return backends.pick(_DEFAULTS, _AVAILABLE, x.device.type, backend)


def has_kernel(device_type):
    """Whether these ops are more than their definitions there, which must know the structure on the host."""
    return _DEFAULTS.get(device_type, "reference") != "reference"


def check_fields(op, x):
    if x.dim() < 2 or x.dtype not in FLOATING:
        raise ValueError(f"{op}: x must be [B, C, *spatial] and floating point, got {tuple(x.shape)} and {x.dtype}")


def check_table(op, name, table, columns, rows="n"):
    if table.dim() != 2 or table.shape[1] != len(columns) or table.dtype != torch.int64:
        raise ValueError(f"{op}: {name} must be int64 [{rows}, {len(columns)}], got {table.dtype} {tuple(table.shape)}")
