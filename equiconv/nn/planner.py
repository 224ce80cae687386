"""Which method computes a convolution: dense with the expanded filter, or one by factors (ops.steerable_conv).

"factorised" is the native kernels', on the CPU; "two_pass" is Triton's and "fused" CUDA C++'s, on CUDA. The fused one
is taken only where it is asked for by name, or where autotune() finds it faster.
"""
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from .. import backends
from ..formats import FLOATING, compute_dtype
from ..fused import fused_unavailable_reason, origin_of_kernels
from ..layout import Geometry
from ..layout.work import dense_work
from ..library import autocast_dtype, in_forward_mode, is_exporting
from ..ops.steerable_conv import DTYPES, make_tables
from . import costs, cuda_costs
from .bases import FIELDS, Bases

BACKENDS = {"factorised": "native", "two_pass": "triton", "fused": "fused"}  # of steerable_conv
METHODS = ("auto", *BACKENDS, "dense")
NOMINAL = {2: (4, 32, 32), 3: (2, 16, 16, 16)}  # batch and size of an image, where none is known
REMEMBERED = 256  # choices of a module


def planned_of(module):
    """The Planned that computes a module, or None."""
    planned = module.planned if hasattr(type(module), "planned") else None  # a submodule may have the name
    return planned if isinstance(planned, Planned) else None


def methods_on(device_type):
    """The methods that "auto" chooses from on that type of device."""
    return cuda_costs.METHODS if device_type == "cuda" else costs.METHODS


@dataclass(frozen=True)
class PlanReport:
    """How a convolution is computed, and why.

    method                      "factorised", "two_pass", "fused" or "dense"
    input_shape                 [B, channels, *spatial] that this holds for
    factorised, dense           multiplications of the forward pass, for one pixel of the output
    factorised_bytes, dense_bytes   the weights as either method multiplies by them: mixing matrices, filter
    reason
    scratch_bytes               of "two_pass" and "dense" on CUDA: what they need besides input and output; else None
    bases                       Bases that the last call read and wrote: those of the fields, or of their irreps
    folded                      the class of the batch norm that was part of the last call's filter and bias, or ""
    why_not_fused               why "fused" cannot compute it on that device, or None
    kernels                     of "fused": how many kernels it has, and where they come from; or ""
    """
    method: str
    input_shape: tuple
    factorised: float
    dense: float
    factorised_bytes: int
    dense_bytes: int
    reason: str
    scratch_bytes: object = None
    bases: Bases = FIELDS
    folded: str = ""
    why_not_fused: object = None
    kernels: str = ""

    def __str__(self):
        folded = f"; the {self.folded} after it was part of its filter and bias" if self.folded else ""
        return (f"{self.method} for an input of {list(self.input_shape)}: {self.reason}\n"
                f"factorised: {self.factorised:,.0f} multiplications per pixel, {self.factorised_bytes:,} bytes\n"
                f"dense: {self.dense:,.0f} multiplications per pixel, {self.dense_bytes:,} bytes"
                + ("" if self.scratch_bytes is None else f"\nit takes {self.scratch_bytes:,} bytes meanwhile")
                + f"\nit reads {self.bases.read} and writes {self.bases.written}" + folded
                + ("" if self.why_not_fused is None else f"\nfused: not possible, {self.why_not_fused}")
                + (f"\nkernels: {self.kernels}" if self.kernels else ""))


