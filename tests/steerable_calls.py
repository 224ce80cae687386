"""Calls of steerable_conv, and the dense convolution that each of them must equal."""
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
import torch.nn.functional as F

import equiconv.nn
from equiconv.layout import FilterPlan
from equiconv.ops import expand_filter, steerable_conv
from tests.cases import space


@cache
def plan_between(space_name, fields_in, fields_out, kernel_size):
    """FilterPlan of a layer; the fields are functions as tests.cases has them."""
    g = space(space_name)
    types = [equiconv.nn.FieldType(g, fields(g)) for fields in (fields_in, fields_out)]
    cls = equiconv.nn.R2Conv if g.dimensionality == 2 else equiconv.nn.R3Conv
    rings = dict(rings=[0.7], frequencies_cutoff=3.0) if kernel_size == 2 else {}  # the default: only the centre
    return cls(*types, kernel_size, initialize=False, **rings).plan


@dataclass(frozen=True)
class Call:
    """One call of steerable_conv in float64: sizes, options (by steerable_conv's names) and seed of the tensors."""
    plan: FilterPlan
    kernel: tuple
    options: dict
    batch: int
    size: tuple
    has_bias: bool = True
    seed: int = 0

    @classmethod
    def of(cls, case):
        """The call that the layer of a test case makes."""
        module = case.build(equiconv.nn)
        names = ("stride", "padding", "dilation", "groups", "output_padding" if module.transposed else "padding_mode")
        options = {name: getattr(module, name) for name in names}
        return cls(module.plan, module.kernel, {**options, "transposed": module.transposed}, case.batch, case.size,
                   module.bias is not None)

    def with_(self, **changes):
        return replace(self, **changes)

    @property
    def transposed(self):
        return self.options.get("transposed", False)

    @cached_property
    def channels(self):
        """(of the input, of the output)"""
        groups = self.options.get("groups", 1)
        mine = (self.plan.in_channels, self.plan.out_channels)
        return (mine[0], mine[1] * groups) if self.transposed else (mine[0] * groups, mine[1])

    def tensors(self, dtype=torch.float64):
        """[x, weights, bias], bias None where there is none: the same for the same call."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(self.batch, self.channels[0], *self.size), (self.plan.weights,), (self.channels[1],)]
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        return tensors if self.has_bias else [*tensors[:2], None]

    def __call__(self, x, weights, bias, backend="native"):
        return steerable_conv(x, weights, self.plan, self.kernel, bias=bias, backend=backend, **self.options)

    def reference(self, x, weights, bias):
        return self(x, weights, bias, "reference")

    def dense(self, x, weights, bias):
        """torch's convolution with the filter of expand_filter."""
        filter = expand_filter(weights, self.plan, self.kernel, transposed=self.transposed, backend="reference")
        return self.convolve(x, filter, bias)

    def convolve(self, x, filter, bias):
        """torch's convolution with that filter."""
        options = {key: value for key, value in self.options.items() if key not in ("transposed", "padding_mode")}
        d, mode = len(self.kernel), self.options.get("padding_mode", "zeros")
        if self.transposed:
            return (F.conv_transpose2d, F.conv_transpose3d)[d - 2](x, filter, bias, **options)
        if mode != "zeros":
            padding = options.pop("padding")
            each = (padding,) * d if isinstance(padding, int) else padding
            x = F.pad(x, [p for axis in reversed(each) for p in (axis, axis)], mode)
        return (F.conv2d, F.conv3d)[d - 2](x, filter, bias, **options)


def results(function, tensors, grad=None):
    """[output, gradients of x, weights and (where there is one) bias] for a gradient of the output (random if None)."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to(y)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], grad)]


def errors(got, want):
    """Relative L2 errors of the tensors of two lists."""
    assert [g.shape for g in got] == [w.shape for w in want]
    return [((g.double() - w).norm() / w.norm().clamp(min=1e-30)).item() for g, w in zip(got, want)]
