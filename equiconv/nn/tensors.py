"""Modules whose computation is one function of a bare tensor: typed outside, plain torch inside."""
import functools
import inspect
from contextlib import nullcontext

import escnn.nn
import torch
from escnn.nn import GeometricTensor

from ..formats import is_channels_last, like  # noqa: F401  (for the modules)
from ..library import autocast_dtype
from ..ops.on_fields import has_kernel
from .checks import check_type, shown
from .construction import built_on_cpu


def adopting_init(base, supports=None):
    """`base.__init__` of an escnn class, behind checks that escnn only asserts; then the module's own `_adopt`.

    supports  the nonlinearity that the representations of `in_type` must support
    """

    @functools.wraps(base.__init__)
    def __init__(self, *args, **kwargs):
        bound = inspect.signature(base.__init__).bind(self, *args, **kwargs)
        in_type = bound.arguments.get("in_type")
        if "in_type" in bound.arguments and not isinstance(in_type, (tuple, escnn.nn.FieldType)):
            raise TypeError(f"{base.__name__}: in_type must be a FieldType, got {shown(in_type)}")
        if supports is not None:
            for representation in in_type.representations:
                if supports not in representation.supported_nonlinearities:
                    raise ValueError(f"{base.__name__}: the representations of in_type must support {supports!r} "
                                     f"nonlinearities, got {representation.name!r}, which supports "
                                     f"{sorted(representation.supported_nonlinearities)}")
        # a container is left where its parts are
        with nullcontext() if "modules" in bound.arguments else built_on_cpu(self):
            base.__init__(self, *args, **kwargs)
            self._adopt()

    return __init__


def adopt(module, cls):
    """Makes an escnn module into one of the class `cls` of this package, in place."""
    if type(module) is not cls:
        module.__class__ = cls
        module._adopt()


def is_exactly(module, classes):
    """Whether a module computes what one of these classes does: a class of the user's may compute something else."""
    return type(module) in classes and "forward" not in module.__dict__


def has_hooks(module):
    """Whether somebody looks at what goes into the module and comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def wants_plain(x):
    """Whether x is to go through operations that every exporter knows: for graphs that run without equiconv."""
    if isinstance(x, torch.fx.Proxy):
        return True
    is_traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return is_traced and torch.onnx.is_in_onnx_export()  # which takes 20 us to answer


def is_fused(x):
    """Whether x goes through an op on fields; else through plain operations of torch."""
    return not wants_plain(x) and has_kernel(x.device.type)


def as_for_product(x):
    """x as autocast would give it to a matrix product or a convolution."""
    wanted = autocast_dtype(x.device.type)
    return x if wanted is None or x.dtype == torch.float64 else x.to(wanted)


class OnTensors:
    """Mixin before an escnn module of one input: `_compute(x)` maps [B, in_type.size, *spatial] to the output's tensor.

    The output has the input's dtype and memory format.
    """

    keeps_coords = True

    def _adopt(self):
        """Makes an escnn module that was just built, or one built long ago, into one of this class."""

    def forward(self, input):
        """input: GeometricTensor [B, in_type.size, *spatial] -> GeometricTensor [B, out_type.size, *spatial]."""
        check_type(self, input)
        y = like(self._compute(input.tensor), input.tensor)
        return GeometricTensor(y, self.out_type, input.coords if self.keeps_coords else None)

    def export(self):
        """A module of plain torch operations on tensors [B, C, *spatial]; sets this one to eval mode, as escnn does."""
        return traced(self)


def traced(module):
    """The graph of module._compute in eval mode, to which the module is set: plain torch operations on tensors."""
    module.eval()
    return torch.fx.GraphModule(module, _Tracer().trace(module), type(module).__name__).eval()


class _Tracer(torch.fx.Tracer):
    traced_func_name = "_compute"