class Planned:
    """Mixin of the convolutions. `method` is one of METHODS; it is no part of the state_dict.

    "auto" chooses by the costs of the machine, for each shape of the input; in a compiled graph, which serves many, for
    a nominal one. What the factorised methods cannot do is dense then, and a ValueError where one is asked for by name.
    """

    _method = "auto"
    _last_bases, _last_folded = FIELDS, ""

    def _adopt(self):
        super()._adopt()
        self._choices, self._last_shape = {}, None

    def __getstate__(self):
        return {**super().__getstate__(), "_choices": {}}

    @property
    def planned(self):
        """See planned_of: a module of another class has the one that computes it here."""
        return self

    @property
    def method(self):
        return self._method

    @method.setter
    def method(self, value):
        if value not in METHODS:
            raise ValueError(f"{type(self).__name__}: method must be one of {METHODS}, got {value!r}")
        self._method = value

    def plan_report(self, input_shape=None):
        """PlanReport for inputs [B, in_type.size, *spatial] of the weights' dtype; by default as in the last call."""
        shape = tuple(input_shape or self._last_shape or self._nominal_shape())
        bases, geometry = self._last_bases, self.geometry(shape)
        plan = self.plan.in_irreps(*bases)  # which is made anew if it must be
        device, dtype = self.weights.device, self._compute_dtype(self.weights.device)
        wanted = self._wanted(device)
        problem = self._why_not_on(wanted, device, dtype)
        if problem is not None:
            method, reason = "dense", f"the method {wanted!r} cannot be used: {problem}"
        elif self._method != "auto":
            method, reason = self._method, "as the module's method says"
        else:
            method, reason = self._choose(plan, shape, self.training, device, dtype)
        work, size, scratch = costs.factorised_work(plan, geometry), dtype.itemsize, None
        if device.type == "cuda" and method in cuda_costs.METHODS:
            scratch = cuda_costs.estimate(method, plan, geometry, shape[0], dtype, self.training,
                                          cuda_costs.current(device)).scratch
        kernels = ""
        if method == "fused":
            kernels = origin_of_kernels(self._plan[0], self.nominal_geometry, device, dtype)
        return PlanReport(method, shape, work.multiplications, dense_work(plan, geometry.stride, geometry.up),
                          size * work.packed, size * plan.out_channels * plan.in_channels * plan.taps, reason, scratch,
                          bases, self._last_folded, self._why_not_fused(device, dtype), kernels)

    def geometry(self, input_shape):
        """layout.Geometry for inputs [B, in_type.size, *spatial]."""
        each = [tuple(self._each(v)) for v in (self.stride, self.padding, self.dilation)]
        return Geometry(self.kernel, *each, self.groups, self.transposed, self.in_type.size, self.out_type.size,
                        tuple(input_shape[2:]), tuple(self.evaluate_output_shape(input_shape)[2:]))

    @property
    def nominal_geometry(self):
        """The same for inputs of a size that stands for all."""
        return self.geometry(self._nominal_shape())

    def candidates(self, x):
        """The methods that can compute the tensor x, of which why_not_factorised() says nothing against."""
        methods, device = methods_on(x.device.type), x.device
        if device.type == "cuda" and self._why_not_fused(device, self._compute_dtype(device)) is None:
            return (*methods, "fused")
        return methods

    def method_for(self, x, bases=FIELDS, norm=None):
        """The method, one of METHODS but "auto", for the input tensor x [B, in_type.size, *spatial].

        bases, norm  of the call, which plan_report() tells of
        """
        if not torch.compiler.is_compiling():
            self.__dict__.update(_last_shape=x.shape, _last_bases=bases,
                                 _last_folded="" if norm is None else type(norm).__name__)
        if self._method == "dense":
            return "dense"
        problem = self.why_not_factorised(x)
        if problem is not None:
            if self._method != "auto":
                raise ValueError(f"{type(self).__name__}: method {self._method!r} cannot be used here: {problem}; "
                                 "'auto' takes one that can")
            return "dense"
        dtype = self._compute_dtype(x.device)
        if torch.compiler.is_compiling():
            return self._method_of_graphs(x.device, dtype)
        if self._method != "auto":
            return self._method
        with_backward = self.training or (torch.is_grad_enabled() and (x.requires_grad or self.weights.requires_grad))
        return self._choose(self._plan[0].in_irreps(*bases), tuple(x.shape), with_backward, x.device, dtype)[0]

    def why_not_factorised(self, x):
        """Why the factorised method (of x's device, or the one asked for) cannot take the tensor x now, or None."""
        self._refresh_plan()
        if not torch.compiler.is_compiling():
            for tensor in (x, self.weights):
                if type(tensor) is not torch.Tensor and type(tensor) is not Parameter:
                    return f"a tensor is a {type(tensor).__name__}"
            if torch._C._are_functorch_transforms_active():
                return "a transform of torch.func is active"
            if in_forward_mode():
                return "its kernels have no derivative in forward mode"
            if torch.onnx.is_in_onnx_export():
                return "the graph of an export is dense"
        elif is_exporting():
            return "the graph of an export is dense"
        method, in_autocast = self._wanted(x.device), autocast_dtype(x.device.type)
        if in_autocast is not None:
            if method == "factorised":
                return "autocast is on"
            if torch.float64 in (x.dtype, self.weights.dtype) or x.dtype not in FLOATING:
                return f"under autocast, it does not take {x.dtype} with weights of {self.weights.dtype}"
        elif x.dtype != self.weights.dtype:
            return f"the input is {x.dtype}, the weights are {self.weights.dtype}"
        return self._why_not_on(method, x.device, self._compute_dtype(x.device))

    def _wanted(self, device):
        """The factorised method that is asked for, or that of the device."""
        if self._method in BACKENDS:
            return self._method
        return next(method for method in methods_on(device.type) if method != "dense")

    def _compute_dtype(self, device):
        """Of the input as the factorised method takes it."""
        in_autocast = autocast_dtype(device.type)
        return self.weights.dtype if in_autocast is None or self.weights.dtype == torch.float64 else in_autocast

    def _why_not_on(self, method, device, dtype):
        if method == "fused":
            return self._why_not_fused(device, dtype)
        backend = BACKENDS[method]
        if device.type not in (("cpu",) if backend == "native" else ("cpu", "cuda")):
            return f"no kernels on {device.type!r}"
        reason = backends.why_not(backend, device.type)
        if reason is not None:
            return f"no kernels on {device.type!r}: {reason}"
        if dtype not in DTYPES[backend]:
            return f"it computes in float32 and float64, not in {dtype}"
        return self._problem_of_plan(method)

    @torch.compiler.assume_constant_result
    def _why_not_fused(self, device, dtype):
        return fused_unavailable_reason(self._plan[0], self.nominal_geometry, device, dtype)

    @torch.compiler.assume_constant_result
    def _problem_of_plan(self, method):
        return self._plan[0].too_large_to_factorise(self.kernel, in_two_passes=method == "two_pass")

    @torch.compiler.assume_constant_result
    def _method_of_graphs(self, device, dtype):
        shape, method = self._nominal_shape(), self._method
        if method == "auto":
            method = self._choose(self._plan[0], shape, True, device, dtype)[0]
        if method not in ("dense", "fused"):  # its tables are made before the trace
            make_tables(BACKENDS[method], self._plan[0], self.geometry(shape), device, compute_dtype(dtype))
        return method

    def _nominal_shape(self):
        batch, *size = NOMINAL[self.d]
        return (batch, self.in_type.size, *size)

    def _choose(self, plan, shape, with_backward, device, dtype):
        """(method, reason) by the costs of the machine."""
        switches = torch.get_num_threads()
        if device.type == "cuda":
            switches = [cuda_costs.precision(dtype, kind) for kind in ("convolutions", "products")]
        key = (plan, shape, with_backward, device, dtype, str(switches))
        if key not in self._choices:
            if len(self._choices) >= REMEMBERED:
                self._choices.clear()
            times = costs_of if device.type != "cuda" else cuda_costs_of
            found = times(plan, self.geometry(shape), shape[0], with_backward, device, dtype)
            best = min(found, key=found.get)
            times = ", ".join(f"{method} {seconds * 1e3:.3g} ms" for method, seconds in found.items())
            work = "a training step" if with_backward else "inference"
            self._choices[key] = best, f"estimated for {work}: {times}"
        return self._choices[key]


def costs_of(plan, geometry, batch, with_backward, device, dtype):
    """{method: seconds} on the CPU."""
    known = costs.current()
    return {method: known.time(method, costs.amounts(method, plan, geometry, batch, with_backward, with_backward))
            for method in costs.METHODS}


def cuda_costs_of(plan, geometry, batch, with_backward, device, dtype):
    """{method: seconds} on a GPU."""
    rates = cuda_costs.current(device)
    return {method: cuda_costs.estimate(method, plan, geometry, batch, dtype, with_backward, rates).seconds
            for method in cuda_costs.METHODS}
