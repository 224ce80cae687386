"""What is compared: a case as escnn's module, the same compiled, a plain torch layer, and equiconv's by each method."""
import copy
import logging

import escnn.nn
import torch
from escnn.nn import GeometricTensor

from .precision import autocast

LAYOUTS = ("contiguous", "channels_last")
# A convolution's `method`; else its choice.
FORCED = {"equiconv_dense": "dense", "equiconv_factorised": "factorised", "equiconv_two_pass": "two_pass",
          "equiconv_fused": "fused"}
METHODS = ("escnn", "escnn_compiled", "torch", "equiconv", *FORCED)
PLAIN = {"R2Conv": torch.nn.Conv2d, "R3Conv": torch.nn.Conv3d, "R3IcoConv": torch.nn.Conv3d, "Linear": torch.nn.Linear,
         "R2ConvTransposed": torch.nn.ConvTranspose2d, "R3ConvTransposed": torch.nn.ConvTranspose3d,
         "R3IcoConvTransposed": torch.nn.ConvTranspose3d}
PLAIN_ARGUMENTS = ("kernel_size", "padding", "output_padding", "stride", "dilation", "groups", "bias", "padding_mode")


class Layer:
    """A module with its input: every kind of work that is timed is a method without arguments that returns tensors."""

    def __init__(self, module, call, x, grad, precision, filter_grad=None):
        """call(x) -> output tensor; grad, filter_grad: the gradients of output and filter that backward starts from."""
        self.module, self.call, self.x, self.precision = module, call, x, precision
        self.grad, self.filter_grad = grad, filter_grad
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def forward(self):
        """In training mode: the filter is expanded."""
        with autocast(self.precision, self.x.device):
            return [self.call(self.x)]

    def training(self):
        """Forward, and backward to the input and every parameter."""
        return torch.autograd.grad(self.forward()[0], [self.x, *self.parameters], self.grad)

    def inference(self):
        """In evaluation mode, without gradients: the filter may come from a cache."""
        with torch.no_grad():
            return self.forward()

    def expand(self):
        """The filter alone."""
        with autocast(self.precision, self.x.device):
            return [self.module.expand_parameters()[0]]

    def expand_training(self):
        filter, = self.expand()
        return torch.autograd.grad(filter, [self.module.weights], self.filter_grad.to(filter.dtype))


class Unavailable(Exception):
    """This method cannot do this work here; the message says why."""


def build(case, method, device, precision, layout="contiguous", like=None):
    """The Layer of one method, its input in that memory layout.

    like    escnn's Layer of the same case, whose input and gradients the other methods share

    Raises Unavailable where the method does not exist or does not compile.
    """
    if method == "escnn_compiled":
        return _compiled(like)
    if method == "torch":
        module = plain_layer(case).to(device, precision.parameters)
        module = module.to(memory_format=memory_format(case, layout))
        return Layer(module, module, like.x, like.grad, precision)
    namespace = escnn.nn if method == "escnn" else equiconv_nn()
    # recompute: a basis of its own, since escnn's layers of equal types share one, which equiconv lays out anew
    module = case.build(namespace, recompute=True).to(device, precision.parameters).train()
    if like is None:
        x = case.input(dtype=precision.activations, device=device, batch=case.batch_on(device)).tensor
        x = x.contiguous(memory_format=memory_format(case, layout)).requires_grad_()
    else:
        x = like.x
        _share_basis(like.module, module)
    if method in FORCED:
        _force(module, FORCED[method], x, precision)
    wrapped = GeometricTensor(x, case.in_type)
    layer = Layer(module, lambda tensor: module(wrapped).tensor, x, None, precision)
    if like is None:
        with torch.no_grad():
            layer.grad, layer.filter_grad = torch.randn_like(layer.forward()[0]), torch.randn_like(layer.expand()[0])
    else:
        layer.grad, layer.filter_grad = like.grad, like.filter_grad
    return layer


def _force(module, method, x, precision):
    """Sets the method of a convolution that has a choice. Raises Unavailable."""
    if not hasattr(module, "method"):
        raise Unavailable("it has no choice of a method")
    if method == "two_pass" and x.device.type != "cuda":
        raise Unavailable("on the CPU its kernels are interpreted")
    module.method = method if method != "dense" else "auto"
    with autocast(precision, x.device):
        problem = module.why_not_factorised(x)
    if problem is not None:
        raise Unavailable(problem)
    module.method = method


def _share_basis(theirs, ours):
    """Gives escnn's layer the basis of equiconv's: equal weights make equal filters then."""
    from equiconv.layout import basis_block
    for pair in theirs.basisexpansion._representations_pairs:
        basis, block = (basis_block(module.basisexpansion, pair) for module in (theirs, ours))
        basis.sampled_basis.copy_(block.dense())


def memory_format(case, layout):
    """torch's memory format for tensors of that case: [B, C, *spatial]."""
    formats = {2: torch.channels_last, 3: torch.channels_last_3d} if layout == "channels_last" else {}
    return formats.get(case.dimensions, torch.contiguous_format)


def plain_layer(case):
    """A torch layer with the same channels, kernel and geometry, and no equivariance."""
    arguments = {name: case.arguments[name] for name in PLAIN_ARGUMENTS if name in case.arguments}
    return PLAIN[case.module](case.in_type.size, case.out_type.size, **arguments)


def _compiled(layer):
    """escnn's layer under torch.compile, tried out for training and inference. Raises Unavailable."""
    module, in_type, logger = layer.module, layer.module.in_type, logging.getLogger("torch._dynamo")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, level = copy.copy(layer), logger.level
    logger.setLevel(logging.ERROR)
    try:
        compiled.call = torch.compile(lambda tensor: module(GeometricTensor(tensor, in_type)).tensor)
        compiled.training()
        module.eval()
        compiled.inference()
    except Exception as error:  # whatever a compiler raises is the result to record
        reason = (str(error).strip().splitlines() or ["no message"])[0][:120]
        raise Unavailable(f"torch.compile: {type(error).__name__}: {reason}") from error
    finally:
        module.train()
        logger.setLevel(level)
    compiled.note = f"{sum(torch._dynamo.utils.counters['graph_break'].values())} graph breaks"
    return compiled


def equiconv_nn():
    """The namespace equiconv.nn, or Unavailable."""
    try:
        import equiconv.nn
    except ImportError as error:
        raise Unavailable(f"equiconv: {error}") from error
    return equiconv.nn
